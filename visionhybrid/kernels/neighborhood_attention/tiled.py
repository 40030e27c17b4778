"""The arithmetic of the CPU path: dense matrix products over tiles of queries and the rectangle of keys that covers their windows.

Neighbouring queries share most of their keys. A tile of T x T queries needs at most (T + K - 1)^2 keys, read once; what a
query must not see is masked. That is ((T + K - 1) / K)^2 times the multiply-adds of the definition, at the speed of a matrix
product and without a gathered copy per query. Score buffers are bounded by `BUDGET`: rows of tiles go one chunk after another.
Everything accumulates in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from visionhybrid.kernels.neighborhood_attention.geometry import Axis, Tiles, tiles
from visionhybrid.kernels.neighborhood_attention.reference import allowed, table_index
from visionhybrid.kernels.precision import wide

BUDGET = 2_000_000  # score elements alive at a time; 8 MB in float32


def tile_size(axis: Axis) -> int:
    """Queries per tile: short axes whole, else about two thirds of the kernel and at most 8.

    (Measured: 7 for 11 beats 8, 10 and 14; 8 beats 4, 10 and 16 for 15 and 31.)

    With strides whole groups of queries that share a window: a tile of blocked attention then has no key too many.
    """
    length = -(-axis.length // axis.dilation)
    target = min(max(2 * axis.kernel // 3, 4), 8)
    if axis.stride > 1:
        return min(length, max(target // axis.stride, 1) * axis.stride)
    return length if length <= max(axis.kernel, 8) else -(-length // -(-length // target))


class Plan:
    """The tiles of every axis, and how maps enter and leave them."""

    def __init__(self, axes: Sequence[Axis], device: torch.device) -> None:
        self.axes = axes
        parts = [tiles(axis, tile_size(axis)) for axis in axes]
        self.tiles = [
            Tiles(**{name: value.to(device) for name, value in vars(part).items()}) for part in parts
        ]
        self.grid = [len(t.query) for t in self.tiles]

    def chunks(self, batch: int, extra: int = 0) -> Iterator[slice]:
        """Slices of the first axis' tiles, each with at most `BUDGET` scores (or one row of tiles).

        `extra` keys stand beside those of each tile.
        """
        queries, keys = (prod(t.allowed.shape[i] for t in self.tiles) for i in (1, 2))
        row = batch * prod(self.grid[1:]) * queries * (keys + extra)
        step = max(1, BUDGET // max(row, 1))
        return (slice(i, min(i + step, self.grid[0])) for i in range(0, self.grid[0], step))

    def _index(self, name: str, rows: slice) -> list[Tensor]:
        first, *rest = [getattr(t, name) for t in self.tiles]
        return [first[rows], *rest]

    def take(self, x: Tensor, name: str, rows: slice) -> Tensor:
        """(B, heads, *spatial, D) -> (B, heads, *grid, L, D): the queries or keys of the tiles of `rows`."""
        index = self._index(name, rows)
        for i, part in enumerate(index):
            x = x.index_select(2 + 2 * i, part.flatten()).unflatten(2 + 2 * i, part.shape)
        n = len(index)
        order = [2 + 2 * i for i in range(n)] + [3 + 2 * i for i in range(n)]
        return x.permute(0, 1, *order, -1).flatten(2 + n, 1 + 2 * n)

    def _spread(self, x: Tensor, name: str, rows: slice) -> Tensor:
        """Undo the layout of `take`: (B, heads, *grid, L, D) -> (B, heads, grid_0 * L_0, grid_1 * L_1, ..., D)."""
        lengths = [part.shape[1] for part in self._index(name, rows)]
        n = len(lengths)
        x = x.unflatten(2 + n, lengths)
        x = x.permute(0, 1, *[d for i in range(n) for d in (2 + i, 2 + n + i)], -1)
        for i in range(n):
            x = x.flatten(2 + i, 3 + i)
        return x

    def put(self, parts: list[Tensor], rows: list[slice]) -> Tensor:
        """Query tiles of all chunks back on the map; repeated queries are dropped."""
        spread = []
        for part, chunk in zip(parts, rows, strict=True):
            x = self._spread(part, "query", chunk)
            for i, t in enumerate(self.tiles[1:], start=3):
                x = x.index_select(i, t.place)
            spread.append(x)
        return torch.cat(spread, 2).index_select(2, self.tiles[0].place)

    def add(self, total: Tensor, part: Tensor, rows: slice) -> None:
        """Add key tiles onto the map `total` (B, heads, *spatial, D)."""
        x = self._spread(part, "key", rows)
        index = self._index("key", rows)
        for i in range(len(index) - 1, 0, -1):
            shape = list(x.shape)
            shape[2 + i] = self.axes[i].length
            x = x.new_zeros(shape).index_add_(2 + i, index[i].flatten(), x)
        total.index_add_(2, index[0].flatten(), x)

    def combine(self, name: str, rows: slice, merge: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
        """Per-axis (tiles, T, L) tables -> (*grid, T, L) of the product of the axes; `merge(total, part, axis)`."""
        index = self._index(name, rows)
        n, total = len(index), None
        for i, part in enumerate(index):
            shape = [1] * (3 * n)
            shape[i], shape[n + i], shape[2 * n + i] = part.shape
            part = part.reshape(shape)
            total = part if total is None else merge(total, part, i)
        return total.flatten(2 * n, 3 * n - 1).flatten(n, 2 * n - 1)

    def bias(self, rpb: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor:
        """(heads or 1, *grid, T, R): the relative position bias where a key may be seen, -inf elsewhere."""
        allowed = self.combine("allowed", rows, lambda a, b, _: a & b)
        if rpb is None:
            return torch.zeros((), dtype=dtype, device=allowed.device).where(allowed, float("-inf"))[None]
        index = self.combine("row", rows, lambda a, b, i: a * (2 * self.axes[i].kernel - 1) + b)
        if rpb.stride(0) == 0:  # one table, expanded over the heads
            rpb = rpb[:1]
        values = rpb.to(dtype).flatten(1).index_select(1, index.flatten()).unflatten(1, index.shape)
        return values.masked_fill_(~allowed, float("-inf"))

    def slots(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Where each window slot lies in the run of keys (*grid, T, slots), and whether it holds a key."""
        reach = [t.key.shape[1] for t in self.tiles]
        place = self.combine("slot", rows, lambda a, b, i: a * reach[i] + b)
        return place, self.combine("valid", rows, lambda a, b, _: a & b)

    def real(self, rows: slice) -> Tensor:
        """(*grid, T, 1): 1 for a query, 0 for a repeated one."""
        first, *rest = [t.real[..., None] for t in self.tiles]
        parts = [first[rows], *rest]
        n, total = len(parts), None
        for i, part in enumerate(parts):
            shape = [1] * (2 * n)
            shape[i], shape[n + i] = part.shape[:2]
            total = part.reshape(shape) if total is None else total & part.reshape(shape)
        return total.flatten(n, 2 * n - 1)[..., None]


