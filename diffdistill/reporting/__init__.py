"""One page of HTML about one run, or several side by side, from what their folders hold."""

from diffdistill.reporting.report import report

__all__ = ["report"]
