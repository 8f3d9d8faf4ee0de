"""Results for people: finished runs side by side, and the page of an evaluation."""

from btrain.report.compare import compare

__all__ = ["compare"]
