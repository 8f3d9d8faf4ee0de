"""Bounds that hold for every image in a box, and what is trained and measured by them."""
