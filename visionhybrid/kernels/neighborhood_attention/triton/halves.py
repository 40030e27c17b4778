"""Kernels of the two halves, whose weights lie in memory: one number a query and slot of its window.

_scores     a[x] . b[nb(x, j)]                     scores; gradient of the weights
_gather     sum_j w[x, j] b[nb(x, j)]              aggregate; gradient of q
_scatter    sum over readers of w[x, j] a[x]       gradients of v and of k
_table      sum of slopes by relative position     gradient of the bias, also of the whole operator
"""

from __future__ import annotations

import triton
import triton.language as tl

from visionhybrid.kernels.neighborhood_attention.triton import axes
from visionhybrid.kernels.neighborhood_attention.triton.fused import LOG2E, logits, table_of


@triton.jit
def _dot(weights, x, PRECISION: tl.constexpr):
    """weights x; in float32 where their types differ."""
    if weights.dtype != x.dtype:
        weights, x = weights.to(tl.float32), x.to(tl.float32)
    return tl.dot(weights, x, input_precision=PRECISION)


@triton.jit
def _scores(
    q, k, rpb, out, scale,
    count, heads, D, length, kernel, dilation, stride, causal, tiles, q_s, k_s, w_s,
    FIRST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    number, head = tl.program_id(0) % count, (tl.program_id(0) // count).to(tl.int64)
    b, h = head // heads, head % heads
    g, m, first = axes.tile(number, length, dilation, tiles, QUERIES)
    p, d = axes.plus(first, axes.spot(tl.arange(0, BLOCK_N), QUERIES)), tl.arange(0, BLOCK_D)
    real = axes.within(p, m)
    lo, hi = axes.window(p, m, kernel, stride, causal)
    start, _ = axes.window(first, m, kernel, stride, causal)
    _, end = axes.window(axes.last(first, m, QUERIES), m, kernel, stride, causal)
    walk = axes.steps(start, end, KEYS)
    q_tile = axes.load(axes.head_of(q, b, h, q_s), axes.offsets(p, g, dilation, q_s), d, q_s, real, D)
    k, rpb = axes.head_of(k, b, h, k_s), table_of(rpb, h, kernel, BIAS)
    # Slot j of a window [lo, hi) is the key lo + j: linear in both, so one subtraction an entry.
    places = axes.offsets(p, g, dilation, w_s) - axes.ravel(lo, kernel) * w_s[5]
    out = axes.head_of(out, b, h, w_s)
    for step in range(0, walk[0] * walk[1] * walk[2]):
        corner = axes.plus(start, axes.times(axes.unravel(step, walk), KEYS))
        t = axes.plus(corner, axes.spot(tl.arange(0, BLOCK_M), KEYS))
        k_tile = axes.load(k, axes.offsets(t, g, dilation, k_s), d, k_s, axes.within(t, m), D)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        s = logits(
            product,
            axes.down(p),
            axes.across(t),
            axes.down(lo),
            axes.down(hi),
            kernel,
            rpb,
            scale,
            FIRST,
            BIAS,
        )
        inside = axes.seen(axes.across(t), axes.down(lo), axes.down(hi), FIRST) & real[:, None]
        tl.store(out + places[:, None] + (axes.ravel(t, kernel) * w_s[5])[None, :], s / LOG2E, mask=inside)


@triton.jit
def _gather(
    w, x, out, scale,
    count, heads, D, length, kernel, dilation, stride, causal, tiles, w_s, x_s, o_s,
    FIRST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    number, head = tl.program_id(0) % count, (tl.program_id(0) // count).to(tl.int64)
    b, h = head // heads, head % heads
    g, m, first = axes.tile(number, length, dilation, tiles, QUERIES)
    p, d = axes.plus(first, axes.spot(tl.arange(0, BLOCK_N), QUERIES)), tl.arange(0, BLOCK_D)
    real = axes.within(p, m)
    lo, hi = axes.window(p, m, kernel, stride, causal)
    start, _ = axes.window(first, m, kernel, stride, causal)
    _, end = axes.window(axes.last(first, m, QUERIES), m, kernel, stride, causal)
    walk = axes.steps(start, end, KEYS)
    w, x = axes.head_of(w, b, h, w_s), axes.head_of(x, b, h, x_s)
    places = axes.offsets(p, g, dilation, w_s) - axes.ravel(lo, kernel) * w_s[5]
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for step in range(0, walk[0] * walk[1] * walk[2]):
        corner = axes.plus(start, axes.times(axes.unravel(step, walk), KEYS))
        t = axes.plus(corner, axes.spot(tl.arange(0, BLOCK_M), KEYS))
        inside = axes.seen(axes.across(t), axes.down(lo), axes.down(hi), FIRST) & real[:, None]
        slot = places[:, None] + (axes.ravel(t, kernel) * w_s[5])[None, :]
        w_tile = tl.load(w + slot, mask=inside, other=0.0)
        x_tile = axes.load(x, axes.offsets(t, g, dilation, x_s), d, x_s, axes.within(t, m), D)
        acc += _dot(w_tile, x_tile, PRECISION)
    axes.store(axes.head_of(out, b, h, o_s), axes.offsets(p, g, dilation, o_s), d, o_s, real, D, acc * scale)


@triton.jit
def _scatter(
    w, x, out, scale,
    count, heads, D, length, kernel, dilation, stride, causal, tiles, w_s, x_s, o_s,
    FIRST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    number, head = tl.program_id(0) % count, (tl.program_id(0) // count).to(tl.int64)
    b, h = head // heads, head % heads
    g, m, first = axes.tile(number, length, dilation, tiles, KEYS)
    t, d = axes.plus(first, axes.spot(tl.arange(0, BLOCK_M), KEYS)), tl.arange(0, BLOCK_D)
    start, end = axes.readers(first, axes.last(first, m, KEYS), m, kernel, stride, causal)
    walk = axes.steps(start, end, QUERIES)
    w, x = axes.head_of(w, b, h, w_s), axes.head_of(x, b, h, x_s)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in range(0, walk[0] * walk[1] * walk[2]):
        corner = axes.plus(start, axes.times(axes.unravel(step, walk), QUERIES))
        p = axes.plus(corner, axes.spot(tl.arange(0, BLOCK_N), QUERIES))
        real = axes.within(p, m)
        lo, hi = axes.window(p, m, kernel, stride, causal)
        inside = axes.seen(axes.down(t), axes.across(lo), axes.across(hi), FIRST) & real[None, :]
        places = axes.offsets(p, g, dilation, w_s) - axes.ravel(lo, kernel) * w_s[5]
        slot = places[None, :] + (axes.ravel(t, kernel) * w_s[5])[:, None]
        w_tile = tl.load(w + slot, mask=inside, other=0.0)
        x_tile = axes.load(x, axes.offsets(p, g, dilation, x_s), d, x_s, real, D)
        acc += _dot(w_tile, x_tile, PRECISION)
    there = axes.within(t, m)
    axes.store(axes.head_of(out, b, h, o_s), axes.offsets(t, g, dilation, o_s), d, o_s, there, D, acc * scale)