def _batch(x: Tensor) -> int:
    return x.shape[0] * x.shape[1]


def _extra(k_extra: Tensor | None) -> int:
    return 0 if k_extra is None else k_extra.shape[2]


def _rows(tile: Tensor) -> Tensor:
    """(B, heads, *grid, T, D) -> (B, heads, rows, D), for products with what all tiles share."""
    return tile.flatten(2, -2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    k_extra: Tensor | None,
    v_extra: Tensor | None,
    axes: Sequence[Axis],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention output in the dtype of v, and the natural log-sum-exp of the scores in float32 (or float64)."""
    plan, outs, lses, rows = Plan(axes, q.device), [], [], []
    for chunk in plan.chunks(_batch(q), _extra(k_extra)):
        q_tile = wide(plan.take(q, "query", chunk)) * scale
        p = q_tile @ wide(plan.take(k, "key", chunk)).mT
        p += plan.bias(rpb, chunk, p.dtype)
        reach = p.shape[-1]
        if k_extra is not None:
            p = torch.cat([p, (_rows(q_tile) @ wide(k_extra).mT).view(*p.shape[:-1], -1)], -1)
        top = p.amax(-1, keepdim=True)
        total = p.sub_(top).exp_().sum(-1, keepdim=True)
        out = p[..., :reach] @ wide(plan.take(v, "key", chunk))
        if v_extra is not None:
            out += (_rows(p[..., reach:]) @ wide(v_extra)).view_as(out)
        outs.append((out / total).to(v.dtype))
        lses.append(top + total.log())
        rows.append(chunk)
    return plan.put(outs, rows), plan.put(lses, rows).squeeze(-1)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    k_extra: Tensor | None,
    v_extra: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rpb_learns: bool,
    axes: Sequence[Axis],
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, rpb and the extra keys and values; the probabilities are recomputed from `lse`."""
    plan, rows, dqs = Plan(axes, q.device), [], []
    dtype = lse.dtype
    dk, dv, dk_extra, dv_extra = (
        None if x is None else torch.zeros_like(x, dtype=dtype) for x in (k, v, k_extra, v_extra)
    )
    drpb = torch.zeros_like(rpb, dtype=dtype).flatten(1) if rpb_learns else None
    delta = (wide(grad) * wide(out)).sum(-1, keepdim=True)
    for chunk in plan.chunks(_batch(q), _extra(k_extra)):
        q_tile = wide(plan.take(q, "query", chunk)) * scale
        k_tile = wide(plan.take(k, "key", chunk))
        g_tile = wide(plan.take(grad, "query", chunk)) * plan.real(chunk)
        p = q_tile @ k_tile.mT
        p += plan.bias(rpb, chunk, dtype)
        lse_tile, delta_tile = (plan.take(x, "query", chunk) for x in (lse[..., None], delta))
        p.sub_(lse_tile).exp_()
        plan.add(dv, p.mT @ g_tile, chunk)
        ds = (g_tile @ wide(plan.take(v, "key", chunk)).mT).sub_(delta_tile).mul_(p)
        ds *= plan.real(chunk)
        dq = ds @ k_tile
        if k_extra is not None:
            q_rows, g_rows, keys = _rows(q_tile), _rows(g_tile), wide(k_extra)
            p_extra = (q_rows @ keys.mT).sub_(_rows(lse_tile)).exp_()
            dv_extra += p_extra.mT @ g_rows
            ds_extra = (g_rows @ wide(v_extra).mT).sub_(_rows(delta_tile * plan.real(chunk))).mul_(p_extra)
            dk_extra += ds_extra.mT @ q_rows
            dq += (ds_extra @ keys).view_as(dq)
        dqs.append((dq * scale).to(q.dtype))
        plan.add(dk, ds.mT @ q_tile, chunk)
        if drpb is not None:
            index = plan.combine("row", chunk, lambda a, b, i: a * (2 * axes[i].kernel - 1) + b)
            summed = ds.sum(0).flatten(1)
            drpb.scatter_add_(1, index.flatten().expand_as(summed), summed)
        rows.append(chunk)
    return (
        plan.put(dqs, rows),
        dk.to(k.dtype),
        dv.to(v.dtype),
        drpb.view_as(rpb).to(rpb.dtype) if rpb_learns else None,
        None if k_extra is None else dk_extra.to(k.dtype),
        None if v_extra is None else dv_extra.to(v.dtype),
    )


def scores(q: Tensor, k: Tensor, rpb: Tensor | None, axes: Sequence[Axis], scale: float) -> Tensor:
    """(B, heads, *spatial, slots) scores in the dtype of q; -inf in slots without a key."""
    plan, parts, rows = Plan(axes, q.device), [], []
    for chunk in plan.chunks(_batch(q)):
        dense = (wide(plan.take(q, "query", chunk)) * scale) @ wide(plan.take(k, "key", chunk)).mT
        dense += plan.bias(rpb, chunk, dense.dtype)
        place, valid = plan.slots(chunk)
        compact = dense.gather(-1, place.expand(*dense.shape[:2], *place.shape))
        parts.append(compact.masked_fill_(~valid, float("-inf")).to(q.dtype))
        rows.append(chunk)
    return plan.put(parts, rows)


def _dense(plan: Plan, weights: Tensor, rows: slice) -> Tensor:
    """Compact weights of the tiles of `rows` on their runs of keys: (B, heads, *grid, T, R)."""
    place, valid = plan.slots(rows)
    tile = wide(plan.take(weights, "query", rows)).masked_fill(~(valid & plan.real(rows)), 0.0)
    reach = prod(t.key.shape[1] for t in plan.tiles)
    return tile.new_zeros(*tile.shape[:-1], reach).scatter_add_(-1, place.expand_as(tile), tile)


def scores_backward(
    grad: Tensor, q: Tensor, k: Tensor, rpb: Tensor | None, axes: Sequence[Axis], scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    plan, rows, dqs = Plan(axes, q.device), [], []
    dk = torch.zeros_like(k, dtype=wide(k).dtype)
    for chunk in plan.chunks(_batch(q)):
        ds = _dense(plan, grad, chunk)
        dqs.append((ds @ wide(plan.take(k, "key", chunk)) * scale).to(q.dtype))
        plan.add(dk, ds.mT @ (wide(plan.take(q, "query", chunk)) * scale), chunk)
        rows.append(chunk)
    drpb = None
    if rpb is not None:
        index = table_index(axes, q.device).flatten()
        summed = wide(grad).masked_fill(~allowed(axes, q.device), 0.0).sum(0).flatten(1)
        drpb = summed.new_zeros(rpb.flatten(1).shape).scatter_add_(1, index.expand_as(summed), summed)
        drpb = drpb.view_as(rpb).to(rpb.dtype)
    return plan.put(dqs, rows), dk.to(k.dtype), drpb


def aggregate(weights: Tensor, v: Tensor, axes: Sequence[Axis]) -> Tensor:
    """(B, heads, *spatial, D): window-weighted sums of v, in the dtype of v."""
    plan, parts, rows = Plan(axes, v.device), [], []
    for chunk in plan.chunks(_batch(v)):
        parts.append((_dense(plan, weights, chunk) @ wide(plan.take(v, "key", chunk))).to(v.dtype))
        rows.append(chunk)
    return plan.put(parts, rows)


def aggregate_backward(
    grad: Tensor, weights: Tensor, v: Tensor, axes: Sequence[Axis]
) -> tuple[Tensor, Tensor]:
    plan, rows, parts = Plan(axes, v.device), [], []
    dv = torch.zeros_like(v, dtype=wide(v).dtype)
    for chunk in plan.chunks(_batch(v)):
        g_tile = wide(plan.take(grad, "query", chunk))
        dense = g_tile @ wide(plan.take(v, "key", chunk)).mT
        place, valid = plan.slots(chunk)
        compact = dense.gather(-1, place.expand(*dense.shape[:2], *place.shape)).masked_fill_(~valid, 0.0)
        parts.append(compact.to(weights.dtype))
        plan.add(dv, _dense(plan, weights, chunk).mT @ g_tile, chunk)
        rows.append(chunk)
    return plan.put(parts, rows), dv.to(v.dtype)
