"""Several distillations of one teacher under one clock and one evaluation, told on one page."""

from diffdistill.comparing.compare import Measure, compare

__all__ = ["Measure", "compare"]
