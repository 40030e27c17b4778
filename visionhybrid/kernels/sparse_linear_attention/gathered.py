"""The arithmetic of the sparse branch on CPU: each query block gathers its critical key blocks and attends densely.

Heads and query blocks go in chunks of at most `BUDGET` numbers, so temporaries do not grow with the length. The backward pass
computes the probabilities again from the log-sum-exp and adds gradients of key blocks back through the lookup table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visionhybrid.kernels.precision import wide

BUDGET = 1_000_000  # scores alive at a time, or numbers of their keys if those are more; 4 MB in float32


def _blocked(x: Tensor, size: int) -> Tensor:
    """(B, heads, L, D) -> (B * heads, blocks, size, D), zero rows at the end."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % size)).flatten(0, 1).unflatten(1, (-1, size))


@dataclass(frozen=True)
class _Chunk:
    heads: slice  # of B * heads
    rows: slice  # of query blocks
    blocks: Tensor  # (heads, rows, t) key blocks, counted through the heads of the chunk
    hidden: Tensor | None  # (heads, rows, block_q or 1, t * block_k) True where a key must not be seen
    memory: dict[str, Tensor]  # of all chunks: fresh pages cost more than the copy into them

    def take(self, name: str, blocked: Tensor) -> Tensor:
        """(B * heads, N, block, D) -> (heads, rows, t * block, D), float32 or wider; overwrites what `name` took before."""
        order = self.blocks.flatten()
        if name not in self.memory or len(self.memory[name]) < len(order):
            self.memory[name] = blocked.new_empty(len(order), *blocked.shape[2:])
        picked = self.memory[name][: len(order)]
        torch.index_select(blocked[self.heads].flatten(0, 1), 0, order, out=picked)
        return wide(picked.view(*self.blocks.shape[:2], -1, blocked.shape[-1]))

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add (heads, rows, t * block, D) onto the blocks (B * heads, N, block, D) it was taken from.

        A sum of rows per bag of indices: `index_add_` does the same one element at a time.
        """
        target = total[self.heads]
        order = self.blocks.flatten().argsort()
        bags = torch.arange(target.shape[0] * target.shape[1], device=order.device)
        offsets = torch.searchsorted(self.blocks.flatten()[order], bags)
        rows = part.reshape(len(order), -1)
        target += F.embedding_bag(order, rows, offsets, mode="sum").view_as(target)


class _Sparse:
    """The geometry of one call, and its chunks: some heads whole, or some rows of one head."""

    def __init__(
        self, q: Tensor, k: Tensor, lut: Tensor, mask: Tensor | None, block_q: int, block_k: int
    ) -> None:
        self.batch, self.heads, self.length_k = q.shape[0], q.shape[1], k.shape[2]
        self.lut = lut.flatten(0, 1)  # (B * heads, M, t)
        self.memory: dict[str, Tensor] = {}
        self.n, self.block_k = -(-self.length_k // block_k), block_k
        self.ragged = bool(self.length_k % block_k) or bool((lut < 0).any())
        self.mask = None
        if mask is not None:
            wide = mask.shape[1] > 1
            pad = (0, -mask.shape[2] % block_k, 0, -mask.shape[1] % block_q if wide else 0)
            mask = F.pad(mask, pad).unflatten(2, (-1, block_k)).unflatten(1, (-1, block_q if wide else 1))
            self.mask = mask.transpose(2, 3)  # (B or 1, M or 1, N, block_q or 1, block_k)
        row = max(block_q, k.shape[3]) * self.lut.shape[2] * block_k
        self.step_rows = max(1, BUDGET // max(row, 1))
        self.step_heads = max(1, self.step_rows // self.lut.shape[1])

    def chunks(self) -> Iterator[_Chunk]:
        total, m, _ = self.lut.shape
        for head in range(0, total, self.step_heads):
            heads = slice(head, min(head + self.step_heads, total))
            for row in range(0, m, self.step_rows):
                yield self._chunk(heads, slice(row, min(row + self.step_rows, m)))

    def _chunk(self, heads: slice, rows: slice) -> _Chunk:
        lut = self.lut[heads, rows]
        safe = lut.clamp(min=0)
        hidden = None
        if self.ragged:
            key = safe[..., None] * self.block_k + torch.arange(self.block_k, device=lut.device)
            hidden = ((lut < 0)[..., None] | (key >= self.length_k)).flatten(2)[:, :, None]
        if self.mask is not None:
            seen = self._seen(self.mask, safe, heads, rows)
            hidden = ~seen if hidden is None else hidden | ~seen
        first = torch.arange(len(lut), device=lut.device)[:, None, None] * self.n
        return _Chunk(heads, rows, first + safe, hidden, self.memory)

    def _seen(self, mask: Tensor, lut: Tensor, heads: slice, rows: slice) -> Tensor:
        """(heads, rows, block_q or 1, t * block_k) of the token mask, gathered as the keys are."""
        m = torch.arange(rows.start, rows.stop, device=lut.device)[None, :, None]
        b = torch.arange(heads.start, heads.stop, device=lut.device)[:, None, None] // self.heads
        taken = mask[b if len(mask) > 1 else 0, m if mask.shape[1] > 1 else 0, lut]
        return taken.movedim(2, 3).flatten(3)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lut: Tensor,
    mask: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output in the dtype of v and natural log-sum-exp in float32 (float64 for float64); 0 and -inf where a row sees no key."""
    plan = _Sparse(q, k, lut, mask, block_q, block_k)
    qb, kb, vb = _blocked(q, block_q), _blocked(k, block_k), _blocked(v, block_k)
    out = v.new_empty(*qb.shape[:3], v.shape[-1])
    lse = qb.new_empty(qb.shape[:3], dtype=wide(q[:0]).dtype)
    for chunk in plan.chunks():
        p = (wide(qb[chunk.heads, chunk.rows]) * scale) @ chunk.take("keys", kb).mT
        if chunk.hidden is not None:
            p.masked_fill_(chunk.hidden, float("-inf"))
        top = p.amax(-1, keepdim=True)
        if chunk.hidden is not None:
            top.masked_fill_(top == float("-inf"), 0.0)
        total = p.sub_(top).exp_().sum(-1, keepdim=True)
        out[chunk.heads, chunk.rows] = (p @ chunk.take("values", vb)) / total.clamp(
            min=torch.finfo(p.dtype).tiny
        )
        lse[chunk.heads, chunk.rows] = (top + total.log()).squeeze(-1)
    shape = (plan.batch, plan.heads)
    return (
        out.flatten(1, 2)[:, : q.shape[2]].unflatten(0, shape).contiguous(),
        lse.flatten(1)[:, : q.shape[2]].unflatten(0, shape).contiguous(),
    )


