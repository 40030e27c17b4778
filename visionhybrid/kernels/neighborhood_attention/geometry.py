"""Which keys a query sees, one axis at a time: windows for the definition, tiles for the fast path.

An axis of `length` positions with dilation `D` falls apart into `D` groups (positions of equal remainder mod D) that never
see each other. Inside a group of `m` positions the query at index `p` sees the keys `lo(p) .. hi(p) - 1`:

    leader   c  = min((p // stride) * stride + stride // 2, m - 1)
    window   lo = clamp(c - kernel // 2, 0, max(m - kernel, 0)),  hi = min(lo + kernel, m)
    causal   c  = min((p // stride) * stride + stride - 1, m - 1),  lo = max(c - kernel + 1, 0),  hi = p + 1

At a border the window is shifted, not cut. A group shorter than the kernel is seen whole (a2mamba.md section 10). The row of
the relative position table is `key - query + kernel - 1`, in units of the dilation. With stride 1 this is NATTEN 0.17, with
strides and causal axes NATTEN 0.20 and later ("generalised neighbourhood attention", arXiv:2504.16922).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One axis of a neighbourhood; `length` in positions, `kernel` and `stride` in steps of `dilation`."""

    length: int
    kernel: int
    dilation: int = 1
    stride: int = 1
    causal: bool = False


def axes_of(
    spatial: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int] | None = None,
    causal: Sequence[int] | None = None,
) -> tuple[Axis, ...]:
    """One `Axis` per spatial side of a map."""
    ones, zeros = [1] * len(spatial), [0] * len(spatial)
    options = zip(spatial, kernel_size, dilation, stride or ones, causal or zeros, strict=True)
    return tuple(Axis(int(n), k, d, s, bool(c)) for n, k, d, s, c in options)


@dataclass(frozen=True)
class Windows:
    """Per query: its keys, in window order. A slot that holds no key (short group, causal) is not `valid`."""

    index: Tensor  # (N, kernel) positions of keys
    valid: Tensor  # (N, kernel) bool
    row: Tensor  # (N, kernel) row of the relative position table


@dataclass(frozen=True)
class Tiles:
    """Queries in runs of equal length T, each with one run of R keys that covers all their windows."""

    query: Tensor  # (tiles, T) positions; a run that ends early repeats its last query
    key: Tensor  # (tiles, R) positions
    allowed: Tensor  # (tiles, T, R) bool; a repeated query keeps its window, so that softmax stays finite
    row: Tensor  # (tiles, T, R) row of the relative position table, 0 where not allowed
    slot: Tensor  # (tiles, T, kernel) place in the run of R of each slot of `Windows`
    valid: Tensor  # (tiles, T, kernel) as in `Windows`
    place: Tensor  # (N,) where each position stands in `query.flatten()`
    real: Tensor  # (tiles, T) bool, False for repeated queries


def _bounds(axis: Axis) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(group, index in group, group length, lo, hi) of every position."""
    x = torch.arange(axis.length)
    group, p = x % axis.dilation, x // axis.dilation
    m = (axis.length - group + axis.dilation - 1) // axis.dilation
    block = p // axis.stride * axis.stride
    if axis.causal:
        leader = torch.minimum(block + axis.stride - 1, m - 1)
        return group, p, m, (leader - axis.kernel + 1).clamp(min=0), p + 1
    leader = torch.minimum(block + axis.stride // 2, m - 1)
    lo = torch.minimum((leader - axis.kernel // 2).clamp(min=0), (m - axis.kernel).clamp(min=0))
    return group, p, m, lo, torch.minimum(lo + axis.kernel, m)


# What is kept for later calls must not be an inference tensor: autograd could not save it.
@lru_cache(maxsize=256)
@torch.inference_mode(False)
def windows(axis: Axis) -> Windows:
    """The definition: every query's keys along one axis."""
    group, p, m, lo, hi = _bounds(axis)
    key = lo[:, None] + torch.arange(axis.kernel)
    index = torch.minimum(key, (m - 1)[:, None]) * axis.dilation + group[:, None]
    row = (key - p[:, None] + axis.kernel - 1).clamp(0, 2 * axis.kernel - 2)
    return Windows(index=index, valid=key < hi[:, None], row=row)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def tiles(axis: Axis, size: int) -> Tiles:
    """The axis cut into runs of at most `size` queries of one group."""
    group, p, m, lo, hi = _bounds(axis)
    runs = []
    for g in range(min(axis.dilation, axis.length)):
        members = torch.arange(g, axis.length, axis.dilation)
        runs += list(members.split(size))
    width = max(len(run) for run in runs)
    query = torch.stack([run[torch.arange(width).clamp(max=len(run) - 1)] for run in runs])
    real = torch.stack([torch.arange(width) < len(run) for run in runs])
    first = lo[query].amin(1)
    reach = int((hi[query].amax(1) - first).max())
    key = first[:, None] + torch.arange(reach)  # index in group
    allowed = (key[:, None] >= lo[query][..., None]) & (key[:, None] < hi[query][..., None])
    row = ((key[:, None] - p[query][..., None]) + axis.kernel - 1).where(
        allowed, torch.zeros((), dtype=torch.long)
    )
    slot = (lo[query] - first[:, None])[..., None] + torch.arange(axis.kernel)
    last = m[query[:, 0]] - 1
    place = torch.empty(axis.length, dtype=torch.long)
    place[query[real]] = torch.arange(query.numel())[real.flatten()]
    return Tiles(
        query=query,
        key=torch.minimum(key, last[:, None]) * axis.dilation + group[query[:, :1]],
        allowed=allowed,
        row=row,
        slot=slot.clamp(max=reach - 1),
        valid=windows(axis).valid[query],
        place=place,
        real=real,
    )
