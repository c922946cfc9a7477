"""One function per operation; one file per backend behind it; a plain jnp definition is the specification."""
