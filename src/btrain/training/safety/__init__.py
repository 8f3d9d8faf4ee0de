"""What keeps a run from going on with wrong numbers."""
