"""Every method, one file each."""

from diffdistill.method import Method
from diffdistill.methods.denoise import Denoise
from diffdistill.methods.dmd2 import DMD2

METHODS: dict[str, type[Method]] = {"denoise": Denoise, "dmd2": DMD2}
