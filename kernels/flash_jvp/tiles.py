"""Tile configurations of the kernels: a table, and a lookup that depends on nothing but architecture, dtype and sizes.

Never on a length, and nothing is tuned at run time: all ranks of a job take the same tiles and so round alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

ARCHITECTURES = (80, 90, 100, 120)
INTERPRETER = 0


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one tile, and how many warps and pipeline stages work on it.

    Fields:
        pipelined_remainder: whether the tiles with masks are pipelined too (fused and tangent kernels). Without it the
            main loop is 6 to 8 % shorter (d = 64 and 128 on sm_90); with it there are often fewer spills.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    pipelined_remainder: bool = False


INTERPRETED = Tile(32, 32, 4, 1)


def architecture(device: torch.device) -> int:
    """The entry of ARCHITECTURES whose tiles a device takes (see `nearest`); INTERPRETER on a CPU."""
    return INTERPRETER if device.type == "cpu" else nearest(*torch.cuda.get_device_capability(device))


def nearest(major: int, minor: int) -> int:
    """The entry of ARCHITECTURES for a compute capability: its own, else the nearest lower one.

    Raises:
        NotImplementedError: a GPU older than all of them.
    """
    known = [entry for entry in ARCHITECTURES if entry <= 10 * major + minor]
    if not known:
        raise NotImplementedError(
            f"the Triton kernels need a GPU of compute capability 8.0 or newer, got {major}.{minor}; "
            'use backend="chunked"'
        )
    return known[-1]


def size_class(*sizes: int) -> int:
    """The power of two, at least 16, to which the largest of the head sizes is padded."""
    return max(16, 1 << (max(sizes) - 1).bit_length())


# Largest head size of an entry, and its tile by architecture, for float16 and bfloat16: of the tiles tried, those that
# compile to few spills and few instructions per score (`python -m flash_jvp.compiled`); which of several good ones is
# fastest has not been measured. Sizes of 65 to 127 are padded to 128, and their masks cost registers. "queries" and
# "keys" are the passes of the backward; the second holds two accumulators, and so takes smaller tiles.
_TILES = {
    "forward": {
        64: dict.fromkeys(ARCHITECTURES, Tile(128, 64, 8, 3)),
        128: dict.fromkeys(ARCHITECTURES, Tile(128, 64, 8, 2)),
        256: {80: Tile(64, 32, 8, 1), 90: Tile(64, 32, 8, 2), 100: Tile(64, 32, 8, 2), 120: Tile(64, 32, 8, 1)},
    },
    "fused": {
        64: {
            80: Tile(128, 64, 8, 2, True),
            90: Tile(128, 64, 8, 3),
            100: Tile(128, 64, 8, 3),
            120: Tile(128, 64, 8, 2, True),
        },
        127: {
            80: Tile(128, 32, 8, 3, True),
            90: Tile(128, 32, 8, 2),
            100: Tile(64, 64, 8, 2),
            120: Tile(128, 32, 8, 2, True),
        },
        128: {
            80: Tile(128, 32, 8, 3, True),
            90: Tile(128, 64, 8, 2, True),
            100: Tile(64, 64, 8, 2),
            120: Tile(128, 32, 8, 2, True),
        },
        256: dict.fromkeys(ARCHITECTURES, Tile(32, 32, 8, 2, True)),
    },
    "tangent": {
        64: {
            80: Tile(128, 64, 8, 2, True),
            90: Tile(128, 64, 8, 3),
            100: Tile(128, 64, 8, 3),
            120: Tile(128, 64, 8, 2, True),
        },
        127: dict.fromkeys(ARCHITECTURES, Tile(128, 32, 8, 2, True)),
        128: {
            80: Tile(128, 32, 8, 2, True),
            90: Tile(128, 64, 8, 2, True),
            100: Tile(128, 64, 8, 2, True),
            120: Tile(128, 32, 8, 2, True),
        },
        256: {80: Tile(32, 32, 8, 1), 90: Tile(32, 32, 8, 1), 100: Tile(64, 32, 8, 1), 120: Tile(32, 32, 8, 1)},
    },
    "queries": {
        64: {**dict.fromkeys(ARCHITECTURES, Tile(128, 64, 8, 2)), 100: Tile(128, 64, 8, 2, True)},
        127: {
            80: Tile(128, 32, 8, 2),
            90: Tile(128, 64, 8, 2),
            100: Tile(128, 64, 8, 2),
            120: Tile(128, 32, 8, 2, True),
        },
        128: {80: Tile(128, 32, 8, 2), 90: Tile(128, 64, 8, 2), 100: Tile(128, 64, 8, 2), 120: Tile(128, 32, 8, 2)},
        256: {**dict.fromkeys(ARCHITECTURES, Tile(32, 64, 8, 1)), 100: Tile(64, 64, 8, 1)},
    },
    "keys": {
        64: {
            80: Tile(32, 128, 8, 2, True),
            90: Tile(64, 128, 8, 2),
            100: Tile(64, 128, 8, 2),
            120: Tile(32, 128, 8, 2, True),
        },
        127: {80: Tile(64, 64, 8, 2), 90: Tile(32, 128, 8, 2), 100: Tile(64, 128, 8, 2, True), 120: Tile(64, 64, 8, 2)},
        128: {
            80: Tile(64, 64, 8, 2),
            90: Tile(64, 128, 8, 2, True),
            100: Tile(64, 128, 8, 2, True),
            120: Tile(64, 64, 8, 2),
        },
        256: {80: Tile(64, 32, 8, 1), 90: Tile(64, 32, 8, 1), 100: Tile(64, 64, 8, 1), 120: Tile(32, 32, 8, 1)},
    },
}
# Where just these carry a tangent, what is not streamed leaves room for a larger tile or one more stage.
_TILES_OF_TANGENTS = {
    ("fused", "q"): {64: {90: Tile(128, 64, 8, 4)}, 128: {90: Tile(128, 64, 8, 3)}},
    ("fused", "v"): {128: {90: Tile(128, 64, 8, 3)}},
    ("tangent", "q"): {64: {90: Tile(128, 128, 8, 2)}, 128: {90: Tile(128, 64, 8, 3)}},
    ("tangent", "v"): {128: {90: Tile(128, 128, 8, 2, True)}},
}
# What costs registers or shared memory besides, and its tiles. A bias without one of its own takes one stage less.
_FEATURE_TILES = {
    ("fused", "biased"): {64: {90: Tile(128, 64, 8, 3, True)}, 128: {90: Tile(128, 32, 8, 3, True)}},
    ("tangent", "biased"): {128: {90: Tile(128, 64, 8, 2, True)}},
    ("keys", "biased"): {64: {90: Tile(64, 128, 8, 2, True)}, 128: {90: Tile(32, 128, 8, 2, True)}},
    ("keys", "capped"): {128: {90: Tile(32, 128, 8, 2, True)}},
    ("keys", "grouped"): {64: {90: Tile(32, 128, 8, 2, True)}, 128: {90: Tile(32, 128, 8, 2, True)}},
    ("keys", "causal"): {128: {90: Tile(64, 128, 8, 2)}},
}
# float32 is multiplied exactly, by ordinary instructions, which hold whole rows in registers: small tiles, and from 128
# on they spill all the same. It is for checking results, not for speed.
_FLOAT32_TILES = {64: Tile(32, 16, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 32, 1)}
_FLOAT32_KEYS = {**_FLOAT32_TILES, 256: Tile(16, 16, 16, 1)}  # 31 spill stores by 32 warps, 0 by 16


def tile_for(
    kernel: str,
    arch: int,
    dtype: torch.dtype,
    *sizes: int,
    tangents: str = "qkv",
    features: tuple[str, ...] = (),
) -> Tile:
    """The tile of a kernel, a pure function of what is given here.

    Args:
        kernel: "forward", "fused", "tangent", "queries" or "keys".
        arch: INTERPRETER or an entry of ARCHITECTURES.
        sizes: the head sizes, d and dv, each at most 256.
        tangents: which of "q", "k" and "v" carry one, in this order.
        features: some of "biased" (by a bias that differs between queries and between keys), "capped" (by a softcap),
            "grouped" (several query heads share a key) and "causal"; the first that has a tile of its own decides.
    """
    if arch == INTERPRETER:
        return INTERPRETED
    size = max(sizes)
    if dtype == torch.float32:
        exact = _FLOAT32_KEYS if kernel == "keys" else _FLOAT32_TILES
        return next(tile for largest, tile in exact.items() if size <= largest)
    rows = _TILES[kernel]
    size_class = next(largest for largest in rows if size <= largest)
    for feature in features:
        own = _FEATURE_TILES.get((kernel, feature), {}).get(size_class, {}).get(arch)
        if own is not None:
            return own
    fewer = _TILES_OF_TANGENTS.get((kernel, tangents), {}).get(size_class, {}).get(arch)
    tile = rows[size_class][arch] if fewer is None else fewer
    return replace(tile, num_stages=max(1, tile.num_stages - 1)) if "biased" in features else tile
