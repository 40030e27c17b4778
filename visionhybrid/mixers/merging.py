"""Token merging on a grid: which tokens are alike enough to be averaged, and how outputs get back to all of them.

Paper: Bolya and Hoffman, arXiv:2303.17604 (ToMe for Stable Diffusion), as in LeapLabTHU/Agent-Attention@207ce3e with
`use_rand=False`: the first token of each cell is a destination, every other one a source.
Works on (B, heads, N, D), and on hidden states as (B, 1, N, C).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from visionhybrid.kernels.precision import wide


@dataclass(frozen=True)
class Merging:
    """The `merged` sources are averaged into destinations, the `kept` ones stay."""

    kept: Tensor  # (B, n) tokens
    merged: Tensor  # (B, r) tokens
    into: Tensor  # (B, r) places among the destinations
    destinations: Tensor  # (B, cells) tokens

    def merge(self, x: Tensor) -> Tensor:
        """(B, heads, N, D) -> (B, heads, n + cells, D): kept sources, then destinations with their sources' mean."""
        target = _take(x, self.destinations)
        into = self.into[:, None, :, None].expand(*x.shape[:2], -1, x.shape[3])
        target = target.scatter_reduce(2, into, _take(x, self.merged), "mean")
        return torch.cat([_take(x, self.kept), target], 2)

    def unmerge(self, x: Tensor) -> Tensor:
        """The way back: a merged source gets a copy of its destination's row."""
        kept, target = x.tensor_split([self.kept.shape[1]], dim=2)
        rows = torch.cat([kept, target, _take(target, self.into)], 2)
        tokens = torch.cat([self.kept, self.destinations, self.merged], 1)
        return _take(rows, tokens.argsort(1))


@dataclass(frozen=True)
class Ranking:
    """Sources by falling likeness to their best destination."""

    sources: Tensor  # (B, S) tokens
    into: Tensor  # (B, S) places among the destinations
    destinations: Tensor  # (B, cells) tokens

    def merging(self, count: int) -> Merging:
        """The `count` likeliest sources merged, or all there are."""
        merged, kept = self.sources.tensor_split([min(count, self.sources.shape[1])], dim=1)
        return Merging(kept, merged, self.into[:, : merged.shape[1]], self.destinations)


def cells(grid: Sequence[int], cell: Sequence[int]) -> int:
    """Number of destinations: whole cells of `cell` (height, width) in each frame, at least one an axis."""
    *frames, height, width = grid
    return prod(frames) * max(1, height // cell[0]) * max(1, width // cell[1])


@torch.no_grad()
def rank(metric: Tensor, grid: Sequence[int], cell: Sequence[int]) -> Ranking:
    """Sources of `grid` ranked by the cosine of `metric` (B, N, C) with their best destination.

    Rows and columns that fill no whole cell are sources. Frames of a video keep destinations of their own.
    """
    *frames, height, width = grid
    first = torch.zeros(prod(frames), height, width, dtype=torch.bool, device=metric.device)
    rows, columns = (
        size * torch.arange(max(1, side // size), device=metric.device)
        for side, size in ((height, cell[0]), (width, cell[1]))
    )
    first[:, rows[:, None], columns] = True
    # A stable sort keeps raster order and, unlike nonzero, has a shape that is known beforehand.
    tokens = first.flatten().logical_not().to(torch.int8).argsort(stable=True)
    destinations, sources = tokens.tensor_split([cells(grid, cell)])
    with torch.autocast(metric.device.type, enabled=False):  # rounded cosines would tie
        unit = F.normalize(wide(metric), dim=-1)
        likeness, into = (unit[:, sources] @ unit[:, destinations].mT).max(-1)
    order = likeness.argsort(dim=-1, descending=True)
    return Ranking(sources[order], into.gather(1, order), destinations.expand(len(metric), -1))


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    """Rows of (B, heads, N, D) at tokens (B, n)."""
    return x.gather(2, tokens[:, None, :, None].expand(*x.shape[:2], -1, x.shape[3]))
