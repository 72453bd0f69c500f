"""diffdistill: distill a diffusion or flow model into a generator of one to four steps.

`distill`, `load`, `sample`, `couple`, `evaluate`, `export`, `check`, `join`, `load_relay` and `load_routed` are those
of `diffdistill.api`, imported when first used.
"""

import torch  # noqa: F401  the one heavy import of this package: everything else waits until it is used

__version__ = "0.1.0"

_FROM_API = ("check", "couple", "distill", "evaluate", "export", "join", "load", "load_relay", "load_routed", "sample")
__all__ = ["__version__", *_FROM_API]


def __getattr__(name: str):
    if name not in _FROM_API:
        raise AttributeError(f"module diffdistill has no attribute {name!r}; the functions are {', '.join(_FROM_API)}")
    from diffdistill import api

    return getattr(api, name)
