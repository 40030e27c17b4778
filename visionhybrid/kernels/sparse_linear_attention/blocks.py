"""Which key blocks each query block attends to: pooled scores, top-k, the three classes, maps from masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionhybrid.kernels.precision import wide

CRITICAL, MARGINAL, NEGLIGIBLE = 1, 0, -1


def block_means(x: Tensor, size: int, keep: Tensor | None = None) -> Tensor:
    """(B, heads, L, D) -> (B, heads, ceil(L / size), D): means of the real rows of each block, in the dtype of x.

    `keep` (B, L) bool drops rows; a block without rows is zero. Sums are accumulated in float32.
    """
    values, pad = wide(x), (0, 0, 0, -x.shape[2] % size)
    rows = values.new_ones(1, 1, x.shape[2], 1)
    if keep is not None:
        rows = keep[:, None, :, None].to(values.dtype)
        values = values * rows
    total = F.pad(values, pad).unflatten(2, (-1, size)).sum(3)
    return (total / F.pad(rows, pad).unflatten(2, (-1, size)).sum(3).clamp(min=1)).to(x.dtype)


def block_scores(q: Tensor, k: Tensor, block_q: int, block_k: int, key_mask: Tensor | None = None) -> Tensor:
    """(B, heads, M, N): products of the block means of q and of k less its mean over the sequence (SLA's ranking).

    Taking off the mean shifts a whole row and so never changes the exact ranking; it keeps half precision accurate.
    A block without a visible key scores -inf.
    """
    if key_mask is None:
        centred = k - k.mean(2, keepdim=True)
    else:
        rows = key_mask[:, None, :, None].to(k.dtype)
        centred = k - (k * rows).sum(2, keepdim=True) / rows.sum(2, keepdim=True).clamp(min=1)
    scores = block_means(q, block_q) @ block_means(centred, block_k, key_mask).mT
    if key_mask is None:
        return scores
    empty = ~F.pad(key_mask, (0, -k.shape[2] % block_k)).unflatten(1, (-1, block_k)).any(2)
    return scores.masked_fill(empty[:, None, None], float("-inf"))


def classify(scores: Tensor, topk: float, negligible: float = 0.0) -> Tensor:
    """(B, heads, M, N) int8 block map: the `topk` share of each row critical, the lowest `negligible` share negligible.

    The counts truncate as the authors' do, `int(share * N)`, but at least one block is critical: at zero their output is NaN.
    """
    n = scores.shape[-1]
    t = min(n, max(1, int(topk * n)))
    low = min(n - t, int(negligible * n))
    block_map = torch.zeros_like(scores, dtype=torch.int8)
    if low:
        block_map.scatter_(-1, scores.topk(low, dim=-1, largest=False, sorted=False).indices, NEGLIGIBLE)
    return block_map.scatter_(-1, scores.topk(t, dim=-1, sorted=False).indices, CRITICAL)


def blocks_of(mask: Tensor, block_q: int = 64, block_k: int = 64) -> Tensor:
    """Block map of a token mask: (..., Lq, Lk) bool -> (..., M, N) int8, critical where any pair may attend, else negligible.

    Windows, CLEAR's discs and generalised neighbourhoods run through the sparse kernel by this map and their mask.
    """
    mask = F.pad(mask, (0, -mask.shape[-1] % block_k, 0, -mask.shape[-2] % block_q))
    seen = mask.unflatten(-1, (-1, block_k)).any(-1).unflatten(-2, (-1, block_q)).any(-2)
    return torch.where(seen, CRITICAL, NEGLIGIBLE).to(torch.int8)


def lookup(block_map: Tensor) -> Tensor:
    """(B, heads, M, t) critical blocks of each row, ascending; -1 fills rows that have fewer than the longest; t >= 1."""
    critical = block_map == CRITICAL
    t = max(1, int(critical.sum(-1).max()))
    order = (~critical).long().argsort(dim=-1, stable=True)[..., :t]
    return order.masked_fill(~critical.gather(-1, order), -1)
