"""The definition, dense and in float64: masked softmax over critical blocks, linear attention over the others."""

from __future__ import annotations

import torch
from torch import Tensor

from visionhybrid.kernels.sparse_linear_attention.blocks import CRITICAL, MARGINAL
from visionhybrid.kernels.sparse_linear_attention.linear import EPS_MAIN, feature


def unsupported(*args: object) -> str | None:
    return None if args[-1] is None else "knows one process, group must be None"


def _tokens(block_map: Tensor, q: Tensor, k: Tensor, block_q: int, block_k: int) -> Tensor:
    """The block map spread over tokens: (B, heads, Lq, Lk)."""
    spread = block_map.repeat_interleave(block_q, -2).repeat_interleave(block_k, -1)
    return spread[..., : q.shape[2], : k.shape[2]]


def _sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Tensor,
    mask: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    see = _tokens(block_map, q, k, block_q, block_k) == CRITICAL
    if mask is not None:
        see = see & mask[:, None]
    some = see.any(-1, keepdim=True)  # a row that sees nothing gives zero, with zero gradients
    return (q @ k.mT * scale).masked_fill(~see & some, float("-inf")).softmax(-1) * some @ v


def _linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Tensor,
    key_mask: Tensor | None,
    block_q: int,
    block_k: int,
    feature_map: str,
    variant: str,
) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    weights = feature(q, feature_map) @ feature(k, feature_map).mT
    if variant != "main":
        weights = weights * (_tokens(block_map, q, k, block_q, block_k) == MARGINAL)
    if key_mask is not None:
        weights = weights * key_mask[:, None, None]
    total = weights.sum(-1, keepdim=True)
    if variant == "main":
        return weights @ v / (total + EPS_MAIN)
    return torch.where(total == 0, 0.0, weights @ v / torch.where(total == 0, 1.0, total))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Tensor,
    width: int,
    key_mask: Tensor | None,
    mask: Tensor | None,
    block_q: int,
    block_k: int,
    feature_map: str,
    variant: str,
    scale: float,
    group: None,
) -> tuple[Tensor, Tensor | None]:
    out = _sparse(q, k, v, block_map, mask, block_q, block_k, scale)
    if variant == "sparse":
        return out, None
    return out, _linear(q, k, v, block_map, key_mask, block_q, block_k, feature_map, variant)
