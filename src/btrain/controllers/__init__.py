"""Parts that act on the weights behind an update."""
