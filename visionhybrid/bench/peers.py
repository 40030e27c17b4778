"""What one would write without an operator: the plain PyTorch that the `kernels` suite stands its operators beside."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention as it is usually written."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    normaliser = q @ k.mean(-2, keepdim=True).mT + 1e-6
    return q @ (k.mT @ v / k.shape[-2]) / normaliser


def steps(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor, C: Tensor | None = None
) -> Tensor:
    """The recurrence as the authors' reference has it: decays and inputs first, then one step a token.

    Without `C` the states, (batch, channels, N, L).
    """
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    entering = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    h, out = torch.zeros_like(decay[:, :, 0]), []
    for t in range(u.shape[2]):
        h = decay[:, :, t] * h + entering[:, :, t]
        out.append(h if C is None else torch.einsum("bdn,bn->bd", h, C[:, :, t]))
    return torch.stack(out, -1)


def recurrence(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor, C: Tensor | None = None
) -> Tensor:
    """The definition in the inputs' type, as `selective_scan/reference.py` has it in float64: all of a token, then the next."""
    delta = F.softplus(delta + delta_bias[:, None])
    h, out = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * B[:, None, :, t] * u[:, :, t, None]
        out.append(h if C is None else (h * C[:, None, :, t]).sum(-1))
    return torch.stack(out, -1)


def gathered(q: Tensor, k: Tensor, v: Tensor, K: int) -> Tensor:
    """Neighbourhoods as an index, keys and values gathered: (B, heads, H, W, K * K, D) of each."""

    def windows(side: int) -> Tensor:
        start = (torch.arange(side) - K // 2).clamp(0, side - K)
        return (start[:, None] + torch.arange(K)).to(q.device)  # (side, K)

    rows, columns = windows(q.shape[2])[:, None, :, None], windows(q.shape[3])[None, :, None, :]
    keys, values = (x[:, :, rows, columns].flatten(4, 5) for x in (k, v))
    weights = (torch.einsum("bhxyd,bhxynd->bhxyn", q, keys) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhxyn,bhxynd->bhxyd", weights, values)


def shifted_windows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: int, shift: int) -> Tensor:
    """Swin as it is usually written on SDPA: roll, cut, one additive mask for every window and head, join, roll back."""
    B, H, W, heads, _ = q.shape
    rows, columns = H // window, W // window

    def cut(x: Tensor) -> Tensor:
        x = x.roll((-shift, -shift), (1, 2)).view(B, rows, window, columns, window, heads, -1)
        return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(B, rows * columns, heads, window * window, -1)

    piece = [
        torch.tensor([0] * (side - window) + [1] * (window - shift) + [2] * shift, device=q.device)
        for side in (H, W)
    ]
    label = (piece[0][:, None] * 3 + piece[1]).view(rows, window, columns, window)
    label = label.transpose(1, 2).reshape(rows * columns, 1, window * window)
    mask = torch.where(label[..., :, None] == label[..., None, :], 0.0, -100.0).to(q.dtype)
    out = F.scaled_dot_product_attention(*map(cut, (q, k, v)), attn_mask=(mask + bias)[None])
    out = out.view(B, rows, columns, heads, window, window, -1).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(B, H, W, heads, -1).roll((shift, shift), (1, 2))
