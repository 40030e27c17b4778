"""The GPU path of the sparse branch: one program per tile of queries forward and for dq, one per tile of keys for dk and dv.

Each program walks the list of its critical blocks: `lut` holds them per query block, its transpose per key block, so nothing
is scanned to be skipped and no atomics are needed; the backward is deterministic. Softmax runs in base 2; accumulation and
log-sum-exp are float32. Blocks of any length, and head dims up to 256 of any size, padded to powers of two inside a tile
(`tiles.py`). float32 stops at head dim 128 on NVIDIA: its tiles of 256 spill registers however small they are.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionhybrid.kernels.sparse_linear_attention import tiles
from visionhybrid.kernels.sparse_linear_attention.ops import define, run

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = triton.knobs.runtime.interpret
AMD = torch.version.hip is not None
# All integers: nothing but types, constants and the alignment of pointers decides what is compiled.
SIZES = [
    *("heads", "length_q", "length_k", "programs", "width", "blocks", "mask_batch", "mask_row"),
    *(f"{x}_s{axis}" for x in "qkv" for axis in "bhn"),
]


@triton.jit
def _place(programs, heads, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Which head, batch and head of the batch, block, and tile of that block this program has."""
    PARTS: tl.constexpr = (BLOCK + TILE - 1) // TILE
    head, tile = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    return head, head // heads, head % heads, tile // PARTS, tile % PARTS


