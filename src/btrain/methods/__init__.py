"""What is done with one batch: Algorithm 2, AugMix, and the rivals' own steps."""
