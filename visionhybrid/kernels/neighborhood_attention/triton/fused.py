"""Kernels of the whole operator: forward, and backward from recomputed weights. A tile of queries meets the run of keys that
covers its windows, tile by tile; what a query must not see is masked.

    _fwd       output and log-sum-exp, a program a tile of queries
    _bwd_q     gradient of q, and grad . out of each query
    _bwd_kv    gradients of k and v, a program a tile of keys, over the queries that can see it
    _bwd_extra    gradients of the extra keys and values, which every query sees, over a part of the queries
"""

from __future__ import annotations

import triton
import triton.language as tl

from visionhybrid.kernels.neighborhood_attention.triton import axes

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def logits(
    product,
    p,
    t,
    lo,
    hi,
    kernel,
    rpb,
    scale,
    FIRST: tl.constexpr,
    BIAS: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """Base-2 scores, -inf where a query does not see a key."""
    inside = axes.seen(t, lo, hi, FIRST, KEYS_FIRST)
    product = product * (scale * LOG2E)
    if BIAS:
        # Row key - query + kernel - 1 on each axis: linear in both.
        rows1, rows2 = 2 * kernel[1] - 1, 2 * kernel[2] - 1
        query = ((p[0] - kernel[0] + 1) * rows1 + p[1] - kernel[1] + 1) * rows2 + p[2] - kernel[2] + 1
        key = (t[0] * rows1 + t[1]) * rows2 + t[2]
        row = key[:, None] - query[None, :] if KEYS_FIRST else key[None, :] - query[:, None]
        product += tl.load(rpb + row, mask=inside, other=0.0).to(tl.float32) * LOG2E
    return tl.where(inside, product, float("-inf"))


@triton.jit
def biases_before(h, kernel):
    """How many relative position biases lie before those of head `h`. (Triton 3.6 returns no pointer that may be None.)"""
    return h * (2 * kernel[0] - 1) * (2 * kernel[1] - 1) * (2 * kernel[2] - 1)


@triton.jit
def _absorbed(s, v_tile, top, total, acc, PRECISION: tl.constexpr):
    """Greatest score, sum of weights and of weighted values so far, with base-2 scores `s` of further keys."""
    higher = tl.maximum(top, tl.max(s, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
    weights = tl.exp2(s - base[:, None])
    fade = tl.exp2(top - base)
    acc = acc * fade[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)
    return higher, total * fade + tl.sum(weights, 1), acc


@triton.jit
def _fwd(
    q, k, v, rpb, kx, vx, out, lse, scale,
    count, heads, D, E, extra, length, kernel, dilation, stride, causal, tiles,
    q_s, k_s, v_s, o_s, lse_s, kx_s, vx_s,
    FIRST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BIAS: tl.constexpr, EXTRA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    number, head = tl.program_id(0) % count, (tl.program_id(0) // count).to(tl.int64)
    b, h = head // heads, head % heads
    g, m, first = axes.tile(number, length, dilation, tiles, QUERIES)
    p = axes.walked(first, 0, (1, 1), QUERIES, BLOCK_N)
    lo, hi = axes.window(p, m, kernel, stride, causal, FIRST)
    start, walk = axes.span(lo, hi, KEYS)
    real = (p[0] < m[0]) & (p[1] < m[1]) & (p[2] < m[2])
    q_tile = axes.load(q + b * q_s[0] + h * q_s[1], p, g, m, dilation, q_s, D, BLOCK_D)
    k, v = k + b * k_s[0] + h * k_s[1], v + b * v_s[0] + h * v_s[1]
    if BIAS:
        rpb += biases_before(h, kernel)
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for step in range(0, walk[0] * walk[1] * walk[2]):
        t = axes.walked(start, step, (walk[1], walk[2]), KEYS, BLOCK_M)
        product = tl.dot(
            q_tile, tl.trans(axes.load(k, t, g, m, dilation, k_s, D, BLOCK_D)), input_precision=PRECISION
        )
        s = logits(product, p, t, lo, hi, kernel, rpb, scale, FIRST, BIAS, False)
        v_tile = axes.load(v, t, g, m, dilation, v_s, E, BLOCK_E)
        top, total, acc = _absorbed(s, v_tile, top, total, acc, PRECISION)
    if EXTRA:
        kx, vx = kx + b * kx_s[0] + h * kx_s[1], vx + b * vx_s[0] + h * vx_s[1]
        for first_key in range(0, extra, BLOCK_M):
            i = first_key + tl.arange(0, BLOCK_M)
            k_tile = axes.load_extra(kx, i, extra, kx_s, D, BLOCK_D)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
            s = tl.where((i < extra)[None, :], s, float("-inf"))
            v_tile = axes.load_extra(vx, i, extra, vx_s, E, BLOCK_E)
            top, total, acc = _absorbed(s, v_tile, top, total, acc, PRECISION)
    total = tl.where(real, total, 1.0)
    axes.store(out + b * o_s[0] + h * o_s[1], p, g, m, dilation, o_s, E, acc / total[:, None], BLOCK_E)
    place = b * lse_s[0] + h * lse_s[1] + axes.places(p, g, dilation, lse_s)
    tl.store(lse + place, (top + tl.log2(total)) / LOG2E, mask=real)


@triton.jit
def _bwd_q(
    grad, q, k, v, rpb, kx, vx, out, lse, delta, dq, scale,
    count, heads, D, E, extra, length, kernel, dilation, stride, causal, tiles,
    g_s, q_s, k_s, v_s, o_s, lse_s, dq_s, kx_s, vx_s,
    FIRST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BIAS: tl.constexpr, EXTRA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    number, head = tl.program_id(0) % count, (tl.program_id(0) // count).to(tl.int64)
    b, h = head // heads, head % heads
    g, m, first = axes.tile(number, length, dilation, tiles, QUERIES)
    p = axes.walked(first, 0, (1, 1), QUERIES, BLOCK_N)
    lo, hi = axes.window(p, m, kernel, stride, causal, FIRST)
    start, walk = axes.span(lo, hi, KEYS)
    real = (p[0] < m[0]) & (p[1] < m[1]) & (p[2] < m[2])
    q_tile = axes.load(q + b * q_s[0] + h * q_s[1], p, g, m, dilation, q_s, D, BLOCK_D)
    g_tile = axes.load(grad + b * g_s[0] + h * g_s[1], p, g, m, dilation, g_s, E, BLOCK_E)
    mean = tl.sum(
        g_tile.to(tl.float32)
        * axes.load(out + b * o_s[0] + h * o_s[1], p, g, m, dilation, o_s, E, BLOCK_E).to(tl.float32),
        1,
    )
    place = b * lse_s[0] + h * lse_s[1] + axes.places(p, g, dilation, lse_s)
    tl.store(delta + place, mean, mask=real)
    norm = tl.load(lse + place, mask=real, other=0.0) * LOG2E
    k, v = k + b * k_s[0] + h * k_s[1], v + b * v_s[0] + h * v_s[1]
    if BIAS:
        rpb += biases_before(h, kernel)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for step in range(0, walk[0] * walk[1] * walk[2]):
        t = axes.walked(start, step, (walk[1], walk[2]), KEYS, BLOCK_M)
        k_tile = axes.load(k, t, g, m, dilation, k_s, D, BLOCK_D)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        s = logits(product, p, t, lo, hi, kernel, rpb, scale, FIRST, BIAS, False)
        slopes = tl.dot(
            g_tile, tl.trans(axes.load(v, t, g, m, dilation, v_s, E, BLOCK_E)), input_precision=PRECISION
        )
        slopes = tl.exp2(s - norm[:, None]) * (slopes - mean[:, None])
        acc += tl.dot(slopes.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    if EXTRA:
        kx, vx = kx + b * kx_s[0] + h * kx_s[1], vx + b * vx_s[0] + h * vx_s[1]
        for first_key in range(0, extra, BLOCK_M):
            i = first_key + tl.arange(0, BLOCK_M)
            k_tile = axes.load_extra(kx, i, extra, kx_s, D, BLOCK_D)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
            v_tile = axes.load_extra(vx, i, extra, vx_s, E, BLOCK_E)
            slopes = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
            # Beyond the last key k_tile is 0, and so is what is added.
            slopes = tl.exp2(s - norm[:, None]) * (slopes - mean[:, None])
            acc += tl.dot(slopes.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    axes.store(dq + b * dq_s[0] + h * dq_s[1], p, g, m, dilation, dq_s, D, acc * scale, BLOCK_D)


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
    t = axes.walked(first, 0, (1, 1), KEYS, BLOCK_M)
    start, walk = axes.readers(first, m, kernel, stride, causal, KEYS, QUERIES, FIRST)
    k_tile = axes.load(k + b * k_s[0] + h * k_s[1], t, g, m, dilation, k_s, D, BLOCK_D)
    v_tile = axes.load(v + b * v_s[0] + h * v_s[1], t, g, m, dilation, v_s, E, BLOCK_E)
    q, grad = q + b * q_s[0] + h * q_s[1], grad + b * g_s[0] + h * g_s[1]
    if BIAS:
        rpb += biases_before(h, kernel)
    lse, delta = lse + b * lse_s[0] + h * lse_s[1], delta + b * lse_s[0] + h * lse_s[1]
    dk_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for step in range(0, walk[0] * walk[1] * walk[2]):
        p = axes.walked(start, step, (walk[1], walk[2]), QUERIES, BLOCK_N)
        lo, hi = axes.window(p, m, kernel, stride, causal, FIRST)
        q_tile = axes.load(q, p, g, m, dilation, q_s, D, BLOCK_D)
        product = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        s = logits(product, p, t, lo, hi, kernel, rpb, scale, FIRST, BIAS, True)
        real, place = (p[0] < m[0]) & (p[1] < m[1]) & (p[2] < m[2]), axes.places(p, g, dilation, lse_s)
        norm = tl.load(lse + place, mask=real, other=0.0) * LOG2E
        mean = tl.load(delta + place, mask=real, other=0.0)
        weights = tl.exp2(s - norm[None, :])
        g_tile = axes.load(grad, p, g, m, dilation, g_s, E, BLOCK_E)
        dv_acc += tl.dot(weights.to(g_tile.dtype), g_tile, input_precision=PRECISION)
        slopes = weights * (tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION) - mean[None, :])
        dk_acc += tl.dot(slopes.to(q_tile.dtype), q_tile, input_precision=PRECISION)
    axes.store(dk + b * dk_s[0] + h * dk_s[1], t, g, m, dilation, dk_s, D, dk_acc * scale, BLOCK_D)
    axes.store(dv + b * dv_s[0] + h * dv_s[1], t, g, m, dilation, dv_s, E, dv_acc, BLOCK_E)


@triton.jit
def _bwd_extra(
    grad, q, kx, vx, lse, delta, dkx, dvx, scale,
    D, E, extra, heads, length, tokens, per_program, g_s, q_s, lse_s, kx_s, vx_s,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dkx, dvx[part, b, head]: sums over the part's queries, which need no windows and come as they lie."""
    head, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    b, h = head // heads, head % heads
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k_tile = axes.load_extra(kx + b * kx_s[0] + h * kx_s[1], i, extra, kx_s, D, BLOCK_D)
    v_tile = axes.load_extra(vx + b * vx_s[0] + h * vx_s[1], i, extra, vx_s, E, BLOCK_E)
    q, grad = q + b * q_s[0] + h * q_s[1], grad + b * g_s[0] + h * g_s[1]
    lse, delta = lse + b * lse_s[0] + h * lse_s[1], delta + b * lse_s[0] + h * lse_s[1]
    dk_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for first in range(part * per_program, tl.minimum((part + 1) * per_program, tokens), BLOCK_N):
        p = axes.unflattened(first + tl.arange(0, BLOCK_N), length)
        q_tile = axes.load(q, p, (0, 0, 0), length, (1, 1, 1), q_s, D, BLOCK_D)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * (scale * LOG2E)
        place = axes.places(p, (0, 0, 0), (1, 1, 1), lse_s)
        # Beyond the last token q, grad and delta are 0, and so is what is added.
        norm = tl.load(lse + place, mask=p[0] < length[0], other=0.0) * LOG2E
        mean = tl.load(delta + place, mask=p[0] < length[0], other=0.0)
        weights = tl.exp2(s - norm[None, :])
        g_tile = axes.load(grad, p, (0, 0, 0), length, (1, 1, 1), g_s, E, BLOCK_E)
        dv_acc += tl.dot(weights.to(g_tile.dtype), g_tile, input_precision=PRECISION)
        slopes = weights * (tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION) - mean[None, :])
        dk_acc += tl.dot(slopes.to(q_tile.dtype), q_tile, input_precision=PRECISION)
    row = ((part * tl.num_programs(1) + head) * extra + i)[:, None]
    d, e = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_E)[None, :]
    tl.store(dkx + row * D + d, dk_acc * scale, mask=(i < extra)[:, None] & (d < D))
    tl.store(dvx + row * E + e, dv_acc, mask=(i < extra)[:, None] & (e < E))
