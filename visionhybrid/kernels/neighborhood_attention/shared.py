"""One set of attention weights for several maps of values, on a CPU: weights stay dense, by tile.

`neighborhood_scores` and `neighborhood_aggregate` exchange compact weights, one for each key a query sees. Those are picked out of
the dense scores of a tile, and spread again for every map of values, which costs more than the matrix products. Here the dense
weights of `tiled.py`'s tiles are what is kept, also for the gradients: ((T + K - 1) / K)^2 times the memory, maps (two axes) only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionhybrid.kernels.neighborhood_attention import tiled
from visionhybrid.kernels.neighborhood_attention.geometry import Axis, Tiles, axes_of, tiles
from visionhybrid.kernels.operators import count_operations, end_of_derivatives, register
from visionhybrid.kernels.precision import wide, widened


def unsupported(*maps: Tensor) -> str | None:
    """Why these tensors cannot go through dense weights."""
    if any(x.device.type != "cpu" for x in maps):
        return "CPU only"
    if any(
        type(x) not in (Tensor, torch.nn.Parameter) for x in maps
    ):  # fake ones would get into the tables kept here
        return "plain tensors only"
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


def _put(tiles: Tensor, axes: tuple[Axis, ...], like: Tensor) -> Tensor:
    """Queries of tiles (B * heads * tiles, run, D) on a map of the shape and type of `like`; repeated ones are dropped."""
    matrix, rows = _rows(tiles.view(*like.shape[:2], -1, like.shape[-1]), _places(axes))
    return matrix.index_select(0, rows).view(like.shape).to(like.dtype)


def _cut(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """The transpose of `_put`: (B, heads, H, W, D) -> (B * heads * tiles, run, D), repeated queries 0."""
    pixels = _pixels(axes, "query")
    out = x.new_zeros(*x.shape[:2], *pixels.shape, x.shape[-1], dtype=widened(x))
    matrix, rows = _rows(out, _places(axes))
    matrix.index_copy_(0, rows, wide(x).reshape(-1, x.shape[-1]))
    return matrix.view(-1, pixels.shape[1], x.shape[-1])


def _add(tiles: Tensor, axes: tuple[Axis, ...], like: Tensor) -> Tensor:
    """The transpose of `_take` of keys: (B * heads * tiles, run, D), summed on a map of the shape and type of `like`."""
    total = torch.zeros(like.shape, dtype=tiles.dtype)
    matrix, rows = _rows(total, _pixels(axes, "key").flatten())
    matrix.index_add_(0, rows, tiles.flatten(0, 1))
    return total.to(like.dtype)


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
        out[some] = _put(weights[some].flatten(0, 1) @ _take(v[some], axes, "key"), axes, v[some])
    return out


@partial(register, "neighborhood_shared_weights_backward")
def _weights_backward(
    grad: Tensor,
    weights: Tensor,
    q: Tensor,
    k: Tensor,
    rpb: Tensor,
    rpb_learns: bool,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    axes = axes_of(q.shape[2:-1], kernel_size, dilation)
    dq, dk = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    summed = torch.zeros_like(weights[0]) if rpb_learns and len(q) else None
    for some in _images(weights) if len(q) else ():
        p = weights[some]
        ds = torch._softmax_backward_data(grad[some], p, -1, p.dtype)
        if summed is not None:
            summed += ds.sum(0)
        ds = ds.flatten(0, 1)
        dq[some] = _put(ds @ _take(k[some], axes, "key") * scale, axes, q[some])
        dk[some] = _add(ds.mT @ _take(q[some], axes, "query") * scale, axes, k[some])
    return dq, dk, rpb.new_empty(0) if not rpb_learns else _table_gradient(summed, rpb, axes)


def _table_gradient(summed: Tensor | None, rpb: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Gradients of scores (heads * tiles, T, R), summed over the images, collected in the table."""
    if summed is None:
        return torch.zeros_like(rpb, memory_format=torch.contiguous_format)
    entries, kind = _patterns(axes)
    of_kind = summed.new_zeros(len(rpb), *entries.shape)
    of_kind.index_add_(1, kind, summed.view(len(rpb), -1, *entries.shape[1:]))
    table = summed.new_zeros(len(rpb), rpb[0].numel() + 1)
    table.scatter_add_(1, entries.flatten().expand(len(rpb), -1), of_kind.flatten(1))
    return table[:, :-1].reshape(rpb.shape).to(rpb.dtype)


