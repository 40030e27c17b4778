"""Hyena with short filters: gates of causal depthwise convolutions in raster order, as grafted into DiT.

Papers: Chandrasegaran et al., arXiv:2506.05340 (grafting); Poli et al., arXiv:2302.10866 (Hyena). Numbers of
keshik6/grafting@6ace8b5 `src/operators/hyena/`, whose parameters `short_filter` and `inner_filter` have the same names and
shapes here: Hyena-SE is the default, Hyena-X has `inner=0`, Hyena-Y `short=0`.
The filters look back in raster order although images have no past; the authors' models do the same. All filters start as the
identity (the last tap is one), so a fresh mixer gives q * k * v.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionhybrid.mixers.base import Cost, Halo, Mixer
from visionhybrid.mixers.registry import register


@register(
    "hyena",
    purpose="gated causal convolutions of a few taps (Hyena-SE, -X, -Y), grafted into DiT",
    paper="arXiv:2506.05340, arXiv:2302.10866",
    source="keshik6/grafting@6ace8b5",
    license="Apache-2.0",
    grids=(1, 2, 3),
    text=True,
    masks=False,
    parameters=True,
    training_free=False,
)
class Hyena(Mixer):
    """out = q' * C(k' * v'), C and the filters of q', k', v' causal along the sequence, a few taps for each channel.

    Args:
        short: taps of the filters of q, k and v; 0 leaves them as they are (Hyena-Y).
        inner: taps of C; 0 leaves it out (Hyena-X).
    """

    def __init__(self, *, dim: int, heads: int, head_dim: int, short: int = 4, inner: int = 4) -> None:
        super().__init__(dim=dim, heads=heads, head_dim=head_dim)
        if short < 0 or inner < 0:
            raise ValueError(f"hyena: short and inner are numbers of taps, got {short} and {inner}")
        width = heads * head_dim
        self.short_filter = CausalFilter(3 * width, short) if short else None
        self.inner_filter = CausalFilter(width, inner) if inner else None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, grid: Sequence[int], text_tokens: int = 0
    ) -> Tensor:
        self.check(q, k, v, grid, text_tokens)
        q, k, v = (x.transpose(2, 3).flatten(1, 2) for x in (q, k, v))  # (B, heads * D, N)
        if self.short_filter is not None:
            q, k, v = self.short_filter(torch.cat([q, k, v], 1)).chunk(3, 1)
        gated = k * v
        out = q * (gated if self.inner_filter is None else self.inner_filter(gated))
        return out.unflatten(1, (self.heads, self.head_dim)).transpose(2, 3)

    def halo(self, grid: Sequence[int]) -> Halo:
        filters = (f for f in (self.short_filter, self.inner_filter) if f is not None)
        reach = sum(f.taps - 1 for f in filters)
        return Halo(rows=-(-reach // max(1, prod(grid[1:]))))

    def cost(self, *, grid: Sequence[int], text_tokens: int = 0, bytes_per: int = 2) -> Cost:
        tokens, width = text_tokens + prod(grid), self.heads * self.head_dim
        macs = sum(f.taps * f.in_channels for f in (self.short_filter, self.inner_filter) if f is not None)
        return Cost(macs=tokens * macs, bytes=4 * tokens * width * bytes_per)


class CausalFilter(nn.Conv1d):
    """(B, channels, L) -> the same: each channel convolved with what came before it; from the identity."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__(channels, channels, taps, groups=channels)

    @property
    def taps(self) -> int:
        return self.kernel_size[0]

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.weight[:, :, -1])
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (self.taps - 1, 0)).to(self.weight.dtype)).to(input.dtype)
