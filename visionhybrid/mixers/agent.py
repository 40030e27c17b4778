"""Agent attention for trained diffusion models (AgentSD): few agents read all tokens, all tokens read the agents.

Paper: Han et al., arXiv:2312.08874. Code: LeapLabTHU/Agent-Attention@207ce3e `agentsd/patch.py`, training-free. Tokens that
are alike are merged first; agents are what is left when nearly all are.
Tokens are ranked by the likeness of `metric`, the block's input before its norm in the authors' code; without it, of the keys
(as in the first token merging, arXiv:2210.09461). Merging q, k and v is merging the normed states before the projections.
Differences: destinations are each cell's first token, not a random one; text may stand beside the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from visionhybrid.mixers import merging
from visionhybrid.mixers.base import Cost, Mixer, attention_cost, per_axis, text_rows
from visionhybrid.mixers.registry import register
from visionhybrid.mixers.sharding import Shards, in_heads


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    own: Tensor | None = None,
    *,
    sharpness: float = 0.3,
    shortcut: float = 0.075,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale ** sharpness * q a^T) (softmax(scale * a k^T) v) + shortcut * own.

    Where agents would not save half (2 A >= n), plain softmax(scale * q k^T) v.

    Args:
        q: (B, heads, n, D). k, v: (B, heads, m, D). agents: (B, heads, A, D), projected as queries.
        own: values of the queries' own tokens (B, heads, n, D), default v.
        scale: default D ** -0.5.
    """
    if scale is None:
        scale = float(q.shape[-1] ** -0.5)
    if 2 * agents.shape[2] >= q.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    summary = F.scaled_dot_product_attention(agents, k, v, scale=scale)
    out = F.scaled_dot_product_attention(q, agents, summary, scale=scale**sharpness)
    return out + shortcut * (v if own is None else own)


@register(
    "agent",
    purpose="alike tokens merged, the rest read through a few agents; no training",
    paper="arXiv:2312.08874",
    source="LeapLabTHU/Agent-Attention@207ce3e",
    license="none stated",
    grids=(2, 3),
    text=True,
    masks=False,
    parameters=False,
    training_free=True,
)
class Agent(Mixer):
    """Agent attention among merged image tokens, copied back to all; plain softmax where agents would not save half.

    Defaults are the authors' for the first 20 of 50 steps; afterwards they use `cell=2, agent_ratio=0.5`.

    Args:
        ratio: share of image tokens merged away before attention.
        agent_ratio: share merged away to leave the agents.
        cell: one token of each cell (one side, or height and width) absorbs the others.
        sharpness: exponent of the logit scale where tokens read agents. shortcut: share of v added.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        head_dim: int,
        scale: float | None = None,
        ratio: float = 0.4,
        agent_ratio: float = 0.95,
        cell: int | Sequence[int] = 4,
        sharpness: float = 0.3,
        shortcut: float = 0.075,
    ) -> None:
        super().__init__(dim=dim, heads=heads, head_dim=head_dim, scale=scale)
        if not 0 <= ratio <= agent_ratio <= 1:
            raise ValueError(f"agent: need 0 <= ratio <= agent_ratio <= 1, got {ratio} and {agent_ratio}")
        self.ratio, self.agent_ratio, self.cell = ratio, agent_ratio, per_axis("agent", "cell", cell, 2)
        self.sharpness, self.shortcut = sharpness, shortcut

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Sequence[int],
        text_tokens: int = 0,
        metric: Tensor | None = None,
    ) -> Tensor:
        """As `Mixer.forward`; `metric` (B, prod(grid), C) ranks the image tokens instead of their keys."""
        self.check(q, k, v, grid, text_tokens)
        image = [x[:, :, text_tokens:] for x in (q, k, v)]
        metric = image[1].transpose(1, 2).flatten(2) if metric is None else metric
        if metric.shape[:2] != (q.shape[0], prod(grid)):
            raise ValueError(
                f"agent: metric must be {(q.shape[0], prod(grid))} tokens, got {tuple(metric.shape)}"
            )
        ranking = merging.rank(metric, grid, self.cell)
        merged = ranking.merging(int(self.ratio * prod(grid)))
        few = ranking.merging(int(self.agent_ratio * prod(grid)))
        queries, keys, own = (merged.merge(x) for x in image)
        values = torch.cat([v[:, :, :text_tokens], own], 2)
        keys = torch.cat([k[:, :, :text_tokens], keys], 2)
        out = agent_attention(
            queries,
            keys,
            values,
            few.merge(image[0]),
            own,
            sharpness=self.sharpness,
            shortcut=self.shortcut,
            scale=self.scale,
        )
        out = merged.unmerge(out)
        return torch.cat([text_rows(q, k, v, text_tokens, self.scale), out], 2) if text_tokens else out

    def sharded(
        self, q: Tensor, k: Tensor, v: Tensor, *, shards: Shards, metric: Tensor | None = None
    ) -> Tensor:
        """Whole in this rank's heads; what ranks the tokens is gathered."""
        if metric is None:
            metric = shards.parts(k)[1].transpose(1, 2).flatten(2)
        if metric.shape[1] != prod(shards.grid):
            metric = shards.image(metric[:, None])[:, 0]
        return in_heads(self, q, k, v, shards=shards, metric=metric)

    def cost(self, *, grid: Sequence[int], text_tokens: int = 0, bytes_per: int = 2) -> Cost:
        image = prod(grid)
        cells = merging.cells(grid, self.cell)
        left, agents = (max(cells, image - int(share * image)) for share in (self.ratio, self.agent_ratio))
        keys = left + text_tokens
        pairs = agents * (keys + left) if 2 * agents < left else left * keys
        matching = Cost(macs=(image - cells) * cells * self.heads * self.head_dim, bytes=0)
        tokens = image + text_tokens
        return attention_cost(pairs + text_tokens * tokens, tokens, self, bytes_per) + matching
