"""Efficient-training rivals whose training step is another than Algorithm 2's."""
