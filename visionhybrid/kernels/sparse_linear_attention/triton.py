"""The GPU path of the sparse branch: one program per query block forward and for dq, one per key block for dk and dv.

Each program walks the list of its critical blocks: `lut` holds them per query block, its transpose per key block, so nothing
is scanned to be skipped and no atomics are needed; the backward is deterministic. Softmax runs in base 2, accumulation and
log-sum-exp in float32. Blocks of any length and head dims of any size are padded to powers of two inside a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionhybrid.kernels.sparse_linear_attention.ops import define, run

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = triton.knobs.runtime.interpret
WIDEST = 256  # head dim; a tile of keys and one of values must fit in shared memory


@triton.jit
def _tile(base, rows, columns, stride_row, length, width):
    """A (rows, columns) tile of a row-major map, zero outside its length and width."""
    place = rows[:, None].to(tl.int64) * stride_row + columns[None, :]
    return tl.load(base + place, mask=(rows < length)[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def _scores(q_tile, k_tile, q_rows, k_rows, q_real, k_real, mask, mask_row, scale, HAS_MASK: tl.constexpr):
    """Scores in base 2, -inf where a query must not see a key."""
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * (scale * LOG2E)
    seen = q_real[:, None] & k_real[None, :]
    if HAS_MASK:
        place = q_rows[:, None].to(tl.int64) * mask_row + k_rows[None, :]
        seen = seen & (tl.load(mask + place, mask=seen, other=0) != 0)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _fwd(
    q, k, v, lut, count, mask, out, lse,
    scale, heads, length_q, length_k, blocks_q, width, block_q, block_k, dim, value_dim,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, mask_batch, mask_row,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    inside, columns, value_columns = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q_rows = block * block_q + inside
    q_real = (inside < block_q) & (q_rows < length_q)
    q_tile = _tile(q + b * q_sb + h * q_sh, tl.where(q_real, q_rows, length_q), columns, q_sn, length_q, dim)
    k_inside = tl.arange(0, BLOCK_K)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    row = head * blocks_q + block
    for i in range(tl.load(count + row)):
        j = tl.load(lut + row * width + i).to(tl.int32)
        k_rows = j * block_k + k_inside
        k_real = (k_inside < block_k) & (k_rows < length_k)
        safe = tl.where(k_real, k_rows, length_k)
        k_tile = _tile(k + b * k_sb + h * k_sh, safe, columns, k_sn, length_k, dim)
        s = _scores(
            q_tile, k_tile, q_rows, k_rows, q_real, k_real, mask + b * mask_batch, mask_row, scale, HAS_MASK
        )
        new = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - shift[:, None])
        keep = tl.exp2(top - shift)
        total = total * keep + tl.sum(p, 1)
        v_tile = _tile(v + b * v_sb + h * v_sh, safe, value_columns, v_sn, length_k, value_dim)
        acc = acc * keep[:, None] + tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee")
        top = new
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    place = (head * length_q + q_rows).to(tl.int64)
    real = q_real[:, None] & (value_columns < value_dim)[None, :]
    tl.store(
        out + place[:, None] * value_dim + value_columns[None, :], acc.to(out.dtype.element_ty), mask=real
    )
    natural = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) / LOG2E, float("-inf"))
    tl.store(lse + place, natural, mask=q_real)


@triton.jit
def _bwd_dq(
    grad, q, k, v, lse, delta, lut, count, mask, dq,
    scale, heads, length_q, length_k, blocks_q, width, block_q, block_k, dim, value_dim,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, mask_batch, mask_row,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    inside, columns, value_columns = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q_rows = block * block_q + inside
    q_real = (inside < block_q) & (q_rows < length_q)
    q_safe = tl.where(q_real, q_rows, length_q)
    q_tile = _tile(q + b * q_sb + h * q_sh, q_safe, columns, q_sn, length_q, dim)
    g_tile = _tile(grad + head * length_q * value_dim, q_safe, value_columns, value_dim, length_q, value_dim)
    norm = tl.load(lse + head * length_q + q_rows, mask=q_real, other=0.0) * LOG2E
    row_delta = tl.load(delta + head * length_q + q_rows, mask=q_real, other=0.0)
    k_inside = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    row = head * blocks_q + block
    for i in range(tl.load(count + row)):
        j = tl.load(lut + row * width + i).to(tl.int32)
        k_rows = j * block_k + k_inside
        k_real = (k_inside < block_k) & (k_rows < length_k)
        safe = tl.where(k_real, k_rows, length_k)
        k_tile = _tile(k + b * k_sb + h * k_sh, safe, columns, k_sn, length_k, dim)
        v_tile = _tile(v + b * v_sb + h * v_sh, safe, value_columns, v_sn, length_k, value_dim)
        s = _scores(
            q_tile, k_tile, q_rows, k_rows, q_real, k_real, mask + b * mask_batch, mask_row, scale, HAS_MASK
        )
        p = tl.exp2(s - norm[:, None])
        ds = p * (tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee") - row_delta[:, None])
        acc += tl.dot(ds.to(k_tile.dtype), k_tile, input_precision="ieee")
    place = (head * length_q + q_rows).to(tl.int64)
    real = q_real[:, None] & (columns < dim)[None, :]
    tl.store(dq + place[:, None] * dim + columns[None, :], (acc * scale).to(dq.dtype.element_ty), mask=real)


@triton.jit
def _bwd_dkv(
    grad, q, k, v, lse, delta, lut, count, mask, dk, dv,
    scale, heads, length_q, length_k, blocks_k, width, block_q, block_k, dim, value_dim,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, mask_batch, mask_row,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    inside, columns, value_columns = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    k_rows = block * block_k + inside
    k_real = (inside < block_k) & (k_rows < length_k)
    k_safe = tl.where(k_real, k_rows, length_k)
    k_tile = _tile(k + b * k_sb + h * k_sh, k_safe, columns, k_sn, length_k, dim)
    v_tile = _tile(v + b * v_sb + h * v_sh, k_safe, value_columns, v_sn, length_k, value_dim)
    q_inside = tl.arange(0, BLOCK_Q)
    dk_acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
    row = head * blocks_k + block
    for i in range(tl.load(count + row)):
        j = tl.load(lut + row * width + i).to(tl.int32)
        q_rows = j * block_q + q_inside
        q_real = (q_inside < block_q) & (q_rows < length_q)
        safe = tl.where(q_real, q_rows, length_q)
        q_tile = _tile(q + b * q_sb + h * q_sh, safe, columns, q_sn, length_q, dim)
        g_tile = _tile(
            grad + head * length_q * value_dim, safe, value_columns, value_dim, length_q, value_dim
        )
        norm = tl.load(lse + head * length_q + q_rows, mask=q_real, other=0.0) * LOG2E
        row_delta = tl.load(delta + head * length_q + q_rows, mask=q_real, other=0.0)
        s = _scores(
            q_tile, k_tile, q_rows, k_rows, q_real, k_real, mask + b * mask_batch, mask_row, scale, HAS_MASK
        )
        p = tl.exp2(s - norm[:, None])
        dv_acc += tl.dot(tl.trans(p).to(g_tile.dtype), g_tile, input_precision="ieee")
        ds = p * (tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee") - row_delta[:, None])
        dk_acc += tl.dot(tl.trans(ds).to(q_tile.dtype), q_tile, input_precision="ieee")
    place = (head * length_k + k_rows).to(tl.int64)
    real = k_real[:, None] & (columns < dim)[None, :]
    tl.store(
        dk + place[:, None] * dim + columns[None, :], (dk_acc * scale).to(dk.dtype.element_ty), mask=real
    )
    real = k_real[:, None] & (value_columns < value_dim)[None, :]
    tl.store(
        dv + place[:, None] * value_dim + value_columns[None, :], dv_acc.to(dv.dtype.element_ty), mask=real
    )


def config(block_q: int, block_k: int, dim: int, value_dim: int) -> dict[str, int]:
    """Tile sizes and launch options of all three kernels; what is compiled depends on nothing else but types."""
    pad = [max(16, triton.next_power_of_2(n)) for n in (block_q, block_k, dim, value_dim)]
    names = dict(zip(("BLOCK_Q", "BLOCK_K", "BLOCK_D", "BLOCK_E"), pad, strict=True))
    wide = max(pad[2:])
    return {
        **names,
        "num_warps": 4 if wide <= 64 else 8,
        "num_stages": 3 if wide <= 64 else 2 if wide <= 128 else 1,
    }


def unsupported(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    block_q, block_k = rest[4], rest[5]
    if not (q.is_cuda or INTERPRETED):
        return "needs a GPU, or TRITON_INTERPRET=1"
    if q.dtype == torch.float64:
        return "float64 has no tensor cores: use eager"
    if q.dtype == torch.float32 and not INTERPRETED:
        return "exact float32 products of these tiles spill kilobytes of registers (compiled for sm_80): use eager"
    if INTERPRETED and q.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"head dims above {WIDEST}, got {q.shape[-1]} and {v.shape[-1]}"
    if max(block_q, block_k) > 128:
        return f"blocks above 128 tokens, got {block_q} and {block_k}"
    return None


def _rows(x: Tensor) -> Tensor:
    """`x` with its last axis contiguous, which the kernels take for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor | None, list[int], dict[str, bool]]:
    """The mask as bytes, the strides every kernel takes last, and whether there is a mask."""
    strides = [s for x in (q, k, v) for s in x.stride()[:3]]
    if mask is None:
        return None, [*strides, 0, 0], {"HAS_MASK": False}
    mask = mask.to(torch.uint8).contiguous()
    steps = [mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(1) if mask.shape[1] > 1 else 0]
    return mask, [*strides, *steps], {"HAS_MASK": True}


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


