"""Tables made of run folders."""

from btrain.report.compare import compare

__all__ = ["compare"]
