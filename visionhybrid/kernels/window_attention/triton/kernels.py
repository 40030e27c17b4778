"""The kernels: windows are read from the map where they lie, the attention matrix stays in registers.

    _fwd         output and log2 of each softmax's normaliser; one program a block of queries of one window and head
    _bwd_q       gradient of the queries, and grad . out of each query; the same blocks
    _bwd_kv      gradients of keys and values; one program a block of the map's keys, over all windows that see them
    _bwd_bias    gradient of the bias; one program a tile of it, over its share of all windows

`n` is the place of a query in its window, `m` that of a key in the window of keys, (wy, wx) a window in the grid, all row by
row. `shape` is the map's (H, W), `grid` its windows, `window` and `reach` the sizes of both kinds of window.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
OUTSIDE = tl.constexpr(-100.0)  # logit between pieces of a shifted window, as Swin's and HAT's code has it


@triton.jit
def _rows(base, row, column, d, strides, real, width):
    """(tokens, BLOCK_D) at (row, column) of an image's map of one head; zeros where not `real`."""
    place = row.to(tl.int64) * strides[1] + column.to(tl.int64) * strides[2]
    return tl.load(
        base + place[:, None] + d[None, :] * strides[4], mask=real[:, None] & (d < width)[None, :], other=0.0
    )


@triton.jit
def _put(base, row, column, d, strides, real, width, values):
    place = row.to(tl.int64) * strides[1] + column.to(tl.int64) * strides[2]
    tl.store(
        base + place[:, None] + d[None, :] * strides[4], values, mask=real[:, None] & (d < width)[None, :]
    )


@triton.jit
def _image(base, b, h, strides):
    return base + b * strides[0] + h * strides[3]


@triton.jit
def _queries(n, wy, wx, window: tl.constexpr, shift, shape):
    """Map coordinates of tokens of window (wy, wx)."""
    row, column = wy * window[0] + n // window[1] + shift[0], wx * window[1] + n % window[1] + shift[1]
    return tl.where(row < shape[0], row, row - shape[0]), tl.where(
        column < shape[1], column, column - shape[1]
    )


@triton.jit
def _keys(m, wy, wx, window: tl.constexpr, reach: tl.constexpr, shift, shape):
    """Map coordinates of keys of window (wy, wx), and which lie on the map: the others are keys of zeros."""
    row = wy * window[0] - (reach[0] - window[0]) // 2 + m // reach[1] + shift[0]
    column = wx * window[1] - (reach[1] - window[1]) // 2 + m % reach[1] + shift[1]
    # A shift excludes a larger reach, so a key beyond the map is either wrapped or outside.
    row, column = (
        tl.where((shift[0] > 0) & (row >= shape[0]), row - shape[0], row),
        tl.where((shift[1] > 0) & (column >= shape[1]), column - shape[1], column),
    )
    return row, column, (row >= 0) & (row < shape[0]) & (column >= 0) & (column < shape[1])


