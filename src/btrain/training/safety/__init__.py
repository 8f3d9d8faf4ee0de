"""The safeguards that keep a run from going on with wrong numbers."""
