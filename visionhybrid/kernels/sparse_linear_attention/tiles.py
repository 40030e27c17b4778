"""How large the tiles of the Triton kernels are, so that every one fits the registers and the shared memory.

Found by compiling ahead of time for sm_80, sm_90 and gfx942 (tests/aot.py keeps them true): on NVIDIA at most 99 KiB, what the
smallest GPU since Ampere gives a program, on AMD 64 KiB; no more than a few registers spilled. A block of the map longer
than a tile is walked in several.
"""

from __future__ import annotations

from typing import Any

# Kernel -> (queries, keys, warps, stages), by (bytes of a number, head dim).
NVIDIA = {
    (2, 64): {"fwd": (128, 64, 4, 3), "dq": (64, 64, 4, 3), "dkv": (64, 64, 4, 2)},
    (2, 128): {"fwd": (128, 64, 8, 2), "dq": (64, 64, 8, 2), "dkv": (64, 64, 8, 2)},
    (2, 256): {"fwd": (64, 32, 8, 1), "dq": (32, 32, 8, 2), "dkv": (32, 32, 8, 2)},
    (4, 64): {"fwd": (32, 32, 4, 2), "dq": (32, 32, 4, 2), "dkv": (32, 32, 4, 2)},
    (4, 128): {"fwd": (32, 32, 8, 2), "dq": (16, 32, 8, 2), "dkv": (32, 16, 8, 2)},
}
AMD = {
    (2, 64): {"fwd": (64, 64, 4, 2), "dq": (64, 64, 4, 2), "dkv": (64, 64, 4, 2)},
    (2, 128): {"fwd": (64, 64, 4, 2), "dq": (64, 64, 4, 2), "dkv": (64, 64, 4, 1)},
    (2, 256): {"fwd": (64, 32, 4, 1), "dq": (64, 32, 4, 1), "dkv": (32, 32, 4, 1)},
    (4, 64): {"fwd": (32, 32, 4, 1), "dq": (32, 32, 4, 1), "dkv": (32, 32, 4, 1)},
    (4, 128): {"fwd": (32, 32, 4, 1), "dq": (32, 32, 4, 1), "dkv": (32, 32, 4, 1)},
    (4, 256): {"fwd": (16, 16, 4, 1), "dq": (16, 16, 4, 1), "dkv": (16, 16, 4, 1)},
}
WIDEST = 256


def padded(n: int) -> int:
    """The tile that holds n: a power of two, at least what a matrix instruction takes."""
    return max(16, 1 << (n - 1).bit_length())


def fits(dim: int, value_dim: int, itemsize: int, amd: bool) -> bool:
    """Whether there are tiles for these head dims."""
    return (itemsize, max(64, padded(dim), padded(value_dim))) in (AMD if amd else NVIDIA)


def constants(
    kernel: str,
    dim: int,
    value_dim: int,
    block_q: int,
    block_k: int,
    mask: str,
    unit: int,
    itemsize: int,
    amd: bool,
) -> dict[str, Any]:
    """Constants and launch options of "fwd", "dq" or "dkv"; with the types of the pointers they fix what is compiled.

    Args:
        mask: "none", "keys" (one row for all queries) or "pairs".
        unit: a power of two that divides every stride: 16 bytes or more allow wide loads.
    """
    # Both head dims in tiles of one width: unequal ones are rare, and each pair would have its own register allocation.
    pad = max(padded(dim), padded(value_dim))
    tile_q, tile_k, warps, stages = (AMD if amd else NVIDIA)[itemsize, max(64, pad)][kernel]
    if not amd and (mask == "pairs" or unit * itemsize < 16):
        # Addresses of single elements take registers, too.
        tile_q, tile_k = min(tile_q, 64 if pad < 256 else 32), min(tile_k, 32)
    if tile_q > padded(block_q):
        warps, tile_q = max(4, warps * padded(block_q) // tile_q), padded(block_q)
    return dict(
        D=dim,
        E=value_dim,
        PAD=pad,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        TILE_Q=tile_q,
        TILE_K=min(tile_k, padded(block_k)),
        MASK=mask,
        UNIT=unit,
        # Three TF32 products keep float32's accuracy (relative error 2e-7 of an attention, emulated); exact ones on NVIDIA
        # have no tensor cores and spill kilobytes. AMD's matrix cores take float32 as it is.
        PRECISION="tf32x3" if itemsize == 4 and not amd else "ieee",
        num_warps=warps,
        num_stages=stages,
    )
