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
from visionhybrid.kernels.neighborhood_attention.triton.fused import LOG2E, biases_before, logits


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
    p = axes.walked(first, 0, (1, 1), QUERIES, BLOCK_N)
    lo, hi = axes.window(p, m, kernel, stride, causal, FIRST)
    start, walk = axes.span(lo, hi, KEYS)
    q_tile = axes.load(q + b * q_s[0] + h * q_s[1], p, g, m, dilation, q_s, D, BLOCK_D)
    k += b * k_s[0] + h * k_s[1]
    if BIAS:
        rpb += biases_before(h, kernel)
    out += b * w_s[0] + h * w_s[1]
    for step in range(0, walk[0] * walk[1] * walk[2]):
        t = axes.walked(start, step, (walk[1], walk[2]), KEYS, BLOCK_M)
        product = tl.dot(
            q_tile, tl.trans(axes.load(k, t, g, m, dilation, k_s, D, BLOCK_D)), input_precision=PRECISION
        )
        s = logits(product, p, t, lo, hi, kernel, rpb, scale, FIRST, BIAS, False)
        tl.store(
            out + axes.slots(p, t, lo, g, kernel, dilation, w_s, False),
            s / LOG2E,
            mask=axes.seen(t, lo, hi, FIRST, False),
        )


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
    p = axes.walked(first, 0, (1, 1), QUERIES, BLOCK_N)
    lo, hi = axes.window(p, m, kernel, stride, causal, FIRST)
    start, walk = axes.span(lo, hi, KEYS)
    w, x = w + b * w_s[0] + h * w_s[1], x + b * x_s[0] + h * x_s[1]
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for step in range(0, walk[0] * walk[1] * walk[2]):
        t = axes.walked(start, step, (walk[1], walk[2]), KEYS, BLOCK_M)
        w_tile = tl.load(
            w + axes.slots(p, t, lo, g, kernel, dilation, w_s, False),
            mask=axes.seen(t, lo, hi, FIRST, False),
            other=0.0,
        )
        acc += _dot(w_tile, axes.load(x, t, g, m, dilation, x_s, D, BLOCK_D), PRECISION)
    axes.store(out + b * o_s[0] + h * o_s[1], p, g, m, dilation, o_s, D, acc * scale, BLOCK_D)


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
    t = axes.walked(first, 0, (1, 1), KEYS, BLOCK_M)
    start, walk = axes.readers(first, m, kernel, stride, causal, KEYS, QUERIES, FIRST)
    w, x = w + b * w_s[0] + h * w_s[1], x + b * x_s[0] + h * x_s[1]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in range(0, walk[0] * walk[1] * walk[2]):
        p = axes.walked(start, step, (walk[1], walk[2]), QUERIES, BLOCK_N)
        lo, hi = axes.window(p, m, kernel, stride, causal, FIRST)
        w_tile = tl.load(
            w + axes.slots(p, t, lo, g, kernel, dilation, w_s, True),
            mask=axes.seen(t, lo, hi, FIRST, True),
            other=0.0,
        )
        acc += _dot(w_tile, axes.load(x, p, g, m, dilation, x_s, D, BLOCK_D), PRECISION)
    axes.store(out + b * o_s[0] + h * o_s[1], t, g, m, dilation, o_s, D, acc * scale, BLOCK_D)


@triton.jit
def _table(
    grad, q, k, v, rpb, lse, delta, w, parts, scale,
    count, heads, D, E, length, kernel, dilation, stride, causal, tiles, g_s, q_s, k_s, v_s, lse_s, w_s,
    walk, units, per_program,
    FIRST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STORED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """parts[part, head, step] = sum of slopes of a tile of queries and one of keys that lies by `step` from it, over the part's
    tiles of queries in all images: an entry of that matrix stands for one relative position. STORED: slopes lie in w.
    """
    step, h, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    if not STORED:
        rpb += biases_before(h, kernel)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for unit in range(part * per_program, tl.minimum((part + 1) * per_program, units)):
        b = (unit // count).to(tl.int64)
        g, m, first = axes.tile(unit % count, length, dilation, tiles, QUERIES)
        p = axes.walked(first, 0, (1, 1), QUERIES, BLOCK_N)
        lo, hi = axes.window(p, m, kernel, stride, causal, FIRST)
        corner = (first[0] - kernel[0] + 1, first[1] - kernel[1] + 1, first[2] - kernel[2] + 1)
        t = axes.walked(corner, step, (walk[1], walk[2]), KEYS, BLOCK_M)
        inside = axes.seen(t, lo, hi, FIRST, False)
        if tl.max(inside.to(tl.int32)) > 0:  # not one such pair here: nothing to read
            if STORED:
                slot = b * w_s[0] + h * w_s[1] + axes.slots(p, t, lo, g, kernel, dilation, w_s, False)
                slopes = tl.load(w + slot, mask=inside, other=0.0).to(tl.float32)
            else:
                q_tile = axes.load(q + b * q_s[0] + h * q_s[1], p, g, m, dilation, q_s, D, BLOCK_D)
                k_tile = axes.load(k + b * k_s[0] + h * k_s[1], t, g, m, dilation, k_s, D, BLOCK_D)
                product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
                s = logits(product, p, t, lo, hi, kernel, rpb, scale, FIRST, True, False)
                place = b * lse_s[0] + h * lse_s[1] + axes.places(p, g, dilation, lse_s)
                real = (p[0] < m[0]) & (p[1] < m[1]) & (p[2] < m[2])
                norm = tl.load(lse + place, mask=real, other=0.0) * LOG2E
                mean = tl.load(delta + place, mask=real, other=0.0)
                g_tile = axes.load(grad + b * g_s[0] + h * g_s[1], p, g, m, dilation, g_s, E, BLOCK_E)
                v_tile = axes.load(v + b * v_s[0] + h * v_s[1], t, g, m, dilation, v_s, E, BLOCK_E)
                slopes = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION) - mean[:, None]
                slopes = tl.exp2(s - norm[:, None]) * slopes
            acc += slopes
    parts += ((part * tl.num_programs(1) + h) * tl.num_programs(0) + step) * BLOCK_N * BLOCK_M
    tl.store(parts + tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :], acc)