@triton.jit
def _rows(block, part, length, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Token numbers of one tile of a block, and which of them there are."""
    inside = part * TILE + tl.arange(0, TILE)
    rows = block * BLOCK + inside
    real = rows < length
    if BLOCK % TILE:
        real = real & (inside < BLOCK)
    return rows, real


@triton.jit
def _keys(j, part, length, mask, BLOCK: tl.constexpr, TILE: tl.constexpr, MASK: tl.constexpr):
    rows, real = _rows(j, part, length, BLOCK, TILE)
    if MASK == "keys":
        real = real & (tl.load(mask + rows, mask=real, other=0) != 0)
    return rows, real


@triton.jit
def _tile(base, rows, real, stride, UNIT: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr):
    """(rows, PAD) of a map whose rows are contiguous and `stride * UNIT` apart; zero where not real or beyond its width."""
    columns = tl.arange(0, PAD)
    there = real[:, None]
    if WIDTH < PAD:
        there = there & (columns < WIDTH)[None, :]
    place = (base + rows.to(tl.int64) * stride * UNIT)[:, None] + columns[None, :]
    return tl.load(place, mask=there, other=0.0)


@triton.jit
def _store(base, tile, rows, real, WIDTH: tl.constexpr, PAD: tl.constexpr):
    columns = tl.arange(0, PAD)
    there = real[:, None]
    if WIDTH < PAD:
        there = there & (columns < WIDTH)[None, :]
    place = (base + rows.to(tl.int64) * WIDTH)[:, None] + columns[None, :]
    tl.store(place, tile.to(base.dtype.element_ty), mask=there)


@triton.jit
def _hide(s, mask, mask_row, q_rows, k_rows, q_real, k_real, MASK: tl.constexpr):
    """Scores, -inf where a query must not see a key."""
    seen = k_real
    if MASK == "pairs":
        place = mask + q_rows.to(tl.int64) * mask_row + k_rows
        seen = tl.load(place, mask=q_real & k_real, other=0) != 0
    return tl.where(seen, s, float("-inf"))


@triton.jit(do_not_specialize=SIZES)
def _fwd(
    q, k, v, lut, count, mask, out, lse,
    scale, heads, length_q, length_k, programs, width, blocks,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, mask_batch, mask_row,
    D: tl.constexpr, E: tl.constexpr, PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, MASK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (BLOCK_K + TILE_K - 1) // TILE_K
    head, b, h, block, part = _place(programs, heads, BLOCK_Q, TILE_Q)
    k += (b * k_sb + h * k_sh) * UNIT
    v += (b * v_sb + h * v_sh) * UNIT
    if MASK != "none":
        mask += b * mask_batch
    q_rows, q_real = _rows(block, part, length_q, BLOCK_Q, TILE_Q)
    q_tile = _tile(q + (b * q_sb + h * q_sh) * UNIT, q_rows, q_real, q_sn, UNIT, D, PAD)
    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    acc = tl.zeros([TILE_Q, PAD], tl.float32)
    row = head * blocks + block
    for i in range(tl.load(count + row) * PARTS):
        j = tl.load(lut + row * width + i // PARTS)
        k_rows, k_real = _keys(j, i % PARTS, length_k, mask, BLOCK_K, TILE_K, MASK)
        k_tile = _tile(k, k_rows, k_real, k_sn, UNIT, D, PAD)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        s = _hide(s, mask, mask_row, q_rows[:, None], k_rows[None, :], q_real[:, None], k_real[None, :], MASK)
        new = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - shift[:, None])
        keep = tl.exp2(top - shift)
        total = total * keep + tl.sum(p, 1)
        v_tile = _tile(v, k_rows, k_real, v_sn, UNIT, E, PAD)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * keep[:, None], input_precision=PRECISION)
        top = new
    some = total > 0
    safe = tl.where(some, total, 1.0)
    _store(out + head * length_q * E, acc / safe[:, None], q_rows, q_real, E, PAD)
    natural = tl.where(some, (top + tl.log2(safe)) / LOG2E, float("-inf"))
    tl.store(lse + head * length_q + q_rows, natural, mask=q_real)


@triton.jit(do_not_specialize=SIZES)
def _dq(
    q, k, v, lut, count, mask, grad, lse, delta, dq,
    scale, heads, length_q, length_k, programs, width, blocks,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, mask_batch, mask_row,
    D: tl.constexpr, E: tl.constexpr, PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, MASK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (BLOCK_K + TILE_K - 1) // TILE_K
    head, b, h, block, part = _place(programs, heads, BLOCK_Q, TILE_Q)
    k += (b * k_sb + h * k_sh) * UNIT
    v += (b * v_sb + h * v_sh) * UNIT
    if MASK != "none":
        mask += b * mask_batch
    q_rows, q_real = _rows(block, part, length_q, BLOCK_Q, TILE_Q)
    q_tile = _tile(q + (b * q_sb + h * q_sh) * UNIT, q_rows, q_real, q_sn, UNIT, D, PAD)
    g_tile = _tile(grad + head * length_q * E, q_rows, q_real, E, 1, E, PAD)
    norm = tl.load(lse + head * length_q + q_rows, mask=q_real, other=0.0) * LOG2E
    row_delta = tl.load(delta + head * length_q + q_rows, mask=q_real, other=0.0)
    acc = tl.zeros([TILE_Q, PAD], tl.float32)
    row = head * blocks + block
    for i in range(tl.load(count + row) * PARTS):
        j = tl.load(lut + row * width + i // PARTS)
        k_rows, k_real = _keys(j, i % PARTS, length_k, mask, BLOCK_K, TILE_K, MASK)
        k_tile = _tile(k, k_rows, k_real, k_sn, UNIT, D, PAD)
        v_tile = _tile(v, k_rows, k_real, v_sn, UNIT, E, PAD)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E) - norm[:, None]
        s = _hide(s, mask, mask_row, q_rows[:, None], k_rows[None, :], q_real[:, None], k_real[None, :], MASK)
        dp = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
        ds = tl.exp2(s) * (dp - row_delta[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    _store(dq + head * length_q * D, acc * scale, q_rows, q_real, D, PAD)


@triton.jit(do_not_specialize=SIZES)
def _dkv(
    q, k, v, lut, count, mask, grad, lse, delta, dk, dv,
    scale, heads, length_q, length_k, programs, width, blocks,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, mask_batch, mask_row,
    D: tl.constexpr, E: tl.constexpr, PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, MASK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores stand transposed, keys by queries, so that they enter both products as they lie in registers."""
    PARTS: tl.constexpr = (BLOCK_Q + TILE_Q - 1) // TILE_Q
    head, b, h, block, part = _place(programs, heads, BLOCK_K, TILE_K)
    q += (b * q_sb + h * q_sh) * UNIT
    grad += head * length_q * E
    lse += head * length_q
    delta += head * length_q
    if MASK != "none":
        mask += b * mask_batch
    k_rows, k_real = _rows(block, part, length_k, BLOCK_K, TILE_K)
    k_tile = _tile(k + (b * k_sb + h * k_sh) * UNIT, k_rows, k_real, k_sn, UNIT, D, PAD)
    v_tile = _tile(v + (b * v_sb + h * v_sh) * UNIT, k_rows, k_real, v_sn, UNIT, E, PAD)
    dk_acc = tl.zeros([TILE_K, PAD], tl.float32)
    dv_acc = tl.zeros([TILE_K, PAD], tl.float32)
    row = head * blocks + block
    for i in range(tl.load(count + row) * PARTS):
        j = tl.load(lut + row * width + i // PARTS)
        q_rows, q_real = _rows(j, i % PARTS, length_q, BLOCK_Q, TILE_Q)
        q_tile = _tile(q, q_rows, q_real, q_sn, UNIT, D, PAD)
        g_tile = _tile(grad, q_rows, q_real, E, 1, E, PAD)
        norm = tl.load(lse + q_rows, mask=q_real, other=0.0) * LOG2E
        row_delta = tl.load(delta + q_rows, mask=q_real, other=0.0)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * (scale * LOG2E) - norm[None, :]
        if MASK == "pairs":
            s = _hide(
                s, mask, mask_row, q_rows[None, :], k_rows[:, None], q_real[None, :], k_real[:, None], MASK
            )
        p = tl.exp2(s)
        # Queries that do not exist have zero rows, so they add nothing.
        dv_acc = tl.dot(p.to(g_tile.dtype), g_tile, dv_acc, input_precision=PRECISION)
        dp = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION)
        ds = p * (dp - row_delta[None, :])
        dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION)
    if MASK == "keys":
        seen = (tl.load(mask + k_rows, mask=k_real, other=0) != 0)[:, None]
        dk_acc, dv_acc = tl.where(seen, dk_acc, 0.0), tl.where(seen, dv_acc, 0.0)
    _store(dk + head * length_k * D, dk_acc * scale, k_rows, k_real, D, PAD)
    _store(dv + head * length_k * E, dv_acc, k_rows, k_real, E, PAD)


