"""Softmax attention, PyTorch's own: what the others are measured against, and what a hybrid keeps in some layers."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from visionhybrid.mixers.base import Cost, Mixer, attention_cost
from visionhybrid.mixers.registry import register
from visionhybrid.mixers.sharding import Shards, in_heads


@register(
    "softmax",
    purpose="full attention by PyTorch's scaled_dot_product_attention",
    paper="arXiv:1706.03762",
    source="",
    license="",
    grids=(),
    text=True,
    masks=True,
    parameters=False,
    training_free=True,
)
class Softmax(Mixer):
    """out = softmax(scale * q k^T) v over all tokens, text and image alike."""

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
        mask = None if key_mask is None else key_mask[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)

    def sharded(self, q: Tensor, k: Tensor, v: Tensor, *, shards: Shards, **extra: Any) -> Tensor:
        return in_heads(self, q, k, v, shards=shards, **extra)

    def cost(self, *, grid: Sequence[int], text_tokens: int = 0, bytes_per: int = 2) -> Cost:
        tokens = text_tokens + prod(grid)
        return attention_cost(tokens**2, tokens, self, bytes_per)
