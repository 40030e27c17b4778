"""One set of attention weights for several maps of values, at inference on a CPU: weights stay dense, by tile.

`neighborhood_scores` and `neighborhood_aggregate` exchange compact weights, one for each key a query sees. Those are picked out of
the dense scores of a tile, and spread again for every map of values, which costs more than the matrix products. Here the dense
weights of `tiled.py`'s tiles are what is kept: ((T + K - 1) / K)^2 times the memory, no gradients, maps (two axes) only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from visionhybrid.kernels.neighborhood_attention import tiled
from visionhybrid.kernels.neighborhood_attention.geometry import Axis, Tiles, axes_of, tiles
from visionhybrid.kernels.operators import count_operations, register
from visionhybrid.kernels.precision import wide, widened


def unsupported(*maps: Tensor) -> str | None:
    """Why these tensors cannot go through dense weights."""
    if any(x.device.type != "cpu" for x in maps):
        return "CPU only"
    if torch.is_grad_enabled() and any(x.requires_grad for x in maps):
        return "no gradients"
    return None


def _tiles(axes: Sequence[Axis]) -> tuple[Tiles, Tiles]:
    rows, columns = (tiles(axis, tiled._tile_size(axis)) for axis in axes)
    return rows, columns


@lru_cache(maxsize=64)
def _pixels(axes: tuple[Axis, ...], name: str) -> Tensor:
    """(tiles, run) raster numbers of the queries or keys of each tile."""
    rows, columns = (getattr(t, name) for t in _tiles(axes))
    pixels = rows[:, None, :, None] * axes[1].length + columns[None, :, None]
    return pixels.flatten(2).flatten(0, 1)


@lru_cache(maxsize=64)
def _places(axes: tuple[Axis, ...]) -> Tensor:
    """(H * W,) where each pixel stands among the queries of all tiles."""
    rows, columns = _tiles(axes)
    (i, a), (j, b) = ((t.place // t.query.shape[1], t.place % t.query.shape[1]) for t in (rows, columns))
    tile = i[:, None] * len(columns.query) + j
    within = a[:, None] * columns.query.shape[1] + b
    return (tile * rows.query.shape[1] * columns.query.shape[1] + within).flatten()


@lru_cache(maxsize=64)
def _patterns(axes: tuple[Axis, ...]) -> tuple[Tensor, Tensor]:
    """What tiles see, each kind once, since most are alike: (kinds, T, R) entries of the flattened relative position table, one past
    its end where a key is not seen; and (tiles,) the kind of each tile.
    """
    found = []
    for t in _tiles(axes):
        seen = t.row.where(t.allowed, -1)  # (tiles, T, R)
        kinds, kind = torch.unique(seen.flatten(1), dim=0, return_inverse=True)
        found.append((kinds.view(-1, *seen.shape[1:]), kind))
    (rows, row_kind), (columns, column_kind) = found
    rows, columns = rows[:, None, :, None, :, None], columns[None, :, None, :, None]
    width = 2 * axes[1].kernel - 1
    entries = (rows * width + columns).where((rows >= 0) & (columns >= 0), (2 * axes[0].kernel - 1) * width)
    kind = row_kind[:, None] * columns.shape[1] + column_kind
    return entries.flatten(4).flatten(2, 3).flatten(0, 1), kind.flatten()


def _rows(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """All rows of x (B, heads, ..., D) as one matrix, and the numbers of those that `index` takes of each head.

    Rows of one contiguous matrix are picked five times as fast as slices along an inner axis.
    """
    matrix = x.reshape(-1, x.shape[-1])
    heads = torch.arange(x.shape[0] * x.shape[1], device=x.device) * (
        len(matrix) // (x.shape[0] * x.shape[1])
    )
    return matrix, (heads[:, None] + index).flatten()


def _take(x: Tensor, axes: tuple[Axis, ...], name: str) -> Tensor:
    """(B, heads, H, W, D) -> (B * heads * tiles, run, D)."""
    pixels = _pixels(axes, name)
    matrix, rows = _rows(wide(x), pixels.flatten())
    return matrix.index_select(0, rows).view(-1, pixels.shape[1], x.shape[-1])


def _images(weights: Tensor) -> Iterator[slice]:
    """So many images at a time that their weights stay within `tiled.BUDGET`."""
    step = max(1, tiled.BUDGET // weights[0].numel())
    return (slice(i, i + step) for i in range(0, weights.shape[0], step))


@partial(register, "neighborhood_shared_weights")
def weights_op(
    q: Tensor, k: Tensor, rpb: Tensor, kernel_size: Sequence[int], dilation: Sequence[int], scale: float
) -> Tensor:
    axes = axes_of(q.shape[2:-1], kernel_size, dilation)
    entries, kind = _patterns(axes)
    table = F.pad(rpb.to(widened(q)).flatten(1), (0, 1), value=float("-inf"))
    bias = table.index_select(1, entries.flatten()).view(-1, *entries.shape[1:])  # (heads * kinds, T, R)
    heads = torch.arange(q.shape[1])[:, None] * len(entries)
    rows = (heads + kind).flatten()
    out = bias.new_empty(q.shape[0], len(rows), *entries.shape[1:])
    for some in _images(out) if len(q) else ():
        p = out[some]
        for image in p:
            torch.index_select(bias, 0, rows, out=image)
        keys = _take(k[some], axes, "key").mT
        p.flatten(0, 1).baddbmm_(_take(q[some], axes, "query"), keys, alpha=scale)
        torch.softmax(p, -1, out=p)
    return out


@partial(register, "neighborhood_shared_aggregate")
def aggregate_op(weights: Tensor, v: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]) -> Tensor:
    axes = axes_of(v.shape[2:-1], kernel_size, dilation)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for some in _images(weights) if len(v) else ():
        tile = weights[some].flatten(0, 1) @ _take(v[some], axes, "key")
        matrix, rows = _rows(tile.view(*v[some].shape[:2], -1, v.shape[-1]), _places(axes))
        out[some] = matrix.index_select(0, rows).view(out[some].shape)
    return out


@weights_op.register_fake
def _(q, k, rpb, kernel_size, dilation, scale):
    axes = axes_of(q.shape[2:-1], kernel_size, dilation)
    queries, keys = _pixels(axes, "query"), _pixels(axes, "key")
    shape = q.shape[0], q.shape[1] * len(keys), queries.shape[1], keys.shape[1]
    return q.new_empty(shape, dtype=widened(q))


@aggregate_op.register_fake
def _(weights, v, kernel_size, dilation):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


# What the definition needs, as for the two halves: tiles multiply more.
@count_operations("neighborhood_shared_weights")
def _(q, k, rpb, kernel_size, dilation, *args, **kwargs):
    return 2 * q[0] * q[1] * _pairs(q[2:-1], kernel_size, dilation) * q[-1]


@count_operations("neighborhood_shared_aggregate")
def _(weights, v, kernel_size, dilation, *args, **kwargs):
    return 2 * v[0] * v[1] * _pairs(v[2:-1], kernel_size, dilation) * v[-1]


def _pairs(sides: Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]) -> int:
    """Pairs of a query and a key it sees."""
    rows, columns = (int(t.allowed[t.real].sum()) for t in _tiles(axes_of(sides, kernel_size, dilation)))
    return rows * columns


weights, aggregate = weights_op, aggregate_op
