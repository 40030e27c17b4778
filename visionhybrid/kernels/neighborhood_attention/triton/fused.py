"""Kernels of the whole operator: forward, and backward from recomputed weights. A tile of queries meets the run of keys that
covers its windows, tile by tile; what a query must not see is masked.

    _fwd       output and log-sum-exp, a program a tile of queries
    _bwd_q     gradient of q, and grad . out of each query
    _bwd_kv    gradients of k and v, a program a tile of keys, over the queries that can see it
"""

from __future__ import annotations

import triton
import triton.language as tl

from visionhybrid.kernels.neighborhood_attention.triton import axes

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def logits(product, p, t, lo, hi, kernel, rpb, scale, FIRST: tl.constexpr, BIAS: tl.constexpr):
    """Base-2 scores, -inf where a query sees no key; p, t, lo, hi along the axes of `product`."""
    inside = axes.seen(t, lo, hi, FIRST)
    product = product * (scale * LOG2E)
    if BIAS:
        table = (2 * kernel[0] - 1, 2 * kernel[1] - 1, 2 * kernel[2] - 1)
        centre = axes.ravel((kernel[0] - 1, kernel[1] - 1, kernel[2] - 1), table)
        row = axes.ravel(t, table) - axes.ravel(p, table) + centre
        product += tl.load(rpb + row, mask=inside, other=0.0).to(tl.float32) * LOG2E
    return tl.where(inside, product, float("-inf"))


@triton.jit
def table_of(rpb, h, kernel, BIAS: tl.constexpr):
    """Where a head's relative position biases begin."""
    if BIAS:
        rpb += h * (2 * kernel[0] - 1) * (2 * kernel[1] - 1) * (2 * kernel[2] - 1)
    return rpb


