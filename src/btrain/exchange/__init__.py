"""Weights in and out: other projects' files (`read`), our runs (`from_run`), exports (`write`).

Nothing is imported here, so that `btrain export --help` answers without torch.
"""