def backward(
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
    plan = _Sparse(q, k, lut, mask, block_q, block_k)
    qb, kb, vb, gb = _blocked(q, block_q), _blocked(k, block_k), _blocked(v, block_k), _blocked(grad, block_q)
    delta = _blocked((wide(grad) * wide(out)).sum(-1, keepdim=True), block_q)
    seen = lse.masked_fill(lse == float("-inf"), 0.0)[..., None]
    lseb = _blocked(seen, block_q)
    dq = torch.empty_like(qb)
    dk, dv = torch.zeros_like(kb, dtype=lse.dtype), torch.zeros_like(vb, dtype=lse.dtype)
    for chunk in plan.chunks():
        q_rows, g_rows = wide(qb[chunk.heads, chunk.rows]) * scale, wide(gb[chunk.heads, chunk.rows])
        keys = chunk.take("keys", kb)
        p = q_rows @ keys.mT
        if chunk.hidden is not None:
            p.masked_fill_(chunk.hidden, float("-inf"))
        p.sub_(lseb[chunk.heads, chunk.rows]).exp_()
        ds = (g_rows @ chunk.take("values", vb).mT).sub_(delta[chunk.heads, chunk.rows]).mul_(p)
        dq[chunk.heads, chunk.rows] = (ds @ keys) * scale
        chunk.add(dk, ds.mT @ q_rows)
        chunk.add(dv, p.mT @ g_rows)
    shape = (plan.batch, plan.heads)
    dq, dk, dv = (
        x.flatten(1, 2)[:, : like.shape[2]].unflatten(0, shape).to(like.dtype).contiguous()
        for x, like in ((dq, q), (dk, k), (dv, v))
    )
    return dq, dk, dv