@triton.jit
def _piece(n, wy, wx, grid, window: tl.constexpr, shift):
    """Which piece of a shifted window a token belongs to: 1 below the seam in the last row, 2 right of it in the last column."""
    below = (wy == grid[0] - 1) & (shift[0] > 0) & (n // window[1] >= window[0] - shift[0])
    right = (wx == grid[1] - 1) & (shift[1] > 0) & (n % window[1] >= window[1] - shift[1])
    return below.to(tl.int32) + 2 * right.to(tl.int32)


@triton.jit
def _logits(
    product, n, m, wy, wx, grid, window: tl.constexpr, reach: tl.constexpr, shift, scale, bias,
    BIAS: tl.constexpr, SHIFTED: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Base-2 logits from q k^T (or k q^T), -inf for keys beyond the window; `n` and `m` are places in window and reach."""
    queries, keys = window[0] * window[1], reach[0] * reach[1]
    if KEYS_FIRST:
        n_axis, m_axis = n[None, :], m[:, None]
    else:
        n_axis, m_axis = n[:, None], m[None, :]
    real = (m_axis >= 0) & (m_axis < keys)
    logits = product * (scale * LOG2E)
    if BIAS:
        place = bias + n_axis * keys + m_axis
        logits += tl.load(place, mask=(n_axis < queries) & real, other=0.0).to(tl.float32) * LOG2E
    if SHIFTED:
        apart = _piece(n_axis, wy, wx, grid, window, shift) != _piece(m_axis, wy, wx, grid, window, shift)
        logits += tl.where(apart, OUTSIDE * LOG2E, 0.0)
    return tl.where(real, logits, float("-inf"))


@triton.jit
def _fwd(
    q, k, v, bias, out, lse, scale,
    shape, grid, heads, D, E, shift, q_s, k_s, v_s, o_s,
    window: tl.constexpr, reach: tl.constexpr, BIAS: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    h, place = tl.program_id(0) % heads, (tl.program_id(0) // heads).to(tl.int64)
    queries, keys = window[0] * window[1], reach[0] * reach[1]
    blocks = tl.cdiv(queries, BLOCK_N)
    n = (place % blocks).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    number = place // blocks  # of the window, over all images
    wx, wy = (number % grid[1]).to(tl.int32), (number // grid[1] % grid[0]).to(tl.int32)
    b = number // (grid[0] * grid[1])
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    if BIAS:
        bias += h * (queries * keys)
    row, column = _queries(n, wy, wx, window, shift, shape)
    q_tile = _rows(_image(q, b, h, q_s), row, column, d, q_s, n < queries, D)
    k, v = _image(k, b, h, k_s), _image(v, b, h, v_s)
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for start in range(0, keys, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        k_row, k_column, on_map = _keys(m, wy, wx, window, reach, shift, shape)
        on_map = on_map & (m < keys)
        k_tile = _rows(k, k_row, k_column, d, k_s, on_map, D)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        logits = _logits(
            product, n, m, wy, wx, grid, window, reach, shift, scale, bias,
            BIAS, SHIFTED, False,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weights, 1)
        v_tile = _rows(v, k_row, k_column, e, v_s, on_map, E)
        acc = acc * fade[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        top = higher
    acc = acc / total[:, None]
    _put(_image(out, b, h, o_s), row, column, e, o_s, n < queries, E, acc)
    tl.store(lse + (number * heads + h) * queries + n, top + tl.log2(total), mask=n < queries)


@triton.jit
def _bwd_q(
    grad, q, k, v, bias, out, lse, delta, dq, scale,
    shape, grid, heads, D, E, shift, g_s, q_s, k_s, v_s, o_s, dq_s,
    window: tl.constexpr, reach: tl.constexpr, BIAS: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    h, place = tl.program_id(0) % heads, (tl.program_id(0) // heads).to(tl.int64)
    queries, keys = window[0] * window[1], reach[0] * reach[1]
    blocks = tl.cdiv(queries, BLOCK_N)
    n = (place % blocks).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    number = place // blocks
    wx, wy = (number % grid[1]).to(tl.int32), (number // grid[1] % grid[0]).to(tl.int32)
    b = number // (grid[0] * grid[1])
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    if BIAS:
        bias += h * (queries * keys)
    own = n < queries
    row, column = _queries(n, wy, wx, window, shift, shape)
    q_tile = _rows(_image(q, b, h, q_s), row, column, d, q_s, own, D)
    g_tile = _rows(_image(grad, b, h, g_s), row, column, e, g_s, own, E)
    o_tile = _rows(_image(out, b, h, o_s), row, column, e, o_s, own, E)
    # sum_j weight_j grad . v_j, which the slope of a softmax needs, is grad . out
    mean = tl.sum(g_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    entry = (number * heads + h) * queries + n
    tl.store(delta + entry, mean, mask=own)
    norm = tl.load(lse + entry, mask=own, other=0.0)
    k, v = _image(k, b, h, k_s), _image(v, b, h, v_s)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, keys, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        k_row, k_column, on_map = _keys(m, wy, wx, window, reach, shift, shape)
        on_map = on_map & (m < keys)
        k_tile = _rows(k, k_row, k_column, d, k_s, on_map, D)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        logits = _logits(
            product, n, m, wy, wx, grid, window, reach, shift, scale, bias,
            BIAS, SHIFTED, False,
        )  # fmt: skip
        v_tile = _rows(v, k_row, k_column, e, v_s, on_map, E)
        slopes = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION) - mean[:, None]
        slopes = tl.exp2(logits - norm[:, None]) * slopes
        acc += tl.dot(slopes.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    _put(_image(dq, b, h, dq_s), row, column, d, dq_s, own, D, acc * scale)


@triton.jit
def _bwd_kv(
    grad, q, k, v, bias, lse, delta, dk, dv, scale,
    shape, grid, heads, D, E, shift, g_s, q_s, k_s, v_s, dk_s, dv_s,
    window: tl.constexpr, reach: tl.constexpr, BIAS: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    h, place = tl.program_id(0) % heads, (tl.program_id(0) // heads).to(tl.int64)
    queries, keys = window[0] * window[1], reach[0] * reach[1]
    pad_y, pad_x = (reach[0] - window[0]) // 2, (reach[1] - window[1]) // 2
    blocks = tl.cdiv(queries, BLOCK_M)
    first = (place % blocks).to(tl.int32) * BLOCK_M
    own = first + tl.arange(0, BLOCK_M)  # places in the window whose centre these keys are in
    number = place // blocks
    cx, cy = (number % grid[1]).to(tl.int32), (number // grid[1] % grid[0]).to(tl.int32)
    b = number // (grid[0] * grid[1])
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    if BIAS:
        bias += h * (queries * keys)
    row, column = _queries(own, cy, cx, window, shift, shape)
    k_tile = _rows(_image(k, b, h, k_s), row, column, d, k_s, own < queries, D)
    v_tile = _rows(_image(v, b, h, v_s), row, column, e, v_s, own < queries, E)
    grad, q = _image(grad, b, h, g_s), _image(q, b, h, q_s)
    # Windows that reach these rows, and this window's columns.
    last = tl.minimum(first + BLOCK_M, queries) - 1
    top = tl.maximum(cy - (reach[0] - 1 - pad_y - first // window[1]) // window[0], 0)
    end = tl.minimum(cy + (last // window[1] + pad_y) // window[0], grid[0] - 1) + 1
    left = tl.maximum(cx - (reach[1] - 1 - pad_x) // window[1], 0)
    across = tl.minimum(cx + (window[1] - 1 + pad_x) // window[1], grid[1] - 1) + 1 - left
    steps = tl.cdiv(queries, BLOCK_N)
    dk_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for step in range(0, (end - top) * across * steps):
        wy, wx = top + step // (steps * across), left + step // steps % across
        n = step % steps * BLOCK_N + tl.arange(0, BLOCK_N)
        y, x = (
            own // window[1] + (cy - wy) * window[0] + pad_y,
            own % window[1] + (cx - wx) * window[1] + pad_x,
        )
        seen = (own < queries) & (y >= 0) & (y < reach[0]) & (x >= 0) & (x < reach[1])
        m = tl.where(seen, y * reach[1] + x, keys)
        q_row, q_column = _queries(n, wy, wx, window, shift, shape)
        q_tile = _rows(q, q_row, q_column, d, q_s, n < queries, D)
        product = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        logits = _logits(
            product, n, m, wy, wx, grid, window, reach, shift, scale, bias,
            BIAS, SHIFTED, True,
        )  # fmt: skip
        entry = (((b * grid[0] + wy) * grid[1] + wx) * heads + h) * queries + n
        norm = tl.load(lse + entry, mask=n < queries, other=0.0)
        mean = tl.load(delta + entry, mask=n < queries, other=0.0)
        weights = tl.exp2(logits - norm[None, :])
        g_tile = _rows(grad, q_row, q_column, e, g_s, n < queries, E)
        dv_acc += tl.dot(weights.to(g_tile.dtype), g_tile, input_precision=PRECISION)
        slopes = weights * (tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION) - mean[None, :])
        dk_acc += tl.dot(slopes.to(q_tile.dtype), q_tile, input_precision=PRECISION)
    _put(_image(dk, b, h, dk_s), row, column, d, dk_s, own < queries, D, dk_acc * scale)
    _put(_image(dv, b, h, dv_s), row, column, e, dv_s, own < queries, E, dv_acc)


@triton.jit
def _bwd_bias(
    grad, q, k, v, bias, lse, delta, parts, scale,
    shape, grid, heads, D, E, shift, g_s, q_s, k_s, v_s, windows, per_program,
    window: tl.constexpr, reach: tl.constexpr, BIAS: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    h, tile, part = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    queries, keys = window[0] * window[1], reach[0] * reach[1]
    columns = tl.cdiv(keys, BLOCK_M)
    n, m = tile // columns * BLOCK_N + tl.arange(0, BLOCK_N), tile % columns * BLOCK_M + tl.arange(0, BLOCK_M)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    if BIAS:
        bias += h * (queries * keys)
    own = n < queries
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for number in range(part * per_program, tl.minimum((part + 1) * per_program, windows)):
        wx, wy = (number % grid[1]).to(tl.int32), (number // grid[1] % grid[0]).to(tl.int32)
        b = number // (grid[0] * grid[1])
        row, column = _queries(n, wy, wx, window, shift, shape)
        k_row, k_column, on_map = _keys(m, wy, wx, window, reach, shift, shape)
        on_map = on_map & (m < keys)
        q_tile = _rows(_image(q, b, h, q_s), row, column, d, q_s, own, D)
        k_tile = _rows(_image(k, b, h, k_s), k_row, k_column, d, k_s, on_map, D)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        logits = _logits(
            product, n, m, wy, wx, grid, window, reach, shift, scale, bias,
            BIAS, SHIFTED, False,
        )  # fmt: skip
        entry = (number * heads + h) * queries + n
        norm = tl.load(lse + entry, mask=own, other=0.0)
        mean = tl.load(delta + entry, mask=own, other=0.0)
        g_tile = _rows(_image(grad, b, h, g_s), row, column, e, g_s, own, E)
        v_tile = _rows(_image(v, b, h, v_s), k_row, k_column, e, v_s, on_map, E)
        slopes = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION) - mean[:, None]
        acc += tl.exp2(logits - norm[:, None]) * slopes
    parts += (part * heads + h) * queries * keys
    tl.store(parts + n[:, None] * keys + m[None, :], acc, mask=own[:, None] & (m < keys)[None, :])
