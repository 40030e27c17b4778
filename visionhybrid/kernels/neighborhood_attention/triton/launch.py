"""What the launchers share: sizes of tiles, options brought on three axes, the gradient of the bias table."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor

from visionhybrid.kernels.neighborhood_attention.triton import fused, halves

# Programs to fill a GPU with when tiles are split; more than any has multiprocessors.
PROGRAMS = 512
# Tokens of every tile; None: what `blocks` finds best. The interpreter pays for operations, whatever their size.
TOKENS = 256 if triton.knobs.runtime.interpret else None


def tile(length: Sequence[int], tokens: int) -> tuple[int, int, int]:
    """A tile of up to `tokens` (at least 16) on axes of `length`: powers of two, as cubic as the axes allow."""
    sides = [1, 1, 1]
    while prod(sides) < tokens:
        open_axes = [i for i in range(3) if sides[i] < length[i]]
        if not open_axes:
            break
        sides[min(reversed(open_axes), key=sides.__getitem__)] *= 2
    sides[2] *= max(1, 16 // prod(sides))  # the least of a matrix product
    return sides[0], sides[1], sides[2]


def blocks(kernel: Any, length: Sequence[int], D: int, E: int, exact: bool) -> dict[str, Any]:
    """Tiles, warps and stages; `length` is that of the longest dilation group on each axis."""
    block_d, block_e = (max(16, triton.next_power_of_2(width)) for width in (D, E))
    wide = max(block_d, block_e)
    warps, sums_keys = 4 if wide <= 64 else 8, kernel in (fused._bwd_kv, fused._bwd_extra)
    if TOKENS:
        queries = keys = TOKENS
    elif exact:
        queries, keys = 32, 16 if wide > 32 or sums_keys else 32
        if wide > 64 and sums_keys:
            queries = 16
    elif sums_keys:
        queries, keys, warps = 32, 32 if wide > 32 else 64, 8 if kernel is fused._bwd_extra else 4
    else:
        queries, keys = 64, 32
    queries, keys = tile(length, queries), tile(length, keys)
    sizes = dict(
        QUERIES=queries,
        KEYS=keys,
        BLOCK_N=prod(queries),
        BLOCK_M=prod(keys),
        BLOCK_D=block_d,
        BLOCK_E=block_e,
    )
    sizes = {name: value for name, value in sizes.items() if name in kernel.arg_names}
    return sizes | dict(num_warps=warps, num_stages=1 if sums_keys and wide == 64 else 2)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    """Of (B, heads, *axes, D) with leading axes of length 1; zeros for what a kernel does not read."""
    return (0,) * 6 if x is None else x[(slice(None), slice(None), *[None] * (6 - x.ndim))].stride()


class Call:
    """What all kernels of one call take alike; sizes and options on three axes."""

    def __init__(
        self,
        x: Tensor,
        rpb: Tensor | None,
        kernel_size: Sequence[int],
        dilation: Sequence[int],
        stride: Sequence[int] | None = None,
        causal: Sequence[int] | None = None,
    ) -> None:
        self.B, self.heads, *spatial, _ = x.shape
        self.axes = len(spatial)
        missing = 3 - self.axes
        self.length, self.kernel, self.dilation, self.stride, self.causal = (
            (*[fill] * missing, *(given or [fill] * self.axes))
            for given, fill in ((spatial, 1), (kernel_size, 1), (dilation, 1), (stride, 1), (causal, 0))
        )
        self.rpb = None if rpb is None else rpb.contiguous()
        self.groups = [min(d, n) for d, n in zip(self.dilation, self.length, strict=True)]
        self.longest = [-(-n // d) for d, n in zip(self.dilation, self.length, strict=True)]

    @property
    def whole(self) -> bool:
        """Whether every window has all its keys."""
        return all(n // d >= k for n, d, k in zip(self.length, self.dilation, self.kernel, strict=True))

    def constants(self, kernel: Any, D: int, E: int, *inputs: Tensor) -> dict[str, Any]:
        exact = any(x.dtype == torch.float32 for x in inputs)
        sizes = blocks(kernel, self.longest, D, E, exact)
        same = all(x.dtype == inputs[0].dtype for x in inputs)
        first = dict(FIRST=3 - self.axes) if "FIRST" in kernel.arg_names else {}
        return sizes | first | dict(PRECISION="ieee" if exact and same else "tf32")

    def tiles(self, shape: tuple[int, int, int]) -> tuple[tuple[int, int, int], int]:
        """Tiles of a group on each axis, and of a head in all."""
        tiles = tuple(-(-n // side) for n, side in zip(self.longest, shape, strict=True))
        return (tiles[0], tiles[1], tiles[2]), prod(tiles) * prod(self.groups)

    def sizes(self, tiles: tuple[int, int, int]) -> tuple[Any, ...]:
        return self.length, self.kernel, self.dilation, self.stride, self.causal, tiles

    def run(
        self, kernel: Any, tensors: tuple[Any, ...], widths: tuple[int, ...], maps: tuple[Tensor | None, ...],
        own: str, constants: dict[str, Any],
    ) -> None:  # fmt: skip
        """Launches a program a tile of `own` ("QUERIES" or "KEYS") and head; the kernel takes strides of `maps`."""
        tiles, count = self.tiles(constants[own])
        strides = [_strides(x) for x in maps]
        kernel[count * self.B * self.heads,](
            *tensors, count, self.heads, *widths, *self.sizes(tiles), *strides, **constants
        )

    def extra(self, tensors: tuple[Tensor, ...], scale: float, constants: dict[str, Any]) -> list[Tensor]:
        """Gradients of the extra keys and values: `tensors` are grad, q, both of those, lse, delta."""
        grad, q, keys, values, lse, _ = tensors
        number, tokens = keys.shape[2], prod(self.length)
        blocks, pieces = triton.cdiv(number, constants["BLOCK_M"]), triton.cdiv(tokens, constants["BLOCK_N"])
        splits = min(pieces, triton.cdiv(PROGRAMS, max(1, blocks * self.B * self.heads)))
        per_program = triton.cdiv(pieces, splits) * constants["BLOCK_N"]
        splits = triton.cdiv(tokens, per_program)
        parts = [x.new_empty(splits, *x.shape, dtype=torch.float32) for x in (keys, values)]
        fused._bwd_extra[blocks, self.B * self.heads, splits](
            *tensors, *parts, scale, q.shape[-1], values.shape[-1], number, self.heads, self.length, tokens, per_program,
            *map(_strides, (grad, q, lse[..., None], keys, values)), **constants,
        )  # fmt: skip
        return [part.sum(0).to(keys.dtype) for part in parts]

    def table(self, tensors: tuple[Any, ...], scale: float, constants: dict[str, Any]) -> Tensor:
        """Gradient of the bias table: `tensors` are grad, q, k, v, lse, delta, weights; some may be None."""
        tiles, count = self.tiles(constants["QUERIES"])
        spans = zip(constants["QUERIES"], constants["KEYS"], self.kernel, strict=True)
        walk = tuple(-(-(n + 2 * kernel - 2) // m) for n, m, kernel in spans)
        units = count * self.B
        splits = max(1, min(units, triton.cdiv(PROGRAMS, prod(walk) * self.heads)))
        per_program = triton.cdiv(units, splits)
        sample = next(x for x in tensors if x is not None)
        shape = (splits, self.heads, prod(walk), constants["BLOCK_N"], constants["BLOCK_M"])
        parts = sample.new_empty(shape, dtype=torch.float32)
        grad, q, k, v, lse, delta, weights = tensors
        maps = (grad, q, k, v, None if lse is None else lse[..., None], weights)
        strides = [_strides(x) for x in maps]
        widths = (0, 0) if q is None else (q.shape[-1], v.shape[-1])
        halves._table[prod(walk), self.heads, splits](
            grad, q, k, v, None if q is None else self.rpb, lse, delta, weights, parts, scale,
            count, self.heads, *widths, *self.sizes(tiles), *strides, walk, units, per_program,
            STORED=weights is not None, **constants,
        )  # fmt: skip
        place = self.places(walk, constants, sample.device)
        table = parts.new_zeros(self.heads, prod(2 * kernel - 1 for kernel in self.kernel) + 1)
        table.index_add_(1, place, parts.sum(0).flatten(1))
        return table[:, :-1].reshape(self.rpb.shape).to(self.rpb.dtype)

    def places(self, walk: Sequence[int], constants: dict[str, Any], device: torch.device) -> Tensor:
        """Which entry of the bias table each entry of the kernel's matrices stands for; none is one beyond the last."""
        place, inside = 0, True
        for axis, (n, m, steps) in enumerate(zip(constants["QUERIES"], constants["KEYS"], walk, strict=True)):
            step, query, key = (torch.arange(size, device=device) for size in (steps, n, m))
            row = step[:, None, None] * m + key - query[:, None]  # key - query + kernel - 1
            rows = 2 * self.kernel[axis] - 1
            shape = [1] * 9
            shape[axis], shape[3 + axis], shape[6 + axis] = row.shape
            row = row.view(shape)
            place, inside = place * rows + row, inside & (row >= 0) & (row < rows)
        return place.where(inside, prod(2 * kernel - 1 for kernel in self.kernel)).flatten()
