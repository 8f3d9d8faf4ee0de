"""The methods: what is done with one batch, by Algorithm 2, AugMix, and the rivals' own steps."""
