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

from visionhybrid.kernels.neighborhood_attention import ops, tiled
from visionhybrid.kernels.neighborhood_attention.geometry import Axis, Tiles, axes_of, tiles
from visionhybrid.kernels.operators import count_operations, end_of_derivatives, register
from visionhybrid.kernels.precision import wide, widened

# Weights made at a time, 4 MB in float32. Keys that large maps copy for all tiles at once take longer than the products.
# (Measured: 1 M beats 0.1 M, 2 M and everything at once.)
BUDGET = 1_000_000


def unsupported(*maps: Tensor) -> str | None:
    """Why these tensors cannot go through dense weights."""
    if any(x.device.type != "cpu" for x in maps):
        return "CPU only"
    # Fake ones would get into the tables that are kept here.
    if any(type(x) not in (Tensor, torch.nn.Parameter) for x in maps):
        return "plain tensors only"
    return None


def _tiles(axes: Sequence[Axis]) -> tuple[Tiles, Tiles]:
    rows, columns = (tiles(axis, tiled.tile_size(axis)) for axis in axes)
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
    """What tiles see, each kind once, since most are alike, and the kind of each tile.

    Returns: (kinds, T, R) entries of the flattened relative position table, one past its end where a key is not seen; (tiles,) kinds.
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


def _matrix(x: Tensor) -> Tensor:
    """(B, heads, H, W, D) -> (B * heads * H * W, D): rows of a matrix are picked five times as fast as slices along inner axes."""
    return wide(x).reshape(-1, x.shape[-1])


def _chunks(weights: Tensor) -> Iterator[slice]:
    """So many tiles at a time that their weights stay within `BUDGET`."""
    step = max(1, BUDGET // weights[0].numel()) if len(weights) else 1
    return (slice(i, min(i + step, len(weights))) for i in range(0, len(weights), step))


def _rows(axes: tuple[Axis, ...], name: str, some: slice) -> Tensor:
    """Rows of `_matrix` that the queries or keys of `some` tiles are; tiles are counted over images, heads and places."""
    pixels = _pixels(axes, name)
    tile = torch.arange(some.start, some.stop)
    first = tile // len(pixels) * (axes[0].length * axes[1].length)
    return (first[:, None] + pixels[tile % len(pixels)]).flatten()


def _take(matrix: Tensor, axes: tuple[Axis, ...], name: str, some: slice) -> Tensor:
    """(tiles, run, D): the queries or keys of `some` tiles."""
    return matrix.index_select(0, _rows(axes, name, some)).view(some.stop - some.start, -1, matrix.shape[-1])


def _among_queries(axes: tuple[Axis, ...], maps: int, queries: int) -> Tensor:
    """Where each row of `_matrix` stands among all queries of `maps` maps, `queries` a map."""
    return (torch.arange(maps)[:, None] * queries + _places(axes)).flatten()


def _put(tiles: Tensor, axes: tuple[Axis, ...], like: Tensor) -> Tensor:
    """Queries (tiles, run, D) on a map of the shape and type of `like`; repeated ones are dropped."""
    maps = like.shape[0] * like.shape[1]
    rows = _among_queries(axes, maps, tiles.shape[0] * tiles.shape[1] // max(maps, 1))
    return tiles.flatten(0, 1).index_select(0, rows).view(like.shape).to(like.dtype)


def _cut(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """The transpose of `_put`: a map -> queries (tiles, run, D), repeated ones 0."""
    pixels, maps = _pixels(axes, "query"), x.shape[0] * x.shape[1]
    out = torch.zeros(maps * pixels.numel(), x.shape[-1], dtype=widened(x))
    out.index_copy_(0, _among_queries(axes, maps, pixels.numel()), _matrix(x))
    return out.view(-1, pixels.shape[1], x.shape[-1])


def _of_tiles(kind: Tensor, kinds: int, images: int, heads: int) -> Tensor:
    """Which of the (heads * kinds) patterns each tile has."""
    return (torch.arange(heads)[:, None] * kinds + kind).flatten().repeat(images)


@partial(register, "neighborhood_shared_weights")
def weights(
    q: Tensor, k: Tensor, rpb: Tensor, kernel_size: Sequence[int], dilation: Sequence[int], scale: float
) -> Tensor:
    axes = axes_of(q.shape[2:-1], kernel_size, dilation)
    entries, kind = _patterns(axes)
    table = F.pad(rpb.to(widened(q)).flatten(1), (0, 1), value=float("-inf"))
    bias = table.index_select(1, entries.flatten()).view(-1, *entries.shape[1:])  # (heads * kinds, T, R)
    pattern = _of_tiles(kind, len(entries), *q.shape[:2])
    out = bias.new_empty(len(pattern), *entries.shape[1:])
    queries, keys = _matrix(q), _matrix(k)
    for some in _chunks(out):
        p = out[some]
        torch.index_select(bias, 0, pattern[some], out=p)
        p.baddbmm_(_take(queries, axes, "query", some), _take(keys, axes, "key", some).mT, alpha=scale)
        torch.softmax(p, -1, out=p)
    return out.view(q.shape[0], -1, *entries.shape[1:])


@partial(register, "neighborhood_shared_aggregate")
def aggregate(weights: Tensor, v: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]) -> Tensor:
    axes = axes_of(v.shape[2:-1], kernel_size, dilation)
    weights, values = weights.flatten(0, 1), _matrix(v)
    tiles = values.new_empty(*weights.shape[:2], v.shape[-1])
    for some in _chunks(weights):
        torch.bmm(weights[some], _take(values, axes, "key", some), out=tiles[some])
    return _put(tiles, axes, v)


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
    entries, kind = _patterns(axes)
    pattern = _of_tiles(kind, len(entries), *q.shape[:2])
    grad, weights, queries, keys = grad.flatten(0, 1), weights.flatten(0, 1), _matrix(q), _matrix(k)
    dq, dk = queries.new_empty(*weights.shape[:2], q.shape[-1]), torch.zeros_like(keys)
    dbias = weights.new_zeros(len(rpb) * len(entries), entries[0].numel())
    for some in _chunks(weights):
        ds = torch._softmax_backward_data(grad[some], weights[some], -1, weights.dtype)
        if rpb_learns:
            dbias.index_add_(0, pattern[some], ds.flatten(1))
        torch.bmm(ds, _take(keys, axes, "key", some), out=dq[some])
        dk.index_add_(
            0, _rows(axes, "key", some), (ds.mT @ _take(queries, axes, "query", some)).flatten(0, 1)
        )
    drpb = _collected(dbias, entries, rpb) if rpb_learns else rpb.new_empty(0)
    return _put(dq.mul_(scale), axes, q), dk.mul_(scale).view(k.shape).to(k.dtype), drpb


def _collected(dbias: Tensor, entries: Tensor, rpb: Tensor) -> Tensor:
    """Gradients of the scores of every pattern (heads * kinds, T * R), summed where they have one entry of the table."""
    table = dbias.new_zeros(len(rpb), rpb[0].numel() + 1)
    table.scatter_add_(1, entries.flatten().expand(len(rpb), -1), dbias.view(len(rpb), -1))
    return table[:, :-1].reshape(rpb.shape).to(rpb.dtype)


@partial(register, "neighborhood_shared_aggregate_backward")
def _aggregate_backward(
    grad: Tensor, weights: Tensor, v: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, Tensor]:
    axes = axes_of(v.shape[2:-1], kernel_size, dilation)
    dweights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    flat, into, values, g = weights.flatten(0, 1), dweights.flatten(0, 1), _matrix(v), _cut(grad, axes)
    dv = torch.zeros_like(values)
    for some in _chunks(flat):
        torch.bmm(g[some], _take(values, axes, "key", some).mT, out=into[some])
        dv.index_add_(0, _rows(axes, "key", some), (flat[some].mT @ g[some]).flatten(0, 1))
    return dweights, dv.view(v.shape).to(v.dtype)


@weights.register_fake
def _(q, k, rpb, kernel_size, dilation, scale):
    axes = axes_of(q.shape[2:-1], kernel_size, dilation)
    queries, keys = _pixels(axes, "query"), _pixels(axes, "key")
    shape = q.shape[0], q.shape[1] * len(keys), queries.shape[1], keys.shape[1]
    return q.new_empty(shape, dtype=widened(q))


@aggregate.register_fake
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


weights.register_autograd(_differentiate_weights, setup_context=_save_weights)
aggregate.register_autograd(_differentiate_aggregate, setup_context=_save_aggregate)
end_of_derivatives(_weights_backward, "shared neighborhood weights")
end_of_derivatives(_aggregate_backward, "shared neighborhood weights")


# What the definition needs, as for the two halves: tiles multiply more.
@count_operations("neighborhood_shared_weights")
def _(q, k, rpb, kernel_size, dilation, *args, **kwargs):
    return 2 * ops.pairs(q, kernel_size, dilation) * q[-1]


@count_operations("neighborhood_shared_aggregate")
def _(weights, v, kernel_size, dilation, *args, **kwargs):
    return 2 * ops.pairs(v, kernel_size, dilation) * v[-1]


@count_operations("neighborhood_shared_weights_backward")
def _(grad, weights, q, k, rpb, rpb_learns, kernel_size, dilation, *args, **kwargs):
    return 4 * ops.pairs(q, kernel_size, dilation) * q[-1]


@count_operations("neighborhood_shared_aggregate_backward")
def _(grad, weights, v, kernel_size, dilation, *args, **kwargs):
    return 4 * ops.pairs(v, kernel_size, dilation) * v[-1]
