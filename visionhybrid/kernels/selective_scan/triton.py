"""The selective scan on a GPU: a program walks the sequence for a few channels, block after block.

Inside a block of tokens the recurrence is an associative scan of (decay, input) pairs; between blocks a state of N numbers
a channel is carried. The gradient walks the blocks the other way, from the states at block starts that a first pass stores.
Sums over channels (B, C) and batch (A, D, bias) are written per program and added afterwards in a fixed order: no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionhybrid.kernels.selective_scan import ops

INTERPRETED = triton.knobs.runtime.interpret
WIDEST = 256  # states a channel: carried in registers
# Channels and tokens of a tile. The interpreter scans element by element in Python: tiles as small as can show a mistake.
BLOCK_C, BLOCK_L = (4, 16) if INTERPRETED else (8, 128)
# Bits of the mask that holds the directions of the groups.
MOST_GROUPS = 62


@triton.jit
def _join(a0, b0, a1, b1):
    """First (a0, b0), then (a1, b1): h -> a h + b."""
    return a0 * a1, b0 * a1 + b1


@triton.jit
def _join_carried(a0, b0, e0, a1, b1, e1):
    """Also e_t = a_t h_{t-1}, which h_t - b_t would lose to cancellation where the state decays fast."""
    return a0 * a1, b0 * a1 + b1, b0 * a1 + e1


@triton.jit
def _steps(delta, bias, place, real, SOFTPLUS: tl.constexpr):
    """d_t in float32, 0 where there is no token: decay 1, input 0."""
    x = tl.load(delta + place, mask=real, other=0.0).to(tl.float32) + bias[:, None]
    if SOFTPLUS:
        # log1p(y) as log(1 + y) corrected for what 1 + y rounds away; exact enough from y = 1e-9 to e^20.
        y = tl.exp(tl.minimum(x, 20.0))
        one = 1.0 + y
        x = tl.where(
            x > 20.0, x, tl.where(one == 1.0, y, tl.log(one) * (y / tl.where(one == 1.0, 1.0, one - 1.0)))
        )
    return tl.where(real, x, 0.0)


@triton.jit
def _column(table, columns, n):
    """Column n of a tile held in registers."""
    return tl.sum(tl.where(columns[None, :] == n, table, 0.0), 1)


@triton.jit
def _fwd(
    u, delta, A, B, C, D, bias, out, starts, directions,
    channels, per_group, length, N,
    u_sb, u_sc, u_sl, d_sb, d_sc, d_sl, B_sb, B_sg, B_sn, B_sl, C_sb, C_sg, C_sn, C_sl,
    STATES: tl.constexpr, STARTS: tl.constexpr, SKIP: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y or, if STATES, h; or, if STARTS, only the states before each block, (batch, channels, blocks, N)."""
    group, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = group.to(tl.int64) * per_group + inside
    own = inside < per_group
    s = tl.arange(0, BLOCK_S)
    back = (directions >> tl.minimum(group, 62)) & 1
    shift = tl.zeros([BLOCK_C], tl.float32)
    if BIAS:
        shift = tl.load(bias + c, mask=own, other=0.0).to(tl.float32)
    carry = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for start in range(0, length, BLOCK_L):
        place = start + tl.arange(0, BLOCK_L)
        real = own[:, None] & (place < length)[None, :]
        t = tl.where(back == 1, length - 1 - place, place).to(tl.int64)
        u_tile = tl.load(u + b * u_sb + c[:, None] * u_sc + t[None, :] * u_sl, mask=real, other=0.0).to(
            tl.float32
        )
        step = _steps(delta, shift, b * d_sb + c[:, None] * d_sc + t[None, :] * d_sl, real, SOFTPLUS)
        if STARTS:
            row = (b * channels + c) * tl.cdiv(length, BLOCK_L) + start // BLOCK_L
            tl.store(starts + row[:, None] * N + s[None, :], carry, mask=own[:, None] & (s < N)[None, :])
        y = tl.zeros([BLOCK_C, BLOCK_L], tl.float32)
        for n in range(N):
            a_n = tl.load(A + c * N + n, mask=own, other=0.0).to(tl.float32)
            b_t = tl.load(B + b * B_sb + group * B_sg + n * B_sn + t * B_sl, mask=place < length, other=0.0)
            decay = tl.exp(step * a_n[:, None])
            product, h = tl.associative_scan((decay, step * u_tile * b_t.to(tl.float32)[None, :]), 1, _join)
            h += product * _column(carry, s, n)[:, None]
            last = tl.sum(tl.where((tl.arange(0, BLOCK_L) == BLOCK_L - 1)[None, :], h, 0.0), 1)
            carry = tl.where((s == n)[None, :], last[:, None], carry)
            if STATES:
                tl.store(out + ((b * channels + c) * N + n)[:, None] * length + t[None, :], h, mask=real)
            elif not STARTS:
                c_t = tl.load(
                    C + b * C_sb + group * C_sg + n * C_sn + t * C_sl, mask=place < length, other=0.0
                )
                y += h * c_t.to(tl.float32)[None, :]
        if not (STATES or STARTS):
            if SKIP:
                y += tl.load(D + c, mask=own, other=0.0).to(tl.float32)[:, None] * u_tile
            tl.store(out + (b * channels + c)[:, None] * length + t[None, :], y, mask=real)


