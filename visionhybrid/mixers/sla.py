"""Sparse-linear attention (SLA): softmax over the key blocks that matter, plus a projection of linear attention.

Paper: Zhang et al., arXiv:2509.24006. Code: thu-ml/SLA branch `main` @d973e55 (TurboDiffusion's weights) and branch `SLA-1`
@325cc75. `proj_l.{weight,bias}` are the authors' names; their `blocks.<i>.self_attn.attn_op.local_attn.proj_l.*` end the same.
Differences: at least one critical block, any length and head dim, padding, text beside the image. The authors leave text out
of the question; here blocks never straddle its border, every image query sees all of it, text queries attend densely.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionhybrid.kernels.sparse_linear_attention import block_scores, classify, sparse_linear_attention
from visionhybrid.mixers.base import Cost, Mixer, linear_cost, local_cost
from visionhybrid.mixers.registry import register
from visionhybrid.mixers.sharding import Shards, in_heads

VERSIONS = ("main", "v1", "paper")


@register(
    "sla",
    purpose="top share of key blocks exactly, linear attention for the rest; fine-tuned into Wan",
    paper="arXiv:2509.24006",
    source="thu-ml/SLA@d973e55",
    license="Apache-2.0",
    grids=(),
    text=True,
    masks=True,
    parameters=True,
    training_free=False,
)
class SparseLinear(Mixer):
    """out = sparse + proj_l(linear); fresh, with `proj_l` at zero as published, it is the sparse part alone.

    Args:
        topk: share of image key blocks that a query block sees exactly; may be changed between calls.
        version: "main", the linear part over all keys; "v1", over the blocks that are not critical; "paper", over those
            that are neither critical nor among the lowest `negligible` share.
        feature_map: of the linear part, "softmax", "elu" or "relu".
        block_q, block_k: tokens per block; TurboDiffusion runs weights trained at 64, 64 with 128, 64.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        head_dim: int,
        scale: float | None = None,
        topk: float = 0.1,
        version: str = "main",
        negligible: float = 0.1,
        feature_map: str = "softmax",
        block_q: int = 64,
        block_k: int = 64,
    ) -> None:
        super().__init__(dim=dim, heads=heads, head_dim=head_dim, scale=scale)
        if version not in VERSIONS:
            raise ValueError(f"sla: no version {version!r}; have {', '.join(VERSIONS)}")
        self.topk, self.version, self.negligible, self.feature_map = topk, version, negligible, feature_map
        self.block_q, self.block_k = block_q, block_k
        self.proj_l = _Projection(head_dim, head_dim)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Sequence[int],
        text_tokens: int = 0,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        self.check(q, k, v, grid, text_tokens)
        if not text_tokens:
            return self._mix(q, k, v, key_mask)
        text = F.scaled_dot_product_attention(
            q[:, :, :text_tokens],
            k,
            v,
            attn_mask=None if key_mask is None else key_mask[:, None, None],
            scale=self.scale,
        )
        image = q[:, :, text_tokens:]
        block_map = self._block_map(image, k[:, :, text_tokens:], key_mask, text_tokens)
        # Text fills whole blocks of its own, so that image blocks begin where the image does.
        pad = -text_tokens % self.block_k
        if pad:
            key_mask = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if key_mask is None else key_mask
            k, v, key_mask = F.pad(k, (0, 0, pad, 0)), F.pad(v, (0, 0, pad, 0)), F.pad(key_mask, (pad, 0))
        longest = -(-text_tokens // self.block_k) + self._critical(prod(grid))
        return torch.cat([text, self._mix(image, k, v, key_mask, block_map, longest)], 2)

    def _critical(self, image: int) -> int:
        """Blocks of so many image tokens that each query block sees exactly."""
        blocks = -(-image // self.block_k)
        return min(blocks, max(1, int(self.topk * blocks)))

    def _block_map(self, q: Tensor, k: Tensor, key_mask: Tensor | None, text_tokens: int) -> Tensor:
        """The choice among image blocks with critical text blocks before them; a constant of the gradient."""
        seen = None if key_mask is None else key_mask[:, text_tokens:]
        with torch.no_grad():
            scores = block_scores(q, k, self.block_q, self.block_k, seen)
            chosen = classify(scores, self.topk, self.negligible if self.version == "paper" else 0.0)
        return F.pad(chosen, (-(-text_tokens // self.block_k), 0), value=1)

    def _mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        block_map: Tensor | None = None,
        longest: int = 0,
    ) -> Tensor:
        both = sparse_linear_attention(
            q,
            k,
            v,
            topk=self.topk,
            negligible=self.negligible,
            variant=self.version,
            feature_map=self.feature_map,
            block_q=self.block_q,
            block_k=self.block_k,
            block_map=block_map,
            longest=longest,
            key_mask=key_mask,
            scale=self.scale,
        )
        return both.sparse + self.proj_l(both.linear)

    def sharded(self, q: Tensor, k: Tensor, v: Tensor, *, shards: Shards, **extra: Any) -> Tensor:
        return in_heads(self, q, k, v, shards=shards, **extra)

    def cost(self, *, grid: Sequence[int], text_tokens: int = 0, bytes_per: int = 2) -> Cost:
        image = prod(grid)
        blocks_q, blocks_k = -(-image // self.block_q), -(-image // self.block_k)
        keys = self.block_k * self._critical(image)
        width = self.heads * self.head_dim
        choice = Cost(macs=blocks_q * blocks_k * width, bytes=0)
        projection = Cost(macs=image * width * self.head_dim, bytes=0)
        sparse = local_cost(image, text_tokens, keys, self, bytes_per)
        return sparse + choice + projection + linear_cost(image, image + text_tokens, self, bytes_per)


class _Projection(nn.Linear):
    """D x D of every head alike, from zero. Its weights may stay in float32 beside half-precision tokens."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)
