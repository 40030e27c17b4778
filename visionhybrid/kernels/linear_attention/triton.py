"""Linear attention on a GPU: three kernels, each used forward and backward.

    _outer   sum over tokens of phi(x)^T y and of phi(x)     the state of keys and values; gradient of the state
    _apply   phi(x) S, divided or not                        the output; gradient of the values
    _pull    gradient of x from that of phi(x) S             gradients of queries and keys

A program holds whole rows of D, so softmax features need no second pass; E is cut into tiles. `_outer` splits the sequence
over programs and the parts are added in a fixed order: no atomics, the same result every time. Everything is bound by
memory (32 operations a byte at D = 64), so products of half-precision inputs run in TF32, which holds them exactly and
rounds features and state less than half precision would; those of float32 inputs in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionhybrid.kernels.linear_attention import ops
from visionhybrid.kernels.linear_attention.ops import like, like_or_empty

INTERPRETED = triton.knobs.runtime.interpret
WIDEST = 256
# Programs to fill a GPU with when a sequence is split; more than any has multiprocessors.
PROGRAMS = 512


@triton.jit
def _rows(base, rows, columns, stride_row, stride_column, real, width):
    """(rows, columns) in float32; zero where a row is not real or a column beyond the width."""
    place = rows[:, None].to(tl.int64) * stride_row + columns[None, :] * stride_column
    return tl.load(base + place, mask=real[:, None] & (columns < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _features(x, real, columns, width, FEATURES: tl.constexpr):
    """phi of whole rows, zero where there is nothing."""
    if FEATURES == "elu":
        x = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    elif FEATURES == "relu":
        x = tl.maximum(x, 0.0)
    elif FEATURES == "softmax":
        x = tl.where((columns < width)[None, :], x, float("-inf"))
        x = tl.exp(x - tl.max(x, 1)[:, None])
        x = x / tl.sum(x, 1)[:, None]
    return tl.where(real[:, None] & (columns < width)[None, :], x, 0.0)


@triton.jit
def _before_features(grad, phi, FEATURES: tl.constexpr):
    if FEATURES == "elu":
        grad = grad * tl.minimum(phi, 1.0)
    elif FEATURES == "relu":
        grad = tl.where(phi > 0, grad, 0.0)
    elif FEATURES == "softmax":
        grad = phi * (grad - tl.sum(grad * phi, 1)[:, None])
    return grad


@triton.jit
def _outer(
    x, y, rotated, keep, weights, out,
    heads, length, per_program, D, E,
    x_sb, x_sh, x_sn, x_sd, y_sb, y_sh, y_sn, y_se, r_sb, r_sh, r_sn, r_sd, keep_sb,
    FEATURES: tl.constexpr, ROTATED: tl.constexpr, KEEP: tl.constexpr, WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out[split, head] = sum over the split's tokens of [w_i r_i^T y_i | s_i phi(x_i)], r = rotated or phi(x)."""
    part, tile, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = head // heads, head % heads
    d, e = tl.arange(0, BLOCK_D), tile * BLOCK_E + tl.arange(0, BLOCK_E)
    state = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    first = part * per_program
    last = tl.minimum(first + per_program, length)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        real = n < last
        if KEEP:
            real = real & (tl.load(keep + b * keep_sb + n, mask=real, other=0) != 0)
        phi = _features(_rows(x + b * x_sb + h * x_sh, n, d, x_sn, x_sd, real, D), real, d, D, FEATURES)
        y_tile = _rows(y + b * y_sb + h * y_sh, n, e, y_sn, y_se, real, E)
        numerator = phi
        if ROTATED:
            numerator = _rows(rotated + b * r_sb + h * r_sh, n, d, r_sn, r_sd, real, D)
        if WEIGHTED:
            place = weights + (head * length + n) * 2
            numerator = numerator * tl.load(place, mask=real, other=0.0)[:, None]
            phi = phi * tl.load(place + 1, mask=real, other=0.0)[:, None]
        state += tl.dot(tl.trans(numerator), y_tile, input_precision=PRECISION)
        total += tl.sum(phi, 0)
    out += (part.to(tl.int64) * tl.num_programs(2) + head) * D * (E + 1)
    tl.store(out + d[:, None] * (E + 1) + e[None, :], state, mask=(d < D)[:, None] & (e < E)[None, :])
    if tile == 0:
        tl.store(out + d * (E + 1) + E, total, mask=d < D)


