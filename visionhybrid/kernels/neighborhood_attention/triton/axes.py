"""Windows and tiles as the kernels see them: `geometry.py` in arithmetic on the three axes of a map.

A map of fewer axes has leading ones of length 1; FIRST is the first axis that is there. `p` is a triple of indices of queries
in their dilation group, `t` of keys, `g` the group, `m` its size; `T` the sides of a tile, powers of two. Few and flat
functions: Triton's interpreter takes a millisecond to enter one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(number, length, dilation, tiles, T: tl.constexpr):
    """Of tile `number`: its group, the group's size, the first index in it. A group has up to `tiles` tiles on each axis."""
    across = tl.minimum(dilation[2], length[2]) * tiles[2]
    down = tl.minimum(dilation[1], length[1]) * tiles[1]
    a0, a1, a2 = number // (across * down), number // across % down, number % across
    g = (a0 // tiles[0], a1 // tiles[1], a2 // tiles[2])
    m = (
        (length[0] - g[0] + dilation[0] - 1) // dilation[0],
        (length[1] - g[1] + dilation[1] - 1) // dilation[1],
        (length[2] - g[2] + dilation[2] - 1) // dilation[2],
    )
    return g, m, (a0 % tiles[0] * T[0], a1 % tiles[1] * T[1], a2 % tiles[2] * T[2])


@triton.jit
def walked(start, step, walk, T: tl.constexpr, BLOCK: tl.constexpr):
    """The indices in the tile that `step` of a walk from `start` comes to; `walk` is its steps on the last two axes."""
    i = tl.arange(0, BLOCK)
    return (
        start[0] + step // (walk[0] * walk[1]) * T[0] + i // (T[1] * T[2]),
        start[1] + step // walk[1] % walk[0] * T[1] + i // T[2] % T[1],
        start[2] + step % walk[1] * T[2] + i % T[2],
    )


@triton.jit
def _axis_window(p, m, kernel, stride, causal):
    leader = tl.minimum(p // stride * stride + tl.where(causal != 0, stride - 1, stride // 2), m - 1)
    shifted = tl.minimum(tl.maximum(leader - kernel // 2, 0), tl.maximum(m - kernel, 0))
    lo = tl.where(causal != 0, tl.maximum(leader - kernel + 1, 0), shifted)
    return lo, tl.where(p < m, tl.where(causal != 0, p + 1, tl.minimum(lo + kernel, m)), 0)


@triton.jit
def window(p, m, kernel, stride, causal, FIRST: tl.constexpr):
    """First key and end of the keys that queries see, end 0 for a query beyond its group; then their extremes."""
    lo2, hi2 = _axis_window(p[2], m[2], kernel[2], stride[2], causal[2])
    lo0, lo1, hi0, hi1 = p[0], p[1], p[0] + 1, p[1] + 1
    if FIRST < 2:
        lo1, hi1 = _axis_window(p[1], m[1], kernel[1], stride[1], causal[1])
    if FIRST < 1:
        lo0, hi0 = _axis_window(p[0], m[0], kernel[0], stride[0], causal[0])
    return (lo0, lo1, lo2), (hi0, hi1, hi2)


@triton.jit
def span(lo, hi, T: tl.constexpr):
    """Where windows begin, and the steps of a walk over all of them on the three axes."""
    start = (tl.min(lo[0], 0), tl.min(lo[1], 0), tl.min(lo[2], 0))
    return start, (
        tl.cdiv(tl.maximum(tl.max(hi[0], 0) - start[0], 0), T[0]),
        tl.cdiv(tl.maximum(tl.max(hi[1], 0) - start[1], 0), T[1]),
        tl.cdiv(tl.maximum(tl.max(hi[2], 0) - start[2], 0), T[2]),
    )


@triton.jit
def _axis_readers(first, m, kernel, stride, causal, SIDE: tl.constexpr):
    last = tl.minimum(first + SIDE, m) - 1
    start = tl.where(first < kernel, 0, tl.maximum(first - kernel + kernel // 2 + 1 - stride // 2, 0))
    end = tl.where(last >= m - kernel, m, tl.minimum(last + kernel // 2 + stride, m))
    start = tl.where(causal != 0, first, start)
    end = tl.where(causal != 0, tl.minimum(last + kernel, m), end)
    return start, tl.maximum(end - start, 0)


@triton.jit
def readers(first, m, kernel, stride, causal, T: tl.constexpr, BY: tl.constexpr, FIRST: tl.constexpr):
    """A walk over all queries that may see a key of the tile at `first`: its start and its steps, tiles of sides BY."""
    start2, run2 = _axis_readers(first[2], m[2], kernel[2], stride[2], causal[2], T[2])
    start0, start1, run0, run1 = 0, 0, 1, 1
    if FIRST < 2:
        start1, run1 = _axis_readers(first[1], m[1], kernel[1], stride[1], causal[1], T[1])
    if FIRST < 1:
        start0, run0 = _axis_readers(first[0], m[0], kernel[0], stride[0], causal[0], T[0])
    return (start0, start1, start2), (tl.cdiv(run0, BY[0]), tl.cdiv(run1, BY[1]), tl.cdiv(run2, BY[2]))


@triton.jit
def seen(t, lo, hi, FIRST: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Whether keys t lie in windows [lo, hi): a row a query and a column a key, or the other way round."""
    Q: tl.constexpr = 0 if KEYS_FIRST else 1  # the axis that queries lack
    K: tl.constexpr = 1 - Q
    key = tl.expand_dims(t[2], K)
    inside = (key >= tl.expand_dims(lo[2], Q)) & (key < tl.expand_dims(hi[2], Q))
    if FIRST < 2:
        key = tl.expand_dims(t[1], K)
        inside = inside & (key >= tl.expand_dims(lo[1], Q)) & (key < tl.expand_dims(hi[1], Q))
    if FIRST < 1:
        key = tl.expand_dims(t[0], K)
        inside = inside & (key >= tl.expand_dims(lo[0], Q)) & (key < tl.expand_dims(hi[0], Q))
    return inside


@triton.jit
def places(p, g, dilation, strides):
    """Offsets on a map (B, heads, *axes, D) of one head."""
    return (
        (p[0] * dilation[0] + g[0]).to(tl.int64) * strides[2]
        + (p[1] * dilation[1] + g[1]).to(tl.int64) * strides[3]
        + (p[2] * dilation[2] + g[2]).to(tl.int64) * strides[4]
    )


@triton.jit
def _rows(p, g, m, dilation, strides, width, BLOCK: tl.constexpr):
    """Offsets of (tokens, BLOCK) rows, and which entries are there."""
    d = tl.arange(0, BLOCK)
    place = (
        (p[0] * dilation[0] + g[0]).to(tl.int64) * strides[2]
        + (p[1] * dilation[1] + g[1]).to(tl.int64) * strides[3]
        + (p[2] * dilation[2] + g[2]).to(tl.int64) * strides[4]
    )
    real = (p[0] < m[0]) & (p[1] < m[1]) & (p[2] < m[2]) & ((p[0] | p[1] | p[2]) >= 0)
    return place[:, None] + d[None, :] * strides[5], real[:, None] & (d < width)[None, :]


@triton.jit
def load(head, p, g, m, dilation, strides, width, BLOCK: tl.constexpr):
    """(tokens, BLOCK) rows of a head's map, zeros where there is nothing."""
    place, real = _rows(p, g, m, dilation, strides, width, BLOCK)
    return tl.load(head + place, mask=real, other=0.0)


@triton.jit
def store(head, p, g, m, dilation, strides, width, values, BLOCK: tl.constexpr):
    place, real = _rows(p, g, m, dilation, strides, width, BLOCK)
    tl.store(head + place, values, mask=real)


@triton.jit
def load_extra(head, i, count, strides, width, BLOCK: tl.constexpr):
    """(keys, BLOCK) rows `i` of a head's extra keys, which lie as a map of one axis; zeros beyond the last."""
    d = tl.arange(0, BLOCK)
    place = i.to(tl.int64)[:, None] * strides[4] + d[None, :] * strides[5]
    return tl.load(head + place, mask=(i < count)[:, None] & (d < width)[None, :], other=0.0)


@triton.jit
def unflattened(n, length):
    """Row-major token numbers of a map as indices on its axes; those beyond the last token lie beyond the first axis."""
    return n // (length[1] * length[2]), n // length[2] % length[1], n % length[2]


@triton.jit
def slots(p, t, lo, g, kernel, dilation, strides, KEYS_FIRST: tl.constexpr):
    """Offsets of the weights of queries p and keys t: key lo + j is slot j, which is linear in both."""
    a = (lo[0] * kernel[1] + lo[1]) * kernel[2] + lo[2]
    b = (t[0] * kernel[1] + t[1]) * kernel[2] + t[2]
    query, key = places(p, g, dilation, strides) - a * strides[5], b * strides[5]
    return query[None, :] + key[:, None] if KEYS_FIRST else query[:, None] + key[None, :]
