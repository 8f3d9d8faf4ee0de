"""The bench: how long a training step takes, beside the plain defense and arithmetic's bound."""
