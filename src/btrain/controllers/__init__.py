"""What acts on the weights around an update."""
