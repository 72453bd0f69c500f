"""diffdistill: distill a diffusion or flow model into a generator of one to four steps."""

__version__ = "0.1.0"
