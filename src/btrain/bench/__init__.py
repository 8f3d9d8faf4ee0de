"""How long a training step takes, beside the plain defense and what arithmetic allows."""
