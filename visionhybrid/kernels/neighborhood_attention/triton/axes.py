"""Windows and tiles as the kernels see them: `geometry.py` in arithmetic on the three axes of a map.

A map of fewer axes has leading ones of length 1; FIRST is the first axis that is there. `p` is a triple of indices of queries
in their dilation group, `t` of keys, `g` the group, `m` its size; `T` a tile's size, powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def spot(i, T: tl.constexpr):
    """Place of element i in a tile."""
    return i // (T[1] * T[2]), i // T[2] % T[1], i % T[2]


@triton.jit
def plus(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


@triton.jit
def times(a, b):
    return a[0] * b[0], a[1] * b[1], a[2] * b[2]


@triton.jit
def down(x):
    """Along the rows of a matrix."""
    return x[0][:, None], x[1][:, None], x[2][:, None]


@triton.jit
def across(x):
    """Along the columns of a matrix."""
    return x[0][None, :], x[1][None, :], x[2][None, :]


@triton.jit
def ravel(x, sizes):
    return (x[0] * sizes[1] + x[1]) * sizes[2] + x[2]


@triton.jit
def unravel(i, sizes):
    return i // (sizes[1] * sizes[2]), i // sizes[2] % sizes[1], i % sizes[2]


@triton.jit
def tile(number, length, dilation, tiles, T: tl.constexpr):
    """Of tile `number`: its group, the group's size, the first index in it. A group has up to `tiles` tiles on each axis."""
    groups = (
        tl.minimum(dilation[0], length[0]),
        tl.minimum(dilation[1], length[1]),
        tl.minimum(dilation[2], length[2]),
    )
    a = unravel(number, times(groups, tiles))
    g = (a[0] // tiles[0], a[1] // tiles[1], a[2] // tiles[2])
    m = (
        tl.cdiv(length[0] - g[0], dilation[0]),
        tl.cdiv(length[1] - g[1], dilation[1]),
        tl.cdiv(length[2] - g[2], dilation[2]),
    )
    return g, m, times((a[0] % tiles[0], a[1] % tiles[1], a[2] % tiles[2]), T)


@triton.jit
def last(first, m, T: tl.constexpr):
    """Last index of a tile that its group has; the group's last where it has none."""
    return (
        tl.minimum(first[0] + T[0], m[0]) - 1,
        tl.minimum(first[1] + T[1], m[1]) - 1,
        tl.minimum(first[2] + T[2], m[2]) - 1,
    )


@triton.jit
def _axis_window(p, m, kernel, stride, causal):
    block = p // stride * stride
    leader = tl.minimum(block + tl.where(causal != 0, stride - 1, stride // 2), m - 1)
    shifted = tl.minimum(tl.maximum(leader - kernel // 2, 0), tl.maximum(m - kernel, 0))
    lo = tl.where(causal != 0, tl.maximum(leader - kernel + 1, 0), shifted)
    return lo, tl.where(causal != 0, p + 1, tl.minimum(lo + kernel, m))


@triton.jit
def window(p, m, kernel, stride, causal):
    """First key and end of keys that queries see."""
    lo0, hi0 = _axis_window(p[0], m[0], kernel[0], stride[0], causal[0])
    lo1, hi1 = _axis_window(p[1], m[1], kernel[1], stride[1], causal[1])
    lo2, hi2 = _axis_window(p[2], m[2], kernel[2], stride[2], causal[2])
    return (lo0, lo1, lo2), (hi0, hi1, hi2)


@triton.jit
def _axis_readers(first, last, m, kernel, stride, causal):
    start = tl.where(first < kernel, 0, tl.maximum(first - kernel + kernel // 2 + 1 - stride // 2, 0))
    end = tl.where(last >= m - kernel, m, tl.minimum(last + kernel // 2 + stride, m))
    return (
        tl.where(causal != 0, first, start),
        tl.where(causal != 0, tl.minimum(last + kernel, m), end),
    )


@triton.jit
def readers(first, last, m, kernel, stride, causal):
    """A run of queries (start, end) with all that see a key of first .. last."""
    lo0, hi0 = _axis_readers(first[0], last[0], m[0], kernel[0], stride[0], causal[0])
    lo1, hi1 = _axis_readers(first[1], last[1], m[1], kernel[1], stride[1], causal[1])
    lo2, hi2 = _axis_readers(first[2], last[2], m[2], kernel[2], stride[2], causal[2])
    return (lo0, lo1, lo2), (hi0, hi1, hi2)


@triton.jit
def steps(start, end, T: tl.constexpr):
    """Tiles to walk from start to end, on each axis."""
    return (
        tl.cdiv(tl.maximum(end[0] - start[0], 0), T[0]),
        tl.cdiv(tl.maximum(end[1] - start[1], 0), T[1]),
        tl.cdiv(tl.maximum(end[2] - start[2], 0), T[2]),
    )


@triton.jit
def within(p, m):
    return (p[0] < m[0]) & (p[1] < m[1]) & (p[2] < m[2])


@triton.jit
def seen(t, lo, hi, FIRST: tl.constexpr):
    """Whether keys t lie in windows [lo, hi)."""
    inside = (t[2] >= lo[2]) & (t[2] < hi[2])
    if FIRST < 2:
        inside = inside & (t[1] >= lo[1]) & (t[1] < hi[1])
    if FIRST < 1:
        inside = inside & (t[0] >= lo[0]) & (t[0] < hi[0])
    return inside


@triton.jit
def offsets(p, g, dilation, strides):
    """Places on a map (B, heads, *axes, D) of one head."""
    x = plus(times(p, dilation), g)
    return x[0].to(tl.int64) * strides[2] + x[1].to(tl.int64) * strides[3] + x[2].to(tl.int64) * strides[4]


@triton.jit
def head_of(base, b, h, strides):
    return base + b * strides[0] + h * strides[1]


@triton.jit
def load(base, places, d, strides, real, width):
    """(tokens, D) rows, zero where not `real` and beyond the width."""
    mask = real[:, None] & (d < width)[None, :]
    return tl.load(base + places[:, None] + d[None, :] * strides[5], mask=mask, other=0.0)


@triton.jit
def store(base, places, d, strides, real, width, values):
    mask = real[:, None] & (d < width)[None, :]
    tl.store(base + places[:, None] + d[None, :] * strides[5], values, mask=mask)
