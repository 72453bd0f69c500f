"""Several distillations of one teacher under one clock and one evaluation, told on one page."""

from diffdistill.comparing.compare import Failed, Measure, compare

__all__ = ["Failed", "Measure", "compare"]
