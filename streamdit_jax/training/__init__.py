"""One training loop; an objective is a loss function."""
