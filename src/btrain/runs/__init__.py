"""A run folder: its files, its lock, and how it is read."""
