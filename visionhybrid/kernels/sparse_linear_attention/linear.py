"""The linear branch in differentiable PyTorch: one state for all rows (main), or one per query block (v1, paper)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionhybrid.kernels.precision import widened
from visionhybrid.kernels.sparse_linear_attention.blocks import MARGINAL

EPS_MAIN = 1e-5  # thu-ml/SLA main, added to the denominator; v1 has none
FEATURES = ("softmax", "elu", "relu")


def feature(x: Tensor, name: str) -> Tensor:
    """phi, over the head dimension: softmax, elu(x) + 1, or relu."""
    if name == "softmax":
        return x.softmax(-1)
    return F.elu(x) + 1 if name == "elu" else F.relu(x)


def forward(
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
    """(B, heads, Lq, E) in the dtype of v; states and normalisers in float32 (float64 for float64).

    main: phi(q) H / (1e-5 + phi(q) z) with H = phi(k)^T v and z = sum phi(k) over all keys.
    v1, paper: the same without eps, H and z over the marginal blocks of each query block; zero where a row has none.
    """
    with torch.autocast(q.device.type, enabled=False):  # it would round the float32 sums
        return _forward(q, k, v, block_map, key_mask, block_q, block_k, feature_map, variant)


def _forward(
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
    wide = widened(q)
    fq, fk, values = feature(q.to(wide), feature_map), feature(k.to(wide), feature_map), v.to(wide)
    if key_mask is not None:
        fk = fk * key_mask[:, None, :, None]
    if variant == "main":
        return ((fq @ (fk.mT @ values)) / (EPS_MAIN + fq @ fk.sum(2)[..., None])).to(v.dtype)
    pad_k, pad_q = -k.shape[2] % block_k, -q.shape[2] % block_q
    fk = F.pad(fk, (0, 0, 0, pad_k)).unflatten(2, (-1, block_k))  # (B, heads, N, block_k, D)
    values = F.pad(values, (0, 0, 0, pad_k)).unflatten(2, (-1, block_k))
    states = torch.cat([fk.mT @ values, fk.sum(3)[..., None]], -1)  # (B, heads, N, D, E + 1): H_j beside z_j
    chosen = (block_map == MARGINAL).to(wide)
    states = (chosen @ states.flatten(3)).unflatten(3, states.shape[3:])  # (B, heads, M, D, E + 1)
    fq = F.pad(fq, (0, 0, 0, pad_q)).unflatten(2, (-1, block_q))
    total, norm = (fq @ states).flatten(2, 3)[:, :, : q.shape[2]].tensor_split([v.shape[-1]], dim=-1)
    empty = norm == 0
    return torch.where(empty, 0.0, total / torch.where(empty, 1.0, norm)).to(v.dtype)
