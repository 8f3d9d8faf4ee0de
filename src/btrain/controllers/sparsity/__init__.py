"""Masks that keep most weights at zero while a network is trained, and how they change."""
