"""Sparse-linear attention (SLA): exact attention on the key blocks that matter, linear attention for the rest.

Source: Zhang et al., arXiv:2509.24006; thu-ml/SLA branch `main` @d973e55 and branch `SLA-1` @325cc75. The three published
forms are three operators: `main` (linear part over all keys), `v1` (over every block that is not critical) and `paper` (over
the marginal blocks only, the lowest `negligible` share dropped; in no public code).
Differences: at least one critical block per row (the authors' code gives NaN at none), any length and head dim, query and key
lengths may differ, a key padding mask, states in float32, a sequence over several processes.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from visionhybrid.kernels.dispatch import pick
from visionhybrid.kernels.precision import autocast
from visionhybrid.kernels.sparse_linear_attention import eager, linear, reference
from visionhybrid.kernels.sparse_linear_attention.blocks import block_scores, blocks_of, classify

__all__ = ["SparseLinear", "block_scores", "blocks_of", "classify", "sparse_linear_attention"]

VARIANTS = ("main", "v1", "paper", "sparse")
BACKENDS: dict[str, Any] = {"reference": reference, "eager": eager}
if find_spec("triton"):  # it exists for Linux only
    from visionhybrid.kernels.sparse_linear_attention import triton

    BACKENDS["triton"] = triton


class SparseLinear(NamedTuple):
    """Both branches, kept apart because a layer adds them as `sparse + proj_l(linear)`."""

    sparse: Tensor  # (B, heads, Lq, E)
    linear: Tensor | None  # (B, heads, Lq, E); None for the variant "sparse"
    block_map: Tensor  # (B, heads, M, N) int8: 1 critical, 0 marginal, -1 negligible


def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    topk: float = 0.1,
    negligible: float = 0.1,
    variant: str = "main",
    feature_map: str = "softmax",
    block_q: int = 64,
    block_k: int = 64,
    block_map: Tensor | None = None,
    longest: int = 0,
    key_mask: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Any, ...]:
    """The checked, complete arguments that every backend takes; blocks are chosen here, without gradient."""
    q, k, v = autocast(q, k, v)
    _check(q, k, v, topk, negligible, variant, feature_map, block_q, block_k, key_mask, mask)
    if group is not None and variant == "sparse":
        raise ValueError(
            "sparse_linear_attention: group concerns the linear part, and variant 'sparse' has none"
        )
    m, n = -(-q.shape[2] // block_q), -(-k.shape[2] // block_k)
    width = longest
    if block_map is None:
        with torch.no_grad():
            scores = block_scores(q, k, block_q, block_k, key_mask)
            block_map = classify(scores, topk, negligible if variant == "paper" else 0.0)
        width = min(n, max(1, int(topk * n)))
    else:
        sizes = [(q.shape[0], 1), (q.shape[1], 1), (m,), (n,)]
        if block_map.ndim != 4 or any(s not in ok for s, ok in zip(block_map.shape, sizes, strict=True)):
            wanted = (q.shape[0], q.shape[1], m, n)
            raise ValueError(
                f"sparse_linear_attention: block_map must broadcast to {wanted}, got {tuple(block_map.shape)}"
            )
        block_map = block_map.to(torch.int8).expand(q.shape[0], q.shape[1], m, n)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    see = _token_mask(key_mask, mask)
    return q, k, v, block_map, width, key_mask, see, block_q, block_k, feature_map, variant, scale, group


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    topk: float = 0.1,
    negligible: float = 0.1,
    variant: str = "main",
    feature_map: str = "softmax",
    block_q: int = 64,
    block_k: int = 64,
    block_map: Tensor | None = None,
    longest: int = 0,
    key_mask: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> SparseLinear:
    """sparse = softmax over critical blocks of (scale * q k^T) v;  linear = phi(q) H / (phi(q) z), H and z by `variant`.

    Blocks are ranked by the product of block means (`block_scores`); the choice carries no gradient.

    Args:
        q: (B, heads, Lq, D); k: (B, heads, Lk, D); v: (B, heads, Lk, E); one floating dtype.
        topk: share of key blocks that are critical, in (0, 1]; at least one block per row.
        negligible: share of key blocks that the variant "paper" drops altogether, in [0, 1).
        variant: "main", "v1", "paper", or "sparse" (no linear part).
        feature_map: "softmax" (over the head dim), "elu" (elu + 1) or "relu".
        block_q, block_k: tokens per block; a short last block is allowed.
        block_map: (B or 1, heads or 1, M, N) with 1, 0, -1: blocks chosen outside instead of by rank.
        longest: critical blocks in the longest row of `block_map`, if known: then no shape depends on data (the meta device,
            torch.export).
        key_mask: (B, Lk) bool, True for real keys; others leave ranking, softmax and states.
        mask: (Lq, Lk) bool over tokens, for windows inside critical blocks (give `block_map=blocks_of(mask)` too).
        scale: default D ** -0.5.
        group: the sequence is sharded over these ranks: q, k, v, key_mask, block_map and mask are this rank's (any number of
            tokens). The linear part runs over the keys of all ranks: one all-reduce of heads x D x (E + 1) numbers forward,
            one backward, whatever the length. The sparse part and the ranking see this rank's keys only, so `topk` is a share
            of those: to one process it is as if the blocks of other ranks were marginal.
        backend: "auto", "eager", "triton" or "reference" (float64, dense, one process).
    Returns: `SparseLinear`; a query that sees no key gets zero in that branch.
    Raises: ValueError naming the argument, its value and what is expected.
    """
    args = arguments(
        q,
        k,
        v,
        topk=topk,
        negligible=negligible,
        variant=variant,
        feature_map=feature_map,
        block_q=block_q,
        block_k=block_k,
        block_map=block_map,
        longest=longest,
        key_mask=key_mask,
        mask=mask,
        scale=scale,
        group=group,
    )
    return SparseLinear(*pick("sparse_linear_attention", BACKENDS, backend, args).forward(*args), args[3])


def _token_mask(key_mask: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """One (B or 1, Lq or 1, Lk) bool of both masks."""
    if key_mask is None:
        return None if mask is None else mask[None]
    return key_mask[:, None] if mask is None else key_mask[:, None] & mask[None]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: float,
    negligible: float,
    variant: str,
    feature_map: str,
    block_q: int,
    block_k: int,
    key_mask: Tensor | None,
    mask: Tensor | None,
) -> None:
    op = "sparse_linear_attention"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or 0 in x.shape[1:]:
            raise ValueError(
                f"{op}: {name} must be (B, heads, L, D) without empty axes, got {tuple(x.shape)}"
            )
        if x.dtype != q.dtype:
            raise ValueError(f"{op}: q and {name} need one dtype, got {q.dtype} and {x.dtype}")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"{op}: k must agree with q {tuple(q.shape)} in batch, heads and head dim, got {tuple(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"{op}: v must agree with k {tuple(k.shape)} in batch, heads and length, got {tuple(v.shape)}"
        )
    for name, value, choices in (
        ("variant", variant, VARIANTS),
        ("feature_map", feature_map, linear.FEATURES),
    ):
        if value not in choices:
            raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")
    if not 0 < topk <= 1:
        raise ValueError(f"{op}: topk must be a share in (0, 1], got {topk}")
    if not 0 <= negligible < 1:
        raise ValueError(f"{op}: negligible must be a share in [0, 1), got {negligible}")
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size < 1:
            raise ValueError(f"{op}: {name} must be positive, got {size}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (k.shape[0], k.shape[2])):
        raise ValueError(
            f"{op}: key_mask must be bool {(k.shape[0], k.shape[2])}, got {key_mask.dtype} {tuple(key_mask.shape)}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (q.shape[2], k.shape[2])):
        raise ValueError(
            f"{op}: mask must be bool {(q.shape[2], k.shape[2])}, got {mask.dtype} {tuple(mask.shape)}"
        )