@triton.jit
def _bwd(
    grad, u, delta, A, B, C, D, bias, starts, du, ddelta, dA, dB, dC, dD, dbias, directions,
    channels, per_group, length, N,
    g_sb, g_sc, g_sn, g_sl, u_sb, u_sc, u_sl, d_sb, d_sc, d_sl,
    B_sb, B_sg, B_sn, B_sl, C_sb, C_sg, C_sn, C_sl,
    STATES: tl.constexpr, SKIP: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """All gradients; dA, dD, dbias a batch, dB and dC a program, to be added up outside."""
    group, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = group.to(tl.int64) * per_group + inside
    own = inside < per_group
    s = tl.arange(0, BLOCK_S)
    back = (directions >> tl.minimum(group, 62)) & 1
    shift = tl.zeros([BLOCK_C], tl.float32)
    if BIAS:
        shift = tl.load(bias + c, mask=own, other=0.0).to(tl.float32)
    row = b * channels + c
    part = ((b * tl.num_programs(1) + group) * tl.num_programs(0) + tl.program_id(0)) * N
    carry = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    dA_sum = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    dD_sum = tl.zeros([BLOCK_C], tl.float32)
    dbias_sum = tl.zeros([BLOCK_C], tl.float32)
    blocks = tl.cdiv(length, BLOCK_L)
    for i in range(blocks):
        block = blocks - 1 - i
        place = block * BLOCK_L + tl.arange(0, BLOCK_L)
        token = place < length
        real = own[:, None] & token[None, :]
        t = tl.where(back == 1, length - 1 - place, place).to(tl.int64)
        # The decay that leads out of each token is the next one's.
        next_real = own[:, None] & (place + 1 < length)[None, :]
        next_t = tl.where(back == 1, t - 1, t + 1)
        u_tile = tl.load(u + b * u_sb + c[:, None] * u_sc + t[None, :] * u_sl, mask=real, other=0.0).to(
            tl.float32
        )
        step = _steps(delta, shift, b * d_sb + c[:, None] * d_sc + t[None, :] * d_sl, real, SOFTPLUS)
        next_step = _steps(
            delta, shift, b * d_sb + c[:, None] * d_sc + next_t[None, :] * d_sl, next_real, SOFTPLUS
        )
        if not STATES:
            dy = tl.load(grad + b * g_sb + c[:, None] * g_sc + t[None, :] * g_sl, mask=real, other=0.0).to(
                tl.float32
            )
        dx = tl.zeros([BLOCK_C, BLOCK_L], tl.float32)
        dstep = tl.zeros([BLOCK_C, BLOCK_L], tl.float32)
        for n in range(N):
            a_n = tl.load(A + c * N + n, mask=own, other=0.0).to(tl.float32)
            b_t = tl.load(B + b * B_sb + group * B_sg + n * B_sn + t * B_sl, mask=token, other=0.0).to(
                tl.float32
            )
            decay = tl.exp(step * a_n[:, None])
            entering = step * u_tile * b_t[None, :]
            product, h, carried = tl.associative_scan(
                (decay, entering, tl.zeros_like(entering)), 1, _join_carried
            )
            h0 = tl.load(starts + (row * blocks + block) * N + n, mask=own, other=0.0)[:, None]
            carried += product * h0
            if STATES:
                g = tl.load(
                    grad + b * g_sb + c[:, None] * g_sc + n * g_sn + t[None, :] * g_sl, mask=real, other=0.0
                ).to(tl.float32)
            else:
                h += product * h0
                c_t = tl.load(C + b * C_sb + group * C_sg + n * C_sn + t * C_sl, mask=token, other=0.0).to(
                    tl.float32
                )
                g = dy * c_t[None, :]
                tl.store(dC + (part + n) * length + t, tl.sum(dy * h, 0), mask=token)
            product, g = tl.associative_scan((tl.exp(next_step * a_n[:, None]), g), 1, _join, reverse=True)
            g += product * _column(carry, s, n)[:, None]
            first = tl.sum(tl.where((tl.arange(0, BLOCK_L) == 0)[None, :], g, 0.0), 1)
            carry = tl.where((s == n)[None, :], first[:, None], carry)
            g = tl.where(real, g, 0.0)
            gathered = tl.sum(g * carried * step, 1)
            dA_sum += tl.where((s == n)[None, :], gathered[:, None], 0.0)
            dstep += g * carried * a_n[:, None]
            dx += g * b_t[None, :]
            tl.store(dB + (part + n) * length + t, tl.sum(g * step * u_tile, 0), mask=token)
        dstep += dx * u_tile
        if SOFTPLUS:
            # The derivative of softplus is 1 - exp(-softplus), which is softplus itself where that is tiny.
            dstep *= tl.where(step < 1e-4, step, 1.0 - tl.exp(-step))
        dx *= step
        if SKIP:
            dx += tl.load(D + c, mask=own, other=0.0).to(tl.float32)[:, None] * dy
            dD_sum += tl.sum(dy * u_tile, 1)
        dbias_sum += tl.sum(dstep, 1)
        tl.store(du + row[:, None] * length + t[None, :], dx, mask=real)
        tl.store(ddelta + row[:, None] * length + t[None, :], dstep, mask=real)
    tl.store(dA + row[:, None] * N + s[None, :], dA_sum, mask=own[:, None] & (s < N)[None, :])
    if SKIP:
        tl.store(dD + row, dD_sum, mask=own)
    if BIAS:
        tl.store(dbias + row, dbias_sum, mask=own)


def blocks(N: int, gradient: bool) -> dict[str, int]:
    """Tile sizes and warps; the gradient holds twice as many tiles at once."""
    return dict(
        BLOCK_C=BLOCK_C, BLOCK_L=BLOCK_L, BLOCK_S=triton.next_power_of_2(N), num_warps=8 if gradient else 4
    )


def _directions(reverse: Sequence[bool]) -> int:
    if all(reverse):
        return -1
    return sum(1 << group for group, back in enumerate(reverse) if back)


def _grid(u: Tensor, B: Tensor) -> tuple[int, int, int]:
    return triton.cdiv(u.shape[1] // B.shape[1], BLOCK_C), B.shape[1], u.shape[0]


def _strides(*tensors: Tensor | None, axes: int) -> list[int]:
    return [stride for x in tensors for stride in ((0,) * axes if x is None else x.stride())]


def _run_fwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor | None, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool, reverse: Sequence[bool], out: Tensor | None, starts: Tensor | None,
) -> None:  # fmt: skip
    groups, N, length = B.shape[1:]
    _fwd[_grid(u, B)](
        u, delta, A, B, C, D, delta_bias, out, starts, _directions(reverse),
        u.shape[1], u.shape[1] // groups, length, N,
        *_strides(u, delta, axes=3), *_strides(B, C, axes=4),
        STATES=C is None and starts is None, STARTS=starts is not None,
        SKIP=D is not None, BIAS=delta_bias is not None, SOFTPLUS=delta_softplus, **blocks(N, False),
    )  # fmt: skip


def _packed(*tensors: Tensor | None) -> list[Tensor | None]:
    """The small ones, contiguous."""
    return [x if x is None else x.contiguous() for x in tensors]


def scan(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse):
    """As in `eager.py`."""
    out = ops.result(u, A, C)
    if u.shape[0]:
        A, D, delta_bias = _packed(A, D, delta_bias)
        _run_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, out, None)
    return out


