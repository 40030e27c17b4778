"""Linear attention with ReLU features, as SANA and LiT have it: sums over tokens, no logits, optionally a convolution of v.

Papers: SANA, arXiv:2410.10629; LiT, arXiv:2501.12976 (5x5 depthwise convolution beside the attention). Numbers of
huggingface/diffusers@58eb52c0 `SanaLinearAttnProcessor2_0` and NVlabs/Sana `LiteLA`: eps 1e-15 beside sums. LiT's code is
not published; its convolution starts at zero here, so that a fresh mixer is plain linear attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from visionhybrid.kernels.linear_attention import FEATURE_MAPS, NORMS, linear_attention
from visionhybrid.mixers.base import Cost, Halo, Mixer, linear_cost
from visionhybrid.mixers.registry import register
from visionhybrid.mixers.sharding import Shards


@register(
    "linear",
    purpose="linear attention with ReLU features (SANA), optionally beside a depthwise convolution (LiT)",
    paper="arXiv:2410.10629, arXiv:2501.12976",
    source="huggingface/diffusers@58eb52c0",
    license="Apache-2.0",
    grids=(2, 3),
    text=True,
    masks=True,
    parameters=False,
    training_free=False,
)
class Linear(Mixer):
    """out_i = p_i S / (p_i . z + eps), S = sum_j r_j^T v_j, z = sum_j r_j, p and r features of q and k; plus conv(v).

    Args:
        feature_map: "relu", "elu" (elu + 1), "softmax" (over D) or "identity".
        norm: "sana" sums, "fbla" averages over keys, "none" does not divide. eps: instead of the norm's own.
        conv: side of a depthwise convolution of v on the grid (LiT: 5), frame by frame; 0 is none. Text takes no part in it.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        head_dim: int,
        feature_map: str = "relu",
        norm: str = "sana",
        eps: float | None = None,
        conv: int = 0,
    ) -> None:
        super().__init__(dim=dim, heads=heads, head_dim=head_dim)
        for name, value, choices in (("feature_map", feature_map, FEATURE_MAPS), ("norm", norm, NORMS)):
            if value not in choices:
                raise ValueError(f"linear: {name} must be one of {', '.join(choices)}, got {value!r}")
        if conv < 0 or (conv and conv % 2 == 0):
            raise ValueError(f"linear: conv must be odd, or 0 for none, got {conv}")
        self.feature_map, self.norm, self.eps = feature_map, norm, eps
        self.conv = _Depthwise(heads * head_dim, conv) if conv else None

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
        out = self._attend(q, k, v, key_mask)
        if self.conv is None:
            return out
        if key_mask is not None:
            v = v.masked_fill(~key_mask[:, None, :, None], 0)
        text, image = out.tensor_split([text_tokens], dim=2)
        return torch.cat([text, image + self.conv(v[:, :, text_tokens:], grid)], 2)

    def sharded(
        self, q: Tensor, k: Tensor, v: Tensor, *, shards: Shards, key_mask: Tensor | None = None
    ) -> Tensor:
        own = None if key_mask is None else shards.own(key_mask)
        out = self._attend(q, k, v, own, shards.group)
        if self.conv is None:
            return out
        if own is not None:
            v = v.masked_fill(~own[:, None, :, None], 0)
        (text, image), grid = shards.parts(out), shards.grid
        reach = self.conv.kernel_size[0] // 2 if len(grid) == 2 else 0  # along frames it has none
        around, mine = shards.around(shards.parts(v)[1], Halo(reach))
        rows = around.shape[2] // prod(grid[1:])
        return torch.cat([text, image + self.conv(around, (rows, *grid[1:]))[:, :, mine]], 2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, group: ProcessGroup | None = None
    ) -> Tensor:
        options = dict(feature_map=self.feature_map, norm=self.norm, eps=self.eps)
        return linear_attention(q, k, v, key_mask=key_mask, group=group, **options)

    def cost(self, *, grid: Sequence[int], text_tokens: int = 0, bytes_per: int = 2) -> Cost:
        tokens = text_tokens + prod(grid)
        cost = linear_cost(tokens, tokens, self, bytes_per)
        if self.conv is None:
            return cost
        width = self.heads * self.head_dim
        taps = prod(self.conv.kernel_size)
        return cost + Cost(macs=prod(grid) * width * taps, bytes=2 * prod(grid) * width * bytes_per)


class _Depthwise(nn.Conv2d):
    """(B, heads, N, D) on a grid -> the same, each channel convolved; from zero."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__(channels, channels, side, padding=side // 2, groups=channels)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, v: Tensor, grid: Sequence[int]) -> Tensor:
        *frames, height, width = grid
        B, heads, _, D = v.shape
        maps = v.permute(0, 2, 1, 3).reshape(B * prod(frames), height, width, heads * D).permute(0, 3, 1, 2)
        out = super().forward(maps.to(self.weight.dtype)).to(v.dtype)  # (B * T, heads * D, H, W)
        return out.permute(0, 2, 3, 1).reshape(B, -1, heads, D).transpose(1, 2)
