"""What a kernel compiles to, found without a GPU: registers, spills, matrix instructions, shared memory, loop length.

`python -m flash_jvp.compiled` prints it for every configuration of `tiles`. Triton brings the assembler and the
disassembler of NVIDIA along, so all that is needed is Triton.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flash_jvp import backward, fused
from flash_jvp.launch import Launch
from flash_jvp.logits import Logits
from flash_jvp.tiles import ARCHITECTURES

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# what one program may have, in KiB: CUDA programming guide, "Technical Specifications per Compute Capability"
SHARED_KIB = {80: 163, 90: 227, 100: 227, 120: 99}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
BACKWARD = ("queries", "keys")
MASKS = ("none", "causal", "kv_lens", "key bool", "bool", "key bias", "bias", "softcap")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.]*)(.*)")


@dataclass(frozen=True)
class Report:
    """What one compiled kernel uses.

    Fields:
        registers: per thread; spill_stores: instructions that store to local memory.
        matrix_instructions: wgmma, mma.sync and tcgen05.mma in PTX.
        shared_kib: dynamic shared memory of one program.
        loop_instructions: of each loop in the machine code that multiplies matrices, in order.
    """

    registers: int
    spill_stores: int
    matrix_instructions: int
    shared_kib: float
    loop_instructions: tuple[int, ...]


def _specialised(value: Any, never: bool) -> tuple[Any, bool]:
    """(type, whether divisible by 16) as a launch specialises an argument; the type "constexpr" for None and 1.

    `never`: whether the kernel asks that its numbers are not specialised.
    """
    if value is None:
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype], True
    if isinstance(value, float):
        return "fp32", False
    if value == 1 and not never:
        return "constexpr", False
    return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0 and not never


def compile_for(launch: Launch, arch: int) -> Any:
    """The kernel that this launch would compile on an architecture (90 for sm_90), as Triton's CompiledKernel.

    The tensors may be on the device "meta"; pointers count as aligned to 16 bytes, as those of PyTorch are.
    """
    constants = launch.all_constants()
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    for index, (name, parameter) in enumerate(zip(launch.kernel.arg_names, launch.kernel.params, strict=True)):
        if name in constants:
            signature[name], constexprs[(index,)] = "constexpr", constants[name]
            continue
        value = launch.arguments[name]
        parts = value if isinstance(value, tuple) else (value,)
        types = []
        for position, part in enumerate(parts):
            path = (index, position) if isinstance(value, tuple) else (index,)
            kind, divisible = _specialised(part, parameter.do_not_specialize)
            types.append(kind)
            if kind == "constexpr":
                constexprs[path] = part
            if divisible:
                attributes[path] = [["tt.divisibility", 16]]
        signature[name] = tuple(types) if isinstance(value, tuple) else types[0]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": launch.tile.num_warps, "num_stages": launch.tile.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def inspect(launch: Launch, arch: int) -> Report:
    """What the kernel of a launch uses on an architecture. Takes seconds, unless Triton's cache has it."""
    compiled = compile_for(launch, arch)
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = _tool("nvdisasm", "-c", cubin.name)
    instructions = _INSTRUCTION.findall(sass)
    return Report(
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spill_stores=sum(name.split(".")[0] == "STL" for name, _ in instructions),
        matrix_instructions=len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx)),
        shared_kib=compiled.metadata.shared / 1024,
        loop_instructions=_loops(sass),
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _loops(sass: str) -> tuple[int, ...]:
    """Instructions in each innermost backward branch that contains a matrix instruction."""
    labels: dict[str, int] = {}
    names: list[str] = []
    spans = []
    for line in sass.splitlines():
        label = re.match(r"(\.L_x_\d+):", line.strip())
        if label:
            labels[label.group(1)] = len(names)
        instruction = _INSTRUCTION.search(line)
        if not instruction:
            continue
        names.append(instruction.group(1))
        target = re.search(r"\.L_x_\d+", instruction.group(2))
        if names[-1].startswith("BRA") and target and target.group(0) in labels:
            spans.append((labels[target.group(0)], len(names)))
    spans = [(a, b) for a, b in spans if any("MMA" in name for name in names[a:b])]
    inner = [(a, b) for a, b in spans if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)]
    return tuple(b - a for a, b in sorted(inner))


