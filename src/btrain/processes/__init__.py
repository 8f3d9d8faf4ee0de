"""One run on several processes (torchrun)."""
