"""Compiles what a configuration would run, for chips that need not be there, and says what it takes."""
