"""The definition: one step per token, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def unsupported(*args) -> str | None:
    return None


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: Sequence[bool],
) -> Tensor:
    """See `selective_scan`; B and C are (batch, groups, N, L) here and `reverse` has one entry a group. Returns float64."""
    outs = []
    channels = u.shape[1] // B.shape[1]
    for group, backwards in enumerate(reverse):
        own = slice(group * channels, (group + 1) * channels)
        x, step = u[:, own].double(), delta[:, own].double()
        if delta_bias is not None:
            step = step + delta_bias[own, None].double()
        if delta_softplus:
            step = F.softplus(step)
        b, c = B[:, group].double(), None if C is None else C[:, group].double()
        h = x.new_zeros(*x.shape[:2], A.shape[1])  # (batch, channels, N)
        steps = []
        for t in reversed(range(x.shape[2])) if backwards else range(x.shape[2]):
            decay = torch.exp(step[:, :, t, None] * A[own].double())
            h = decay * h + step[:, :, t, None] * b[:, None, :, t] * x[:, :, t, None]
            steps.append(h if c is None else (h * c[:, None, :, t]).sum(-1))
        if backwards:
            steps.reverse()
        out = torch.stack(steps, -1)
        outs.append(out if D is None else out + D[own, None].double() * x)
    return torch.cat(outs, 1)
