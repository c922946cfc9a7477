"""`streamdit bench`: what the real streaming loop, or the real training step, takes on the machine at hand."""
