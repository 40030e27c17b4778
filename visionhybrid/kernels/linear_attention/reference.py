"""The definition: the N x M matrix of weights, written out, in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FEATURES = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": torch.relu,
    "softmax": lambda x: x.softmax(-1),
    "identity": lambda x: x,
}


def unsupported(*args) -> str | None:
    return None if args[-1] is None else "knows one process, group must be None"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_rotated: Tensor | None,
    k_rotated: Tensor | None,
    key_mask: Tensor | None,
    feature_map: str,
    norm: str,
    eps: float,
    scale: float,
    group: None,
) -> Tensor:
    """See `linear_attention`; `norm` is "mean", "sum" or "none" here. Returns float64."""
    phi = FEATURES[feature_map]
    keep = (
        torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
        if key_mask is None
        else key_mask
    )
    keep = keep[:, None, :, None]  # (B, 1, M, 1)
    q, v = phi(q.double()), v.double().masked_fill(~keep, 0)
    k = phi(k.double()).masked_fill(~keep, 0)
    weights = q @ k.mT  # (B, heads, N, M)
    total = weights.sum(-1, keepdim=True)
    if q_rotated is not None and k_rotated is not None:
        weights = q_rotated.double() @ k_rotated.double().masked_fill(~keep, 0).mT
    if norm == "none":
        return scale * (weights @ v)
    # A row whose keys are all masked is 0 / eps = 0, not 0 / 0.
    count = keep.sum(2, keepdim=True).clamp(min=1) if norm == "mean" else 1
    return scale * (weights @ v) / (total + eps * count)
