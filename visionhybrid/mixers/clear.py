"""CLEAR: each image token attends to a disc around it, to all of the text and, optionally, to a pooled image.

Paper: Liu et al., arXiv:2412.16112. Code: Huage001/CLEAR@98e9fed `attention_processor.py`, for FLUX. Parameter
`spatial_weight` (down, down) is the authors' `processor.spatial_weight` (1, 1, 1, down, 1, down, 1).
The disc is cut from a square neighbourhood by a table of relative positions; nothing as long as N x N is built.
Differences: any text length; sides that are no multiple of `down` repeat their last row and column in the pooled image; on a
video grid the disc becomes a ball (tokens in time count as tokens in space) and frames are pooled one by one.
CLEAR's NTK factor multiplies the base of the rotary embedding, which the model applies before any mixer: it is the host's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import ceil, log, prod

import torch
from torch import Tensor, nn

from visionhybrid.kernels.neighborhood_attention import neighborhood_attention
from visionhybrid.mixers.base import Cost, Halo, local_cost
from visionhybrid.mixers.local import Local
from visionhybrid.mixers.registry import register


@register(
    "clear",
    purpose="attention to a disc around each token and to all text, distilled into FLUX",
    paper="arXiv:2412.16112",
    source="Huage001/CLEAR@98e9fed",
    license="Apache-2.0",
    grids=(2, 3),
    text=True,
    masks=False,
    parameters=False,
    training_free=False,
)
class Clear(Local):
    """Softmax over {text} + {image keys nearer than `radius`} + {pooled keys} for image queries, over {text, image} for text.

    Args:
        radius: distance in tokens that a key must stay below; the published weights have 8, 16 and 32.
        down: side of the cells of the pooled image, whose weights `spatial_weight` are learnt; 1 is without, the authors' 4.
        trained_tokens: sequence length in training (4608 for FLUX at 1024x1024); logits are then scaled by
            sqrt(log(L) / log(trained_tokens) / head_dim), with L ten times the length when there is a pooled image.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        head_dim: int,
        scale: float | None = None,
        radius: float = 16,
        down: int = 1,
        trained_tokens: int | None = None,
    ) -> None:
        super().__init__(dim=dim, heads=heads, head_dim=head_dim, scale=scale)
        if radius <= 0 or down < 1:
            raise ValueError(f"clear: radius must be above 0 and down at least 1, got {radius} and {down}")
        if scale is not None and trained_tokens is not None:
            raise ValueError("clear: scale and trained_tokens exclude each other")
        self.radius, self.down, self.trained_tokens = radius, down, trained_tokens
        self.spatial_weight = nn.Parameter(torch.full((down, down), down**-2.0)) if down > 1 else None

    def image(
        self, q: Tensor, k: Tensor, v: Tensor, text: tuple[Tensor, Tensor], *, scale: float | None
    ) -> Tensor:
        axes = q.ndim - 3
        if self.spatial_weight is not None:
            text = torch.cat([text[0], self._pool(k)], 2), torch.cat([text[1], self._pool(v)], 2)
        return neighborhood_attention(
            q,
            k,
            v,
            kernel_size=2 * ceil(self.radius) - 1,
            rpb=self._disc(axes, q.device).expand(q.shape[1], *[-1] * axes),
            extra=text if text[0].shape[2] else None,
            scale=scale,
        ).flatten(2, -2)

    def logit_scale(self, tokens: int) -> float | None:
        if self.trained_tokens is None:
            return self.scale
        length = tokens * (10 if self.down > 1 else 1)
        return (log(length) / log(self.trained_tokens) / self.head_dim) ** 0.5

    def _disc(self, axes: int, device: torch.device) -> Tensor:
        """(1, side, ...): 0 at relative positions nearer than the radius, -inf elsewhere."""
        reach = 2 * ceil(self.radius) - 2
        square = torch.arange(-reach, reach + 1, device=device).square()
        distance = square
        for _ in range(axes - 1):
            distance = distance[..., None] + square
        return torch.zeros((), device=device).where(distance < self.radius**2, float("-inf"))[None]

    def _pool(self, x: Tensor) -> Tensor:
        """(B, heads, [T,] H, W, D) -> (B, heads, cells, D): weighted sums over cells of `down` x `down` tokens."""
        for axis in (-3, -2):
            side = x.shape[axis]
            if side % self.down:
                index = torch.arange(side + -side % self.down, device=x.device).clamp(max=side - 1)
                x = x.index_select(axis, index)
        x = x.unflatten(-2, (-1, self.down)).unflatten(-4, (-1, self.down))
        return torch.einsum("bh...yixjd,ij->bh...yxd", x, self.spatial_weight.to(x.dtype)).flatten(2, -2)

    def halo(self, grid: Sequence[int]) -> Halo | None:
        return Halo(rows=ceil(self.radius) - 1) if self.down == 1 else None

    def cost(self, *, grid: Sequence[int], text_tokens: int = 0, bytes_per: int = 2) -> Cost:
        reach = range(1 - ceil(self.radius), ceil(self.radius))
        keys = sum(sum(x * x for x in at) < self.radius**2 for at in product(reach, repeat=len(grid)))
        cost = local_cost(prod(grid), text_tokens, keys, self, bytes_per)
        if self.down == 1:
            return cost
        *frames, height, width = grid
        cells = prod(frames) * -(-height // self.down) * -(-width // self.down)
        channels = self.heads * self.head_dim
        pooled = Cost(macs=2 * prod(grid) * channels * (cells + 1), bytes=4 * cells * channels * bytes_per)
        return cost + pooled
