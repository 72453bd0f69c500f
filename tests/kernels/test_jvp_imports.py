"""What the files of flash_jvp may import: torch everywhere, Triton in the kernels, diffusers in its adapter."""

import sys

import pytest
from test_imports import ROOT, imports

PACKAGE = ROOT / "kernels" / "flash_jvp"
KERNELS = {"backward", "compiled", "fused", "gradient_kernels", "launch", "tile_logits"}
MAY_IMPORT = {name: {"triton"} for name in KERNELS} | {"diffusers_backend": {"diffusers"}}
MAY_IMPORT["launch"] |= {"numpy"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_the_package_stands_alone(path):
    allowed = MAY_IMPORT.get(path.stem, set()) | {"torch", "flash_jvp", *sys.stdlib_module_names}
    for name, at_top in imports(path):
        package = name.split(".")[0]
        assert package in allowed, f"{path.name} may not import {name}"
        assert not (at_top and package == "diffusers"), f"{path.name} must import {name} inside a function"
