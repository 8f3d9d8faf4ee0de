"""`python -m btrain` is the command `btrain`."""

from btrain.cli import run_command

run_command()