def sparse_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lut: Tensor,
    mask: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=v.dtype)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    lists, count = _lists(lut)
    mask, strides, flag = _arguments(q, k, v, mask)
    _fwd[(lut.shape[2], q.shape[0] * q.shape[1])](
        q, k, v, lists, count, mask if mask is not None else count, out, lse,
        scale, q.shape[1], q.shape[2], k.shape[2], lut.shape[2], lut.shape[3], block_q, block_k, q.shape[3], v.shape[3],
        *strides, **config(block_q, block_k, q.shape[3], v.shape[3]), **flag,
    )  # fmt: skip
    return out, lse


def sparse_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lut: Tensor,
    mask: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad = _rows(q), _rows(k), _rows(v), grad.contiguous()
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = (grad.float() * out.float()).sum(-1)
    norm = lse.masked_fill(
        lse == float("-inf"), 0.0
    )  # a query that sees nothing: its probabilities stay zero
    mask, strides, flag = _arguments(q, k, v, mask)
    blocks_k = -(-k.shape[2] // block_k)
    sizes = [block_q, block_k, q.shape[3], v.shape[3]]
    options = {**config(*sizes), **flag}
    for kernel, table, results in (
        (_bwd_dq, lut, (dq,)),
        (_bwd_dkv, _transposed(lut, blocks_k), (dk, dv)),
    ):
        lists, count = _lists(table)
        kernel[(table.shape[2], q.shape[0] * q.shape[1])](
            grad, q, k, v, norm, delta, lists, count, mask if mask is not None else count, *results,
            scale, q.shape[1], q.shape[2], k.shape[2], table.shape[2], table.shape[3], *sizes, *strides, **options,
        )  # fmt: skip
    return dq, dk, dv


SPARSE = define("triton", sparse_forward, sparse_backward)


def forward(*args: Any) -> tuple[Tensor, Tensor | None]:
    return run(SPARSE, *args)
