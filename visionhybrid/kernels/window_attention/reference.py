"""The definition of window attention, in float64, one window at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[int, int]


def unsupported(*args: object) -> str | None:
    return None


def pieces(side: int, window: int, shift: int) -> Tensor:
    """Label of each row of the rolled map: two rows of a window attend to each other iff their labels agree."""
    row = torch.arange(side)
    return (row >= side - window).long() + (row >= side - shift).long() if shift else torch.zeros_like(row)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: Pair, reach: Pair, shift: Pair, scale: float
) -> Tensor:
    q, k, v = (t.double() for t in (q, k, v))
    _, H, W, _, _ = q.shape
    (wh, ww), (eh, ew), (sh, sw) = window, reach, shift
    ph, pw = (eh - wh) // 2, (ew - ww) // 2
    q, k, v = (t.roll((-sh, -sw), dims=(1, 2)) for t in (q, k, v))
    k, v = (F.pad(t, (0, 0, 0, 0, pw, pw, ph, ph)) for t in (k, v))
    region = (3 * pieces(H, wh, sh)[:, None] + pieces(W, ww, sw)).to(q.device)
    strips = []
    for y in range(0, H, wh):
        strip = []
        for x in range(0, W, ww):
            tokens = q[:, y : y + wh, x : x + ww].flatten(1, 2)  # (B, N, heads, D)
            keys = k[:, y : y + eh, x : x + ew].flatten(1, 2)  # (B, M, heads, D)
            values = v[:, y : y + eh, x : x + ew].flatten(1, 2)  # (B, M, heads, E)
            logits = scale * torch.einsum("bnhd,bmhd->bhnm", tokens, keys)
            if bias is not None:
                logits = logits + bias.double()
            if sh or sw:
                piece = region[y : y + wh, x : x + ww].flatten()
                logits = logits - 100.0 * (piece[:, None] != piece).double()
            out = torch.einsum("bhnm,bmhe->bnhe", logits.softmax(-1), values)
            strip.append(out.unflatten(1, (wh, ww)))
        strips.append(torch.cat(strip, dim=2))
    return torch.cat(strips, dim=1).roll((sh, sw), dims=(1, 2))
