"""LINA's linear attention: shifted ReLU features, gates for each token, a convolution of the hidden states beside it.

Paper: Wang et al., arXiv:2601.22630. Numbers of techmonsterwang/LINA@f13f7c3
`diffnext/models/vision_transformer_linear_decouple1_kvscale1.py`: `LinearAttentionEncoder` is `conv=0`,
`LinearAttentionDecoder` is `gates=320` with 64 text tokens before a grid of 16x16. Parameters have the authors' names.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from visionhybrid.kernels.linear_attention import linear_attention
from visionhybrid.mixers.base import Cost, Halo, Mixer, linear_cost
from visionhybrid.mixers.registry import register
from visionhybrid.mixers.sharding import Shards

EPS = 1e-6  # of the features and of the normaliser, beside a mean


@register(
    "lina",
    purpose="linear attention beside a convolution of the hidden states, keys and values gated by token",
    paper="arXiv:2601.22630",
    source="techmonsterwang/LINA@f13f7c3",
    license="Apache-2.0",
    grids=(2, 3),
    text=True,
    masks=True,
    parameters=True,
    training_free=False,
)
class Lina(Mixer):
    """out_i = p_i S / (p_i . z + 1e-6), S and z means of g_j r_j^T h_j v_j and g_j r_j, p and r = relu + 1e-6 of q and k.

    The host adds `beside(x)` before its output projection.

    Args:
        conv: side of a depthwise convolution of the hidden states on the grid, frame by frame; 0 is none. Text gets nothing of it.
        gates: tokens, text and image, that have a learned gate for their key (g) and one for their value (h) in each head; it ties
            the mixer to that many. 0: none.
    """

    def __init__(self, *, dim: int, heads: int, head_dim: int, conv: int = 5, gates: int = 0) -> None:
        super().__init__(dim=dim, heads=heads, head_dim=head_dim)
        if conv < 0 or (conv and conv % 2 == 0):
            raise ValueError(f"lina: conv must be odd, or 0 for none, got {conv}")
        if conv and dim != heads * head_dim:
            raise ValueError(f"lina: conv needs {heads} heads of {head_dim} to make dim, got {dim}")
        self.dw_conv = nn.Conv2d(dim, dim, conv, padding=conv // 2, groups=dim) if conv else None
        self.key_scale, self.value_scale = (
            nn.Parameter(torch.ones(1, heads, gates, 1)) if gates else None for _ in "kv"
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Sequence[int],
        text_tokens: int = 0,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        self.check(q, k, v, grid, text_tokens)
        return self._attend(q, k, v, self._gates(q.shape[2]), key_mask)

    def sharded(
        self, q: Tensor, k: Tensor, v: Tensor, *, shards: Shards, key_mask: Tensor | None = None
    ) -> Tensor:
        gates = [shards.own(gate, 2) for gate in self._gates(shards.text_tokens + prod(shards.grid))]
        own = None if key_mask is None else shards.own(key_mask)
        return self._attend(q, k, v, gates, own, shards.group)

    def _gates(self, tokens: int) -> list[Tensor]:
        """Of so many keys and values; empty if there are none."""
        if self.key_scale is None or self.value_scale is None:
            return []
        if self.key_scale.shape[2] != tokens:
            raise ValueError(
                f"lina: has gates for {self.key_scale.shape[2]} tokens, got {tokens}; gates=0 takes any"
            )
        return [self.key_scale, self.value_scale]

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        key_mask: Tensor | None,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        q, k = (x.relu() + EPS for x in (q, k))
        if gates:
            k, v = (x * gate.to(x.dtype) for x, gate in zip((k, v), gates, strict=True))
        options = dict(feature_map="identity", norm="fbla", eps=EPS)
        return linear_attention(q, k, v, key_mask=key_mask, group=group, **options)

    def beside(
        self, x: Tensor, *, grid: Sequence[int], text_tokens: int = 0, group: ProcessGroup | None = None
    ) -> Tensor:
        """What the hidden states (B, N, dim) add to the output before the projection, of the same shape.

        Where ranks share the sequence over `group`, x is this rank's and the numbers are the whole's; see `sharding.mix`.
        """
        if self.dw_conv is None:
            return torch.zeros_like(x)
        if group is None:
            text, image = x.tensor_split([text_tokens], dim=1)
            local = self._convolve(image, grid)
        else:
            shards = Shards(group, tuple(grid), text_tokens)
            text, image = shards.parts(x, 1)
            reach = self.dw_conv.kernel_size[0] // 2 if len(grid) == 2 else 0  # along frames it has none
            around, own = shards.around(image.unsqueeze(1), Halo(reach))
            local = self._convolve(around.squeeze(1), grid)[:, own]
        return torch.cat([torch.zeros_like(text), local], 1)

    def _convolve(self, image: Tensor, grid: Sequence[int]) -> Tensor:
        """(B, tokens of whole rows or frames, dim) -> the same."""
        assert self.dw_conv is not None
        rows = image.shape[1] // grid[1] if len(grid) == 2 else grid[1]
        maps = image.unflatten(1, (-1, rows, grid[-1])).flatten(0, 1)  # (B * frames, H, W, dim)
        local = self.dw_conv(maps.permute(0, 3, 1, 2).to(self.dw_conv.weight.dtype)).to(image.dtype)
        return local.permute(0, 2, 3, 1).reshape(image.shape)

    def cost(self, *, grid: Sequence[int], text_tokens: int = 0, bytes_per: int = 2) -> Cost:
        tokens = text_tokens + prod(grid)
        cost = linear_cost(tokens, tokens, self, bytes_per)
        if self.dw_conv is None:
            return cost
        taps = prod(self.dw_conv.kernel_size)
        return cost + Cost(macs=prod(grid) * self.dim * taps, bytes=2 * prod(grid) * self.dim * bytes_per)
