"""The selective scan as operations that ONNX knows, for lengths that are known only when it runs.

The reach of a state doubles each time: as many passes over everything as the length has bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visionhybrid.kernels.precision import widened

LONGEST = 22  # bits, where the length is not known: a map of 2048 x 2048


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
    """See `selective_scan`."""
    kind, groups = widened(u), B.shape[1]
    step = delta.to(kind)
    if delta_bias is not None:
        step = step + delta_bias.to(kind)[:, None]
    if delta_softplus:
        step = F.softplus(step)
    per_group = u.shape[1] // groups
    outs = []
    for group, back in enumerate(reverse):
        own = slice(group * per_group, (group + 1) * per_group)
        decay = (step[:, own, None] * A.to(kind)[own, :, None]).exp()  # (B, c, N, L)
        h = (step[:, own] * u[:, own].to(kind))[:, :, None] * B[:, None, group].to(kind)
        h = _scan(decay, h, back)
        outs.append(h if C is None else (h * C[:, None, group].to(kind)).sum(2))
    out = torch.cat(outs, 1) if groups > 1 else outs[0]
    if C is None:
        return out
    return (out if D is None else out + u.to(kind) * D.to(kind)[:, None]).to(u.dtype)


def _scan(decay: Tensor, h: Tensor, reverse: bool) -> Tensor:
    """h_t + decay_t h_{t-1} + decay_t decay_{t-1} h_{t-2} + ... along the last axis."""
    length = h.shape[-1]
    if reverse:
        decay, h = decay.flip(-1), h.flip(-1)
    for i in range((length - 1).bit_length() if isinstance(length, int) else LONGEST):
        h = h + decay * F.pad(h, (2**i, 0))[..., :length]
        decay = decay * F.pad(decay, (2**i, 0))[..., :length]
    return h.flip(-1) if reverse else h