@partial(register, "neighborhood_shared_aggregate_backward")
def _aggregate_backward(
    grad: Tensor, weights: Tensor, v: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, Tensor]:
    axes = axes_of(v.shape[2:-1], kernel_size, dilation)
    dweights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    for some in _images(weights) if len(v) else ():
        g = _cut(grad[some], axes)
        torch.bmm(g, _take(v[some], axes, "key").mT, out=dweights[some].flatten(0, 1))
        dv[some] = _add(weights[some].flatten(0, 1).mT @ g, axes, v[some])
    return dweights, dv


@weights_op.register_fake
def _(q, k, rpb, kernel_size, dilation, scale):
    axes = axes_of(q.shape[2:-1], kernel_size, dilation)
    queries, keys = _pixels(axes, "query"), _pixels(axes, "key")
    shape = q.shape[0], q.shape[1] * len(keys), queries.shape[1], keys.shape[1]
    return q.new_empty(shape, dtype=widened(q))


@aggregate_op.register_fake
def _(weights, v, kernel_size, dilation):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@_weights_backward.register_fake
def _(grad, weights, q, k, rpb, rpb_learns, kernel_size, dilation, scale):
    dq, dk, drpb = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, rpb))
    return dq, dk, drpb if rpb_learns else rpb.new_empty(0)


@_aggregate_backward.register_fake
def _(grad, weights, v, kernel_size, dilation):
    dweights, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (weights, v))
    return dweights, dv


def _save_weights(ctx: Any, inputs: Any, output: Tensor) -> None:
    q, k, rpb, *ctx.options = inputs
    ctx.save_for_backward(output, q, k, rpb)


def _differentiate_weights(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, q, k, rpb = ctx.saved_tensors
    learns = ctx.needs_input_grad[2]
    dq, dk, drpb = _weights_backward(grad.contiguous(), weights, q, k, rpb, learns, *ctx.options)
    return dq, dk, drpb if learns else None, None, None, None


def _save_aggregate(ctx: Any, inputs: Any, output: Tensor) -> None:
    weights, v, *ctx.options = inputs
    ctx.save_for_backward(weights, v)


def _differentiate_aggregate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_aggregate_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options), None, None


weights_op.register_autograd(_differentiate_weights, setup_context=_save_weights)
aggregate_op.register_autograd(_differentiate_aggregate, setup_context=_save_aggregate)
end_of_derivatives(_weights_backward, "shared neighborhood weights")
end_of_derivatives(_aggregate_backward, "shared neighborhood weights")


# What the definition needs, as for the two halves: tiles multiply more.
@count_operations("neighborhood_shared_weights")
def _(q, k, rpb, kernel_size, dilation, *args, **kwargs):
    return 2 * q[0] * q[1] * _pairs(q[2:-1], kernel_size, dilation) * q[-1]


@count_operations("neighborhood_shared_aggregate")
def _(weights, v, kernel_size, dilation, *args, **kwargs):
    return 2 * v[0] * v[1] * _pairs(v[2:-1], kernel_size, dilation) * v[-1]


@count_operations("neighborhood_shared_weights_backward")
def _(grad, weights, q, k, rpb, rpb_learns, kernel_size, dilation, *args, **kwargs):
    return 4 * q[0] * q[1] * _pairs(q[2:-1], kernel_size, dilation) * q[-1]


@count_operations("neighborhood_shared_aggregate_backward")
def _(grad, weights, v, kernel_size, dilation, *args, **kwargs):
    return 4 * v[0] * v[1] * _pairs(v[2:-1], kernel_size, dilation) * v[-1]


def _pairs(sides: Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]) -> int:
    """Pairs of a query and a key it sees."""
    rows, columns = (int(t.allowed[t.real].sum()) for t in _tiles(axes_of(sides, kernel_size, dilation)))
    return rows * columns


weights, aggregate = weights_op, aggregate_op
