"""What local mixers share: image tokens see some of the image around them and all of the text, text sees everything."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from visionhybrid.mixers.base import Mixer, text_rows
from visionhybrid.mixers.sharding import Shards, in_heads

__all__ = ["Local"]


class Local(Mixer):
    """A mixer that says in `image` what image tokens get."""

    def image(
        self, q: Tensor, k: Tensor, v: Tensor, text: tuple[Tensor, Tensor], *, scale: float | None
    ) -> Tensor:
        """What image tokens get of the image around them and of the text.

        Args:
            q, k, v: (B, heads, *grid, D). text: keys and values that every token sees too, (B, heads, M, D), M may be 0.
        Returns: (B, heads, prod(grid), D).
        """
        raise NotImplementedError

    def logit_scale(self, tokens: int) -> float | None:
        """Of logits in a sequence of so many tokens; None is `head_dim ** -0.5`."""
        return self.scale

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, grid: Sequence[int], text_tokens: int = 0
    ) -> Tensor:
        self.check(q, k, v, grid, text_tokens)
        scale = self.logit_scale(q.shape[2])
        maps = (x[:, :, text_tokens:].unflatten(2, tuple(grid)) for x in (q, k, v))
        image = self.image(*maps, (k[:, :, :text_tokens], v[:, :, :text_tokens]), scale=scale)
        if not text_tokens:
            return image
        return torch.cat([text_rows(q, k, v, text_tokens, scale), image], 2)

    def sharded(self, q: Tensor, k: Tensor, v: Tensor, *, shards: Shards) -> Tensor:
        """Rows around its own and all of the text come to a rank; text queries are summed up over ranks."""
        halo = self.halo(shards.grid)
        if halo is None:
            return in_heads(self, q, k, v, shards=shards)
        D = q.shape[3]
        scale = self.logit_scale(shards.text_tokens + prod(shards.grid))
        both = torch.cat([k, v], -1)
        around, own = shards.around(shards.parts(both)[1], halo)
        queries = F.pad(shards.parts(q)[1], (0, 0, own.start, around.shape[2] - own.stop))
        grid = (-1, *shards.grid[1:])
        maps = (x.unflatten(2, grid) for x in (queries, *around.split([D, v.shape[3]], -1)))
        text_k, text_v = shards.text(both).split([D, v.shape[3]], -1)
        image = self.image(*maps, (text_k, text_v), scale=scale)[:, :, own]
        if not shards.text_tokens:
            return image
        return torch.cat([shards.text_rows(q, k, v, scale), image], 2)