def scan_backward(grad, u, delta, A, B, C, D, delta_bias, delta_softplus, reverse):
    batch, channels, length = u.shape
    groups, N = B.shape[1:3]
    parts = _grid(u, B)[0]

    def wide(*shape: int) -> Tensor:
        return torch.zeros(shape, device=u.device, dtype=torch.float32)

    packed_A, packed_D, bias = _packed(A, D, delta_bias)
    du, ddelta, dA = u.new_empty(u.shape), delta.new_empty(delta.shape), wide(batch, channels, N)
    dB = wide(batch, groups, parts, N, length)
    dC = wide(*(dB.shape if C is not None else (0,)))
    dD, dbias = (wide(*((batch, channels) if x is not None else (0, 0))) for x in (D, delta_bias))
    if batch:
        starts = wide(batch, channels, triton.cdiv(length, BLOCK_L), N)
        _run_fwd(u, delta, packed_A, B, C, packed_D, bias, delta_softplus, reverse, None, starts)
        g_strides = grad.stride() if C is None else (*grad.stride()[:2], 0, grad.stride(2))
        _bwd[_grid(u, B)](
            grad, u, delta, packed_A, B, C, packed_D, bias, starts, du, ddelta, dA, dB, dC, dD, dbias,
            _directions(reverse), channels, channels // groups, length, N,
            *g_strides, *_strides(u, delta, axes=3), *_strides(B, C, axes=4),
            STATES=C is None, SKIP=D is not None, BIAS=bias is not None, SOFTPLUS=delta_softplus, **blocks(N, True),
        )  # fmt: skip
    totals = (
        (dA.sum(0), A), (dB.sum(2), B), (dC if C is None else dC.sum(2), C), (dD.sum(0), D), (dbias.sum(0), delta_bias)
    )  # fmt: skip
    return du, ddelta, *(total if x is None else total.to(x.dtype) for total, x in totals)


OPERATORS = ops.define("triton", scan, scan_backward)


def unsupported(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *options: Any) -> str | None:
    if not (u.is_cuda or INTERPRETED):
        return "needs a GPU, or TRITON_INTERPRET=1"
    if u.dtype == torch.float64:
        return "computes in float32"
    if A.shape[1] > WIDEST:
        return f"states a channel end at {WIDEST}, got {A.shape[1]}"
    reverse = options[-1]
    if len(reverse) > MOST_GROUPS and len(set(reverse)) > 1:
        return f"groups of mixed direction end at {MOST_GROUPS}, got {len(reverse)}"
    return None


def forward(*args: Any) -> Tensor:
    return OPERATORS.scan(*args)
