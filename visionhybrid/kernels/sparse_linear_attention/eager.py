"""The CPU path of the sparse branch: each query block gathers its critical key blocks and attends densely.

Query blocks go in chunks of at most `BUDGET` scores, so memory does not grow with the length. The backward recomputes the
probabilities from the log-sum-exp and adds key-block gradients back through the lookup table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BUDGET = 2_000_000  # scores alive at a time; 8 MB in float32


def unsupported(*args: object, **kwargs: object) -> str | None:
    return None


def _blocked(x: Tensor, size: int) -> Tensor:
    """(B, heads, L, D) -> (B * heads, blocks, size, D), zero rows at the end."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % size)).flatten(0, 1).unflatten(1, (-1, size))


@dataclass(frozen=True)
class _Chunk:
    rows: slice  # of query blocks
    blocks: Tensor  # (B * heads * rows * t) indices into key blocks of all heads, flattened
    hidden: Tensor | None  # (B * heads, rows, block_q or 1, t * block_k) True where a key must not be seen


class _Sparse:
    """The geometry of one call, and its chunks."""

    def __init__(
        self, q: Tensor, k: Tensor, lut: Tensor, mask: Tensor | None, block_q: int, block_k: int
    ) -> None:
        self.batch, self.heads, self.length_k = q.shape[0], q.shape[1], k.shape[2]
        self.lut = lut.flatten(0, 1)  # (B * heads, M, t)
        self.n, self.block_k = -(-self.length_k // block_k), block_k
        self.ragged = bool(self.length_k % block_k) or bool((lut < 0).any())
        self.mask = None
        if mask is not None:
            wide = mask.shape[1] > 1
            pad = (0, -mask.shape[2] % block_k, 0, -mask.shape[1] % block_q if wide else 0)
            mask = F.pad(mask, pad).unflatten(2, (-1, block_k)).unflatten(1, (-1, block_q if wide else 1))
            self.mask = mask.transpose(2, 3)  # (B or 1, M or 1, N, block_q or 1, block_k)
        scores = self.lut.shape[0] * block_q * self.lut.shape[2] * block_k
        self.step = max(1, BUDGET // max(scores, 1))

    def chunks(self) -> Iterator[_Chunk]:
        head = torch.arange(self.lut.shape[0], device=self.lut.device)[:, None, None]
        for start in range(0, self.lut.shape[1], self.step):
            rows = slice(start, min(start + self.step, self.lut.shape[1]))
            lut = self.lut[:, rows]
            safe = lut.clamp(min=0)
            hidden = None
            if self.ragged:
                key = safe[..., None] * self.block_k + torch.arange(self.block_k, device=lut.device)
                hidden = ((lut < 0)[..., None] | (key >= self.length_k)).flatten(2)[:, :, None]
            if self.mask is not None:
                seen = self._seen(safe, rows)
                hidden = ~seen if hidden is None else hidden | ~seen
            yield _Chunk(rows, (head * self.n + safe).flatten(), hidden)

    def _seen(self, lut: Tensor, rows: slice) -> Tensor:
        """(B * heads, rows, block_q or 1, t * block_k) of the token mask, gathered as the keys are."""
        m = torch.arange(rows.start, rows.stop, device=lut.device)[None, :, None]
        b = torch.arange(lut.shape[0], device=lut.device)[:, None, None] // self.heads
        mask = self.mask[b if len(self.mask) > 1 else 0, m if self.mask.shape[1] > 1 else 0, lut]
        return mask.movedim(2, 3).flatten(3)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _take(blocks: Tensor, chunk: _Chunk) -> Tensor:
    """(B * heads, N, block, D) -> (B * heads, rows, t * block, D)."""
    picked = blocks.flatten(0, 1).index_select(0, chunk.blocks)
    return picked.view(blocks.shape[0], chunk.rows.stop - chunk.rows.start, -1, blocks.shape[-1])


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
    lse = qb.new_empty(qb.shape[:3], dtype=_wide(q[:0]).dtype)
    for chunk in plan.chunks():
        p = (_wide(qb[:, chunk.rows]) * scale) @ _wide(_take(kb, chunk)).mT
        if chunk.hidden is not None:
            p.masked_fill_(chunk.hidden, float("-inf"))
        top = p.amax(-1, keepdim=True)
        if chunk.hidden is not None:
            top.masked_fill_(top == float("-inf"), 0.0)
        total = p.sub_(top).exp_().sum(-1, keepdim=True)
        out[:, chunk.rows] = (p @ _wide(_take(vb, chunk))) / total.clamp(min=torch.finfo(p.dtype).tiny)
        lse[:, chunk.rows] = (top + total.log()).squeeze(-1)
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
    delta = _blocked((_wide(grad) * _wide(out)).sum(-1, keepdim=True), block_q)
    seen = lse.masked_fill(lse == float("-inf"), 0.0)[..., None]
    lseb = _blocked(seen, block_q)
    dq = torch.empty_like(qb)
    dk, dv = torch.zeros_like(kb, dtype=lse.dtype), torch.zeros_like(vb, dtype=lse.dtype)
    for chunk in plan.chunks():
        q_rows, g_rows = _wide(qb[:, chunk.rows]) * scale, _wide(gb[:, chunk.rows])
        keys = _wide(_take(kb, chunk))
        p = q_rows @ keys.mT
        if chunk.hidden is not None:
            p.masked_fill_(chunk.hidden, float("-inf"))
        p.sub_(lseb[:, chunk.rows]).exp_()
        ds = (g_rows @ _wide(_take(vb, chunk)).mT).sub_(delta[:, chunk.rows]).mul_(p)
        dq[:, chunk.rows] = (ds @ keys) * scale
        for total, part in ((dk, ds.mT @ q_rows), (dv, p.mT @ g_rows)):
            total.flatten(0, 1).index_add_(0, chunk.blocks, part.view(-1, plan.block_k, part.shape[-1]))
    shape = (plan.batch, plan.heads)
    return tuple(
        x.flatten(1, 2)[:, : like.shape[2]].unflatten(0, shape).to(like.dtype).contiguous()
        for x, like in ((dq, q), (dk, k), (dv, v))
    )
