"""The two halves of neighbourhood attention as operations that ONNX knows, for maps whose sides are known only when they run.

Every query's keys are gathered, so memory is that of the definition: slots * D numbers a query.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionhybrid.kernels.neighborhood_attention.reference import outer
from visionhybrid.kernels.precision import wide


def _windows(length: int, kernel: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(positions, validity, table rows) of an axis' keys, each (length, kernel): `geometry.windows` without its cache."""
    x = torch.arange(length, device=device)
    p = x // dilation
    group = x - p * dilation  # ONNX has no remainder by a symbol
    m = (length - group + dilation - 1) // dilation
    lo = torch.minimum((p - kernel // 2).clamp(min=0), (m - kernel).clamp(min=0))
    key = lo[:, None] + torch.arange(kernel, device=device)
    last = m[:, None] - 1
    row = (key - p[:, None] + kernel - 1).clamp(0, 2 * kernel - 2)
    return torch.minimum(key, last) * dilation + group[:, None], key <= last, row


def _all_windows(
    x: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    sides = zip(x.shape[2:-1], kernel_size, dilation, strict=True)
    return [_windows(length, k, d, x.device) for length, k, d in sides]


def _neighbours(x: Tensor, index: Sequence[Tensor], kernel_size: Sequence[int]) -> Tensor:
    """(B, heads, *spatial, D) -> (B, heads, *spatial, slots, D)."""
    n = len(index)
    for i, (part, kernel) in enumerate(zip(index, kernel_size, strict=True)):
        dim = 2 + 2 * i
        x = x.index_select(dim, part.flatten()).unflatten(dim, (-1, kernel))
    order = [2 + 2 * i for i in range(n)] + [3 + 2 * i for i in range(n)]
    return x.permute(0, 1, *order, -1).flatten(2 + n, 1 + 2 * n)


def scores(
    q: Tensor,
    k: Tensor,
    rpb: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
) -> Tensor:
    """See `neighborhood_scores`."""
    index, valid, row = zip(*_all_windows(q, kernel_size, dilation), strict=True)
    keys = _neighbours(wide(k), index, kernel_size)
    out = (keys @ (wide(q) * scale).unsqueeze(-1)).squeeze(-1)
    if rpb is not None:
        below, place = 1, []
        for part, kernel in zip(reversed(row), reversed(kernel_size), strict=True):
            place.insert(0, part * below)
            below *= 2 * kernel - 1
        table = outer(place, torch.add)
        out = out + wide(rpb).flatten(1).index_select(1, table.flatten()).view(-1, *table.shape)
    return out.masked_fill(~outer(valid, torch.logical_and), float("-inf")).to(q.dtype)


def aggregate(weights: Tensor, v: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """See `neighborhood_aggregate`."""
    index, valid, _ = zip(*_all_windows(v, kernel_size, dilation), strict=True)
    weights = wide(weights).masked_fill(~outer(valid, torch.logical_and), 0.0)
    return (weights.unsqueeze(-2) @ _neighbours(wide(v), index, kernel_size)).squeeze(-2).to(v.dtype)