@triton.jit
def _fwd(
    q, k, v, rpb, out, lse, scale,
    count, heads, D, E, length, kernel, dilation, stride, causal, tiles, q_s, k_s, v_s, o_s, lse_s,
    FIRST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    number, head = tl.program_id(0) % count, (tl.program_id(0) // count).to(tl.int64)
    b, h = head // heads, head % heads
    g, m, first = axes.tile(number, length, dilation, tiles, QUERIES)
    p = axes.plus(first, axes.spot(tl.arange(0, BLOCK_N), QUERIES))
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    real = axes.within(p, m)
    lo, hi = axes.window(p, m, kernel, stride, causal)
    start, _ = axes.window(first, m, kernel, stride, causal)
    _, end = axes.window(axes.last(first, m, QUERIES), m, kernel, stride, causal)
    walk = axes.steps(start, end, KEYS)
    q_tile = axes.load(axes.head_of(q, b, h, q_s), axes.offsets(p, g, dilation, q_s), d, q_s, real, D)
    k, v, rpb = axes.head_of(k, b, h, k_s), axes.head_of(v, b, h, v_s), table_of(rpb, h, kernel, BIAS)
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for step in range(0, walk[0] * walk[1] * walk[2]):
        corner = axes.plus(start, axes.times(axes.unravel(step, walk), KEYS))
        t = axes.plus(corner, axes.spot(tl.arange(0, BLOCK_M), KEYS))
        there = axes.within(t, m)
        k_tile = axes.load(k, axes.offsets(t, g, dilation, k_s), d, k_s, there, D)
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
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
        weights = tl.exp2(s - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weights, 1)
        v_tile = axes.load(v, axes.offsets(t, g, dilation, v_s), e, v_s, there, E)
        acc = acc * fade[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        top = higher
    total = tl.where(real, total, 1.0)
    acc = acc / total[:, None]
    axes.store(axes.head_of(out, b, h, o_s), axes.offsets(p, g, dilation, o_s), e, o_s, real, E, acc)
    place = axes.head_of(lse, b, h, lse_s) + axes.offsets(p, g, dilation, lse_s)
    tl.store(place, (top + tl.log2(total)) / LOG2E, mask=real)


@triton.jit
def _bwd_q(
    grad, q, k, v, rpb, out, lse, delta, dq, scale,
    count, heads, D, E, length, kernel, dilation, stride, causal, tiles, g_s, q_s, k_s, v_s, o_s, lse_s, dq_s,
    FIRST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    number, head = tl.program_id(0) % count, (tl.program_id(0) // count).to(tl.int64)
    b, h = head // heads, head % heads
    g, m, first = axes.tile(number, length, dilation, tiles, QUERIES)
    p = axes.plus(first, axes.spot(tl.arange(0, BLOCK_N), QUERIES))
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    real = axes.within(p, m)
    lo, hi = axes.window(p, m, kernel, stride, causal)
    start, _ = axes.window(first, m, kernel, stride, causal)
    _, end = axes.window(axes.last(first, m, QUERIES), m, kernel, stride, causal)
    walk = axes.steps(start, end, KEYS)
    q_tile = axes.load(axes.head_of(q, b, h, q_s), axes.offsets(p, g, dilation, q_s), d, q_s, real, D)
    g_tile = axes.load(axes.head_of(grad, b, h, g_s), axes.offsets(p, g, dilation, g_s), e, g_s, real, E)
    o_tile = axes.load(axes.head_of(out, b, h, o_s), axes.offsets(p, g, dilation, o_s), e, o_s, real, E)
    mean = tl.sum(g_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    place = axes.head_of(lse, b, h, lse_s) + axes.offsets(p, g, dilation, lse_s)
    norm = tl.load(place, mask=real, other=float("inf")) * LOG2E  # weights zero where there is no query
    tl.store(axes.head_of(delta, b, h, lse_s) + axes.offsets(p, g, dilation, lse_s), mean, mask=real)
    k, v, rpb = axes.head_of(k, b, h, k_s), axes.head_of(v, b, h, v_s), table_of(rpb, h, kernel, BIAS)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for step in range(0, walk[0] * walk[1] * walk[2]):
        corner = axes.plus(start, axes.times(axes.unravel(step, walk), KEYS))
        t = axes.plus(corner, axes.spot(tl.arange(0, BLOCK_M), KEYS))
        there = axes.within(t, m)
        k_tile = axes.load(k, axes.offsets(t, g, dilation, k_s), d, k_s, there, D)
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
        v_tile = axes.load(v, axes.offsets(t, g, dilation, v_s), e, v_s, there, E)
        slopes = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION) - mean[:, None]
        slopes = tl.exp2(s - norm[:, None]) * slopes
        acc += tl.dot(slopes.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    axes.store(
        axes.head_of(dq, b, h, dq_s), axes.offsets(p, g, dilation, dq_s), d, dq_s, real, D, acc * scale
    )


@triton.jit
def _bwd_kv(
    grad, q, k, v, rpb, lse, delta, dk, dv, scale,
    count, heads, D, E, length, kernel, dilation, stride, causal, tiles, g_s, q_s, k_s, v_s, lse_s, dk_s, dv_s,
    FIRST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    number, head = tl.program_id(0) % count, (tl.program_id(0) // count).to(tl.int64)
    b, h = head // heads, head % heads
    g, m, first = axes.tile(number, length, dilation, tiles, KEYS)
    t = axes.plus(first, axes.spot(tl.arange(0, BLOCK_M), KEYS))
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    there = axes.within(t, m)
    start, end = axes.readers(first, axes.last(first, m, KEYS), m, kernel, stride, causal)
    walk = axes.steps(start, end, QUERIES)
    k_tile = axes.load(axes.head_of(k, b, h, k_s), axes.offsets(t, g, dilation, k_s), d, k_s, there, D)
    v_tile = axes.load(axes.head_of(v, b, h, v_s), axes.offsets(t, g, dilation, v_s), e, v_s, there, E)
    q, grad, rpb = axes.head_of(q, b, h, q_s), axes.head_of(grad, b, h, g_s), table_of(rpb, h, kernel, BIAS)
    lse, delta = axes.head_of(lse, b, h, lse_s), axes.head_of(delta, b, h, lse_s)
    dk_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for step in range(0, walk[0] * walk[1] * walk[2]):
        corner = axes.plus(start, axes.times(axes.unravel(step, walk), QUERIES))
        p = axes.plus(corner, axes.spot(tl.arange(0, BLOCK_N), QUERIES))
        real = axes.within(p, m)
        lo, hi = axes.window(p, m, kernel, stride, causal)
        q_tile = axes.load(q, axes.offsets(p, g, dilation, q_s), d, q_s, real, D)
        product = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        s = logits(
            product,
            axes.across(p),
            axes.down(t),
            axes.across(lo),
            axes.across(hi),
            kernel,
            rpb,
            scale,
            FIRST,
            BIAS,
        )
        place = axes.offsets(p, g, dilation, lse_s)
        norm = (
            tl.load(lse + place, mask=real, other=float("inf")) * LOG2E
        )  # weights zero where there is no query
        mean = tl.load(delta + place, mask=real, other=0.0)
        weights = tl.exp2(s - norm[None, :])
        g_tile = axes.load(grad, axes.offsets(p, g, dilation, g_s), e, g_s, real, E)
        dv_acc += tl.dot(weights.to(g_tile.dtype), g_tile, input_precision=PRECISION)
        slopes = weights * (tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION) - mean[None, :])
        dk_acc += tl.dot(slopes.to(q_tile.dtype), q_tile, input_precision=PRECISION)
    axes.store(
        axes.head_of(dk, b, h, dk_s), axes.offsets(t, g, dilation, dk_s), d, dk_s, there, D, dk_acc * scale
    )
    axes.store(axes.head_of(dv, b, h, dv_s), axes.offsets(t, g, dilation, dv_s), e, dv_s, there, E, dv_acc)
