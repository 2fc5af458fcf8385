"""One training loop for every model, and the small pieces it is made of."""