@triton.jit
def _apply(
    x, rotated, keep, state, out, eps,
    heads, length, D, E,
    x_sb, x_sh, x_sn, x_sd, r_sb, r_sh, r_sn, r_sd, o_sb, o_sh, o_sn, o_se, keep_sb,
    FEATURES: tl.constexpr, ROTATED: tl.constexpr, KEEP: tl.constexpr, NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out_i = r_i S, divided by phi(x_i) . z + eps if NORMALISE; zero where not kept."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(2).to(tl.int64)
    b, h = head // heads, head % heads
    d, e = tl.arange(0, BLOCK_D), tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = n < length
    real = inside
    if KEEP:
        real = real & (tl.load(keep + b * keep_sb + n, mask=real, other=0) != 0)
    state += head * D * (E + 1)
    s_tile = tl.load(
        state + d[:, None] * (E + 1) + e[None, :], mask=(d < D)[:, None] & (e < E)[None, :], other=0.0
    )
    if ROTATED:
        numerator = _rows(rotated + b * r_sb + h * r_sh, n, d, r_sn, r_sd, real, D)
    if NORMALISE or not ROTATED:
        phi = _features(_rows(x + b * x_sb + h * x_sh, n, d, x_sn, x_sd, real, D), real, d, D, FEATURES)
        if not ROTATED:
            numerator = phi
    product = tl.dot(numerator, s_tile, input_precision=PRECISION)
    if NORMALISE:
        z = tl.load(state + d * (E + 1) + E, mask=d < D, other=0.0)
        product = product / (tl.sum(phi * z[None, :], 1) + eps)[:, None]
    place = b * o_sb + h * o_sh + n[:, None].to(tl.int64) * o_sn + e[None, :] * o_se
    tl.store(out + place, product, mask=inside[:, None] & (e < E)[None, :])


@triton.jit
def _pull(
    x, y, rotated, keep, state, dx, drotated, weights, eps,
    heads, length, D, E,
    x_sb, x_sh, x_sn, x_sd, y_sb, y_sh, y_sn, y_se, r_sb, r_sh, r_sn, r_sd, g_sb, g_sh, g_sn, g_sd,
    p_sb, p_sh, p_sn, p_sd, keep_sb,
    FEATURES: tl.constexpr, ROTATED: tl.constexpr, KEEP: tl.constexpr, MODE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dx through phi from y S^T.

    MODE "keys": the state's gradient is S, z; its column z adds to every key's. "divided": queries whose output was divided
    by phi(x) . z + eps; also stores the two weights with which _outer sums the state's gradient. "plain": undivided.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    d = tl.arange(0, BLOCK_D)
    inside = n < length
    real = inside
    if KEEP:
        real = real & (tl.load(keep + b * keep_sb + n, mask=real, other=0) != 0)
    state += head * D * (E + 1)
    pulled = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        y_tile = _rows(y + b * y_sb + h * y_sh, n, e, y_sn, y_se, real, E)
        s_tile = tl.load(
            state + d[None, :] * (E + 1) + e[:, None], mask=(d < D)[None, :] & (e < E)[:, None], other=0.0
        )
        pulled += tl.dot(y_tile, s_tile, input_precision=PRECISION)
    phi = _features(_rows(x + b * x_sb + h * x_sh, n, d, x_sn, x_sd, real, D), real, d, D, FEATURES)
    grad = pulled
    if MODE != "plain":
        z = tl.load(state + d * (E + 1) + E, mask=d < D, other=0.0)
        through_z = tl.zeros([BLOCK_N, BLOCK_D], tl.float32) + z[None, :]
        if MODE == "divided":
            numerator = phi
            if ROTATED:
                numerator = _rows(rotated + b * r_sb + h * r_sh, n, d, r_sn, r_sd, real, D)
            inverse = 1 / (tl.sum(phi * z[None, :], 1) + eps)
            pulled = pulled * inverse[:, None]
            # out . y = numerator . (y S^T) / normaliser, so the output need not be kept.
            dnormaliser = -tl.sum(numerator * pulled, 1) * inverse
            through_z = through_z * dnormaliser[:, None]
            place = weights + (head * length + n) * 2
            tl.store(place, inverse, mask=inside)
            tl.store(place + 1, dnormaliser, mask=inside)
        grad = through_z
        if not ROTATED:
            grad = grad + pulled
    grad = tl.where(real[:, None], _before_features(grad, phi, FEATURES), 0.0)
    wanted = inside[:, None] & (d < D)[None, :]
    place = b * g_sb + h * g_sh + n[:, None].to(tl.int64) * g_sn + d[None, :] * g_sd
    tl.store(dx + place, grad, mask=wanted)
    if ROTATED:
        place = b * p_sb + h * p_sh + n[:, None].to(tl.int64) * p_sn + d[None, :] * p_sd
        tl.store(drotated + place, tl.where(real[:, None], pulled, 0.0), mask=wanted)


def blocks(D: int, E: int, exact: bool, walks: bool = False) -> dict[str, int]:
    """Tile sizes and warps: rows of D whole, fewer of them as they get longer; `walks` for the kernel that loops over E.

    `exact` float32 products run without matrix units, from registers: larger tiles than these spill (tests/test_aot.py).
    """
    block_d = max(16, triton.next_power_of_2(D))
    if exact:
        rows, columns = 16 if block_d > 128 or (walks and block_d == 128) else 32, 32
    else:
        rows = 64 if block_d <= 64 else 32 if block_d == 128 and not walks else 16
        columns = 32 if walks or block_d > 128 else 64
    return dict(
        BLOCK_N=rows,
        BLOCK_D=block_d,
        BLOCK_E=min(max(16, triton.next_power_of_2(E)), columns),
        num_warps=4 if block_d <= 32 else 8,
    )


def _constants(
    x: Tensor, E: int, feature_map: str, rotated: Tensor | None, keep: Tensor | None, walks: bool = False
) -> dict[str, Any]:
    exact = x.dtype == torch.float32
    return dict(
        FEATURES=feature_map,
        ROTATED=rotated is not None,
        KEEP=keep is not None,
        PRECISION="ieee" if exact else "tf32",
        **blocks(x.shape[3], E, exact, walks),
    )


def _strides(*tensors: Tensor | None) -> list[int]:
    return [stride for x in tensors for stride in ((0, 0, 0, 0) if x is None else x.stride())]


def _sum_outer(
    x: Tensor,
    y: Tensor,
    rotated: Tensor | None,
    keep: Tensor | None,
    weights: Tensor | None,
    feature_map: str,
) -> Tensor:
    B, heads, N, D = x.shape
    E = y.shape[3]
    constants = _constants(x, E, feature_map, rotated, keep)
    tiles = triton.cdiv(E, constants["BLOCK_E"])
    steps = triton.cdiv(N, constants["BLOCK_N"])
    per_program = (
        triton.cdiv(steps, min(steps, triton.cdiv(PROGRAMS, tiles * B * heads))) * constants["BLOCK_N"]
    )
    splits = triton.cdiv(N, per_program)
    out = torch.empty(splits, B, heads, D, E + 1, device=x.device, dtype=torch.float32)
    _outer[splits, tiles, B * heads](
        x, y, rotated, keep, weights, out, heads, N, per_program, D, E,
        *_strides(x, y, rotated), 0 if keep is None else keep.stride(0), WEIGHTED=weights is not None, **constants,
    )  # fmt: skip
    return out.sum(0)


def _run_apply(
    x: Tensor, state: Tensor, rotated: Tensor | None, keep: Tensor | None, out: Tensor,
    feature_map: str, normalise: bool, eps: float,
) -> Tensor:  # fmt: skip
    B, heads, N, D = x.shape
    E = out.shape[3]
    constants = _constants(x, E, feature_map, rotated, keep)
    grid = (triton.cdiv(N, constants["BLOCK_N"]), triton.cdiv(E, constants["BLOCK_E"]), B * heads)
    _apply[grid](
        x, rotated, keep, state.contiguous(), out, eps, heads, N, D, E,
        *_strides(x, rotated, out), 0 if keep is None else keep.stride(0), NORMALISE=normalise, **constants,
    )  # fmt: skip
    return out


def _run_pull(
    x: Tensor, y: Tensor, state: Tensor, rotated: Tensor | None, keep: Tensor | None,
    feature_map: str, mode: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x and of what stood in for its features, and the weights of "divided"."""
    B, heads, N, D = x.shape
    dx, drotated = like(x, D), like_or_empty(rotated, x)
    weights = torch.empty(B, heads, N, 2, device=x.device, dtype=torch.float32)
    constants = _constants(x, y.shape[3], feature_map, rotated, keep, walks=True)
    _pull[triton.cdiv(N, constants["BLOCK_N"]), B * heads](
        x, y, rotated, keep, state.contiguous(), dx, drotated, weights, eps, heads, N, D, y.shape[3],
        *_strides(x, y, rotated, dx, None if rotated is None else drotated),
        0 if keep is None else keep.stride(0), MODE=mode, **constants,
    )  # fmt: skip
    return dx, drotated, weights


def state(k: Tensor, v: Tensor, k_rotated: Tensor | None, keep: Tensor | None, feature_map: str) -> Tensor:
    return _sum_outer(k, v, k_rotated, keep if keep is None else keep.contiguous(), None, feature_map)


def state_backward(
    grad: Tensor, k: Tensor, v: Tensor, k_rotated: Tensor | None, keep: Tensor | None, feature_map: str
) -> tuple[Tensor, Tensor, Tensor]:
    keep = keep if keep is None else keep.contiguous()
    dk, dk_rotated, _ = _run_pull(k, v, grad, k_rotated, keep, feature_map, "keys", 0.0)
    dv = _run_apply(k, grad, k_rotated, keep, like(v, v.shape[3]), feature_map, False, 0.0)
    return dk, dv, dk_rotated


def apply(
    q: Tensor, state: Tensor, q_rotated: Tensor | None, feature_map: str, normalise: bool, eps: float
) -> Tensor:
    out = like(q, state.shape[3] - 1)
    return _run_apply(q, state, q_rotated, None, out, feature_map, normalise, eps)


def apply_backward(
    grad: Tensor,
    q: Tensor,
    state: Tensor,
    q_rotated: Tensor | None,
    feature_map: str,
    normalise: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mode = "divided" if normalise else "plain"
    dq, dq_rotated, weights = _run_pull(q, grad, state, q_rotated, None, feature_map, mode, eps)
    dstate = _sum_outer(q, grad, q_rotated, None, weights if normalise else None, feature_map)
    if not normalise:
        dstate[..., -1] = 0
    return dq, dstate, dq_rotated


OPERATORS = ops.define("triton", state, state_backward, apply, apply_backward)


def unsupported(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> str | None:
    if not (q.is_cuda or INTERPRETED):
        return "needs a GPU, or TRITON_INTERPRET=1"
    if q.dtype == torch.float64:
        return "computes in float32"
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return f"head dims end at {WIDEST}, got {max(q.shape[3], v.shape[3])}"
    return None


def forward(*args: Any) -> Tensor:
    return ops.compose(OPERATORS, *args)