KERNELS = {"fwd": _fwd, "dq": _dq, "dkv": _dkv}


def unsupported(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    dims = q.shape[-1], v.shape[-1]
    if not (q.is_cuda or INTERPRETED):
        return "needs a GPU, or TRITON_INTERPRET=1"
    if q.dtype == torch.float64:
        return "float64 has no tensor cores: use eager"
    if INTERPRETED and q.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    if max(dims) > tiles.WIDEST:
        return f"head dims end at {tiles.WIDEST}, got {dims[0]} and {dims[1]}"
    if not tiles.fits(*dims, q.element_size(), AMD):
        return (
            f"float32 head dims above 128 spill registers on this GPU, got {dims[0]} and {dims[1]}: use eager"
        )
    return None


def _rows_contiguous(x: Tensor) -> Tensor:
    """`x` with its last axis contiguous, which the kernels take for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _lists(lut: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous int32 lists and how many entries each has; -1 stands only at the ends."""
    return lut.to(torch.int32).contiguous(), (lut >= 0).sum(-1, dtype=torch.int32).contiguous()


def _transposed(lut: Tensor, blocks_k: int) -> Tensor:
    """Which query blocks read each key block, ascending, -1 at the ends: (B, heads, N, at most M)."""
    chosen = torch.zeros(*lut.shape[:3], blocks_k + 1, dtype=torch.bool, device=lut.device)
    chosen.scatter_(3, lut.where(lut >= 0, blocks_k), True)
    readers = chosen[..., :blocks_k].transpose(2, 3)
    order = (~readers).long().argsort(dim=-1, stable=True)[..., : int(readers.sum(-1).max())]
    return order.masked_fill(~readers.gather(-1, order), -1)


def _launch(
    name: str,
    operands: tuple[Tensor, Tensor, Tensor],
    table: Tensor,
    mask: Tensor | None,
    others: tuple[Tensor, ...],
    block_q: int,
    block_k: int,
    scale: float,
) -> None:
    """Runs a kernel: `table` (B, heads, blocks, width) lists what each block of its programs walks."""
    q, k, v = (_rows_contiguous(x) for x in operands)
    strides = [s for x in (q, k, v) for s in x.stride()[:3]]
    unit = gcd(16, *strides)
    kind, steps = "none", (0, 0)
    if mask is not None:
        mask = mask.to(torch.uint8).contiguous()
        kind = "pairs" if mask.shape[1] > 1 else "keys"
        steps = (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(1))
    constants = tiles.constants(
        name, q.shape[3], v.shape[3], block_q, block_k, kind, unit, q.element_size(), AMD
    )
    axis = "K" if name == "dkv" else "Q"
    programs = table.shape[2] * triton.cdiv(constants[f"BLOCK_{axis}"], constants[f"TILE_{axis}"])
    # One axis: the second of a grid ends at 65535.
    KERNELS[name][(programs * q.shape[0] * q.shape[1],)](
        q, k, v, *_lists(table), mask, *others,
        scale, q.shape[1], q.shape[2], k.shape[2], programs, table.shape[3], table.shape[2],
        *(s // unit for s in strides), *steps, **constants,
    )  # fmt: skip


def sparse_forward(q, k, v, lut, mask, block_q, block_k, scale):
    """As `gathered.forward`."""
    out = v.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    _launch("fwd", (q, k, v), lut, mask, (out, lse), block_q, block_k, scale)
    return out, lse


def sparse_backward(grad, q, k, v, out, lse, lut, mask, block_q, block_k, scale):
    """As `gathered.backward`."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    grad, delta = grad.contiguous(), (grad.float() * out.float()).sum(-1)
    # A query that sees nothing: its scores are all -inf, and its probabilities stay zero.
    norm = lse.masked_fill(lse == float("-inf"), 0.0)
    readers = _transposed(lut, triton.cdiv(k.shape[2], block_k))
    _launch("dq", (q, k, v), lut, mask, (grad, norm, delta, dq), block_q, block_k, scale)
    _launch("dkv", (q, k, v), readers, mask, (grad, norm, delta, dk, dv), block_q, block_k, scale)
    return dq, dk, dv


SPARSE = define("triton", sparse_forward, sparse_backward)


def forward(*args: Any) -> tuple[Tensor, Tensor | None]:
    return run(SPARSE, "triton", *args)
