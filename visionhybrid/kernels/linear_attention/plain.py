"""Linear attention in operations on whole tensors: what ONNX and TorchScript take, which know no operator of ours.

As exact as the other backends, but it writes features as long as the sequence.
"""

# No `from __future__ import annotations`: TorchScript reads them.

from typing import Optional  # TorchScript of torch 2.11 reads no `Tensor | None`

import torch
from torch import Tensor


def features(x: Tensor, feature_map: str) -> Tensor:
    """phi(x); "elu" without the cancellation of elu(x) + 1."""
    if feature_map == "elu":
        return x.clamp(max=0).exp() + x.relu()
    if feature_map == "relu":
        return x.relu()
    if feature_map == "softmax":
        return x.softmax(-1)
    return x


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_rotated: Optional[Tensor],  # noqa: UP045
    k_rotated: Optional[Tensor],  # noqa: UP045
    key_mask: Optional[Tensor],  # noqa: UP045
    feature_map: str,
    norm: str,
    eps: float,
    scale: float,
) -> Tensor:
    """See `linear_attention`; `norm` is "mean", "sum" or "none" here."""
    kind = q.dtype
    wide = torch.float64 if kind == torch.float64 else torch.float32
    phi_q, phi_k = features(q.to(wide), feature_map), features(k.to(wide), feature_map)
    numerator_q = phi_q if q_rotated is None else q_rotated.to(wide)
    numerator_k = phi_k if k_rotated is None else k_rotated.to(wide)
    v = v.to(wide)
    count = torch.full([k.shape[0], 1, 1, 1], k.shape[2], dtype=wide, device=k.device)
    if key_mask is not None:
        drop = ~key_mask[:, None, :, None]
        phi_k, numerator_k, v = (
            phi_k.masked_fill(drop, 0.0),
            numerator_k.masked_fill(drop, 0.0),
            v.masked_fill(drop, 0.0),
        )
        count = key_mask.sum(1).to(wide).clamp(min=1)[:, None, None, None]
    S, z = numerator_k.transpose(-1, -2) @ v, phi_k.sum(2).unsqueeze(-1)  # (B, heads, D, E), (B, heads, D, 1)
    if norm == "mean":
        S, z = S / count, z / count
    out = scale * (numerator_q @ S)
    if norm != "none":
        out = out / (phi_q @ z + eps)
    return out.to(kind)