def example(
    kernel: str,
    arch: int,
    dtype: torch.dtype,
    size: int,
    tangents: str = "",
    mask: str = "none",
    *,
    length: int = 4096,
    group: int = 1,
) -> Launch:
    """The launch of a kernel for BSHD tensors of a usual shape, without data (device "meta").

    Args:
        kernel: "forward", "fused", "tangent", or a pass of BACKWARD, which knows no tangents.
        tangents: which of "q", "k", "v" carry one.
        mask: one of MASKS, or words of several.
        length: M and N; group: how many of the 24 query heads share a key.
    """
    q = torch.empty(2, length, 24, size, dtype=dtype, device="meta").transpose(1, 2)
    k = torch.empty(2, length, 24 // group, size, dtype=dtype, device="meta").transpose(1, 2)
    row = torch.empty(2, 24, length, device="meta")
    logits = masked_logits(mask, q)
    if kernel in BACKWARD:
        return backward.launches(q, k, k, q, row, q, q, k, k, logits, arch)[BACKWARD.index(kernel)]
    tq, tk, tv = (x if name in tangents else None for name, x in zip("qkv", (q, k, k), strict=True))
    to, mu = (q, row) if tangents else (None, None)
    return fused.launch(q, k, k, tq, tk, tv, q, to, row, mu, logits, arch, known=kernel == "tangent")


def masked_logits(mask: str, q: Tensor) -> Logits:
    """Logits for queries q with one of MASKS, as many keys as queries."""
    batch, heads, length, size = q.shape
    dtype = torch.bool if "bool" in mask else torch.float32 if "float32" in mask else q.dtype
    rows = 1 if "key" in mask else length
    bias = torch.empty(batch, 1, rows, length, dtype=dtype, device=q.device).expand(batch, heads, length, length)
    return Logits(
        scale=size**-0.5,
        softcap=30.0 if "softcap" in mask else 0.0,
        diagonal=5 if "causal" in mask else None,
        bias=bias if "bool" in mask or "bias" in mask else None,
        kv_lens=torch.empty(batch, dtype=torch.int32, device=q.device) if "kv_lens" in mask else None,
    )


def main() -> None:
    """Print what every configuration of the table compiles to, and on sm_90 every mask."""
    kernels = (("forward", ""), ("fused", "qkv"), ("fused", "q"), ("tangent", "qkv"), ("tangent", "q"))
    kernels += tuple((kernel, "") for kernel in BACKWARD)
    unmasked = product(kernels, (64, 72, 128, 256), ARCHITECTURES, ("none",))
    masked = product((("fused", "qkv"), *kernels[-2:]), (64, 128), (90,), MASKS[1:])
    print(f"Triton {triton.__version__}, bfloat16\n")
    columns = (
        "kernel",
        "tangents",
        "size",
        "sm",
        "mask",
        "tile",
        "registers",
        "spills",
        "matrix",
        "shared KiB",
        "loops",
    )
    widths = (8, 8, 4, 4, 8, 16, 9, 6, 6, 10, 12)
    print("  ".join(name.ljust(width) for name, width in zip(columns, widths, strict=True)))
    for (kernel, tangents), size, arch, mask in chain(unmasked, masked):
        launch = example(kernel, arch, torch.bfloat16, size, tangents, mask)
        report, tile = inspect(launch, arch), launch.tile
        shape = f"{tile.block_m}x{tile.block_n} w{tile.num_warps} s{tile.num_stages}"
        shape += " p" if tile.pipelined_remainder else ""
        loops = "+".join(map(str, report.loop_instructions[:2]))
        cells = (kernel, tangents, size, arch, mask, shape, report.registers, report.spill_stores)
        cells += (report.matrix_instructions, f"{report.shared_kib:.0f}", loops)
        line = "  ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(line.rstrip(), flush=True)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # whoever read it, head for one, has had enough; nothing is left to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
