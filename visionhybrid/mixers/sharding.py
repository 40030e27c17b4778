"""One sequence over several processes: each mixes its own tokens and gets of the others what its mixer needs of them.

Every rank of a group holds a run of the text and a run of the image, `[text, image]`, cut as `Tensor.tensor_split` cuts them:
so does diffusers' context parallelism. What crosses ranks is the mixer's matter (`Mixer.sharded`):

    linear mixers   their state, heads x D x (D + 1) numbers at any length
    local mixers    the rows around their own, and text
    the others      tokens for heads: a rank mixes the whole sequence in its part of the heads (arXiv:2309.14509)

Everything differentiates. Where a loss is the sum of those of the ranks, so is the gradient of a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from visionhybrid.kernels.linear_attention.ops import AllReduce
from visionhybrid.kernels.precision import wide
from visionhybrid.mixers.base import Halo, Mixer

__all__ = ["Shards", "in_heads", "mix"]


def mix(
    mixer: Mixer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    text_tokens: int = 0,
    group: ProcessGroup | None = None,
    **extra: Any,
) -> Tensor:
    """`mixer(q, k, v, ...)`; where the sequence is sharded over `group`, this rank's tokens of that.

    Args:
        q, k, v: (B, heads, n, D), this rank's.
        grid, text_tokens, extra: of the whole sequence in any case.
    Raises:
        ValueError: a mixer that cannot be shared, or numbers of tokens that are not those of `tensor_split`.
    """
    if group is None:
        return mixer(q, k, v, grid=grid, text_tokens=text_tokens, **extra)
    shards = Shards(group, tuple(grid), text_tokens)
    text, image = shards.sizes[shards.rank]
    if q.shape[2] != text + image:
        raise ValueError(
            f"{mixer.about.name}: rank {shards.rank} of {shards.ranks} holds {q.shape[2]} tokens, of {text_tokens} of text "
            f"and a grid of {shards.grid} these would be {text} and {image}"
        )
    return mixer.sharded(q, k, v, shards=shards, **extra)


@dataclass(frozen=True)
class Shards:
    """How a sequence lies on the ranks of `group`."""

    group: ProcessGroup
    grid: tuple[int, ...]  # of the whole image
    text_tokens: int = 0  # of the whole text

    @property
    def rank(self) -> int:
        return distributed.get_rank(self.group)

    @property
    def ranks(self) -> int:
        return distributed.get_world_size(self.group)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Text and image tokens of each rank."""
        return list(zip(self.cut(self.text_tokens), self.cut(prod(self.grid)), strict=True))

    def cut(self, count: int) -> list[int]:
        """What `tensor_split` makes of `count`."""
        return [count // self.ranks + (rank < count % self.ranks) for rank in range(self.ranks)]

    def parts(self, x: Tensor, dim: int = 2) -> tuple[Tensor, ...]:
        """This rank's tokens -> its text, its image."""
        return x.tensor_split([self.sizes[self.rank][0]], dim)

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole sequence -> this rank's tokens."""
        cuts = [x.tensor_split(self.ranks, dim)[self.rank] for x in x.tensor_split([self.text_tokens], dim)]
        return torch.cat(cuts, dim)

    def text(self, x: Tensor) -> Tensor:
        """(B, heads, n, D) of this rank's tokens -> (B, heads, text_tokens, D)."""
        return self._gather(self.parts(x)[0], self.text_tokens)

    def image(self, x: Tensor) -> Tensor:
        """(B, heads, n, D) of this rank's image tokens -> (B, heads, prod(grid), D)."""
        return self._gather(x, prod(self.grid))

    def around(self, x: Tensor, halo: Halo) -> tuple[Tensor, slice]:
        """This rank's image tokens (B, heads, n, D) -> those of whole rows with their halo, and which of them are its own."""
        row = prod(self.grid[1:])
        own = list(pairwise(accumulate(self.cut(prod(self.grid)), initial=0)))
        rows = [halo.around(a // row, -(-b // row), self.grid[0]) for a, b in own]
        wanted = [(start * row, stop * row) for start, stop in rows]

        def common(owner: int, taker: int) -> range:
            (a, b), (start, stop) = own[owner], wanted[taker]
            return range(max(a, start), max(a, start, min(b, stop)))

        first = own[self.rank][0]
        give = [common(self.rank, taker) for taker in range(self.ranks)]
        take = [common(owner, self.rank) for owner in range(self.ranks)]
        parts = [x[:, :, run.start - first : run.stop - first] for run in give]
        got = self.exchange(parts, [(*x.shape[:2], len(run), x.shape[3]) for run in take])
        start = first - wanted[self.rank][0]
        return torch.cat(got, 2), slice(start, start + x.shape[2])

    def text_rows(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """What this rank's text queries get of all keys by softmax: each rank sums up its own keys for all of them."""
        queries = wide(self.text(q)) * (q.shape[3] ** -0.5 if scale is None else scale)
        logits = queries @ wide(k).mT
        top = logits.detach().amax(-1, keepdim=True)
        distributed.all_reduce(top, distributed.ReduceOp.MAX, self.group)
        weights = (logits - top).exp()
        sums = torch.cat([weights @ wide(v), weights.sum(-1, keepdim=True)], -1)
        sums = AllReduce.apply(sums, self.group).tensor_split(self.ranks, 2)[self.rank]
        return (sums[..., :-1] / sums[..., -1:]).to(v.dtype)

    def to_heads(self, x: Tensor) -> Tensor:
        """(B, heads, n, D) of this rank's tokens -> the whole sequence in this rank's heads."""
        heads = self.cut(x.shape[1])
        shapes = [(len(x), heads[self.rank], sum(size), x.shape[3]) for size in self.sizes]
        got = self.exchange(x.split(heads, 1), shapes)
        pairs = [part.tensor_split([text], 2) for part, (text, _) in zip(got, self.sizes, strict=True)]
        return torch.cat([*(text for text, _ in pairs), *(image for _, image in pairs)], 2)

    def to_tokens(self, x: Tensor, heads: int) -> Tensor:
        """The way back, with how many heads there are."""
        pairs = zip(
            *(part.tensor_split(self.ranks, 2) for part in x.tensor_split([self.text_tokens], 2)), strict=True
        )
        own = sum(self.sizes[self.rank])
        shapes = [(len(x), part, own, x.shape[3]) for part in self.cut(heads)]
        return torch.cat(self.exchange([torch.cat(pair, 2) for pair in pairs], shapes), 1)

    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """`parts[j]` goes to rank j; what the ranks send here, whose shapes are `shapes`."""
        flat = torch.cat([part.reshape(-1) for part in parts])
        sent, taken = [part.numel() for part in parts], [prod(shape) for shape in shapes]
        got = _Exchange.apply(flat, sent, taken, self.group).split(taken)
        return [part.view(shape) for part, shape in zip(got, shapes, strict=True)]

    def _gather(self, x: Tensor, total: int) -> Tensor:
        shapes = [(*x.shape[:2], count, x.shape[3]) for count in self.cut(total)]
        return torch.cat(self.exchange([x] * self.ranks, shapes), 2)


def in_heads(mixer: Mixer, q: Tensor, k: Tensor, v: Tensor, *, shards: Shards, **extra: Any) -> Tensor:
    """`Mixer.sharded` of a mixer that treats every head alike: it runs on the whole sequence, in this rank's part of the heads.

    A rank sends and receives three times its tokens before and once after.
    """
    if q.shape[1] < shards.ranks:
        raise ValueError(f"{mixer.about.name}: {q.shape[1]} heads cannot be shared by {shards.ranks} ranks")
    D = q.shape[3]
    whole = shards.to_heads(torch.cat([q, k, v], -1)).split([D, D, v.shape[3]], -1)
    return shards.to_tokens(
        mixer(*whole, grid=shards.grid, text_tokens=shards.text_tokens, **extra), q.shape[1]
    )


class _Exchange(torch.autograd.Function):
    """Runs of a flat tensor to the ranks, in their order; gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], taken: list[int], group: ProcessGroup) -> Tensor:
        ctx.back = taken, sent, group
        return _Exchange.run(x, sent, taken, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchange.run(grad, *ctx.back), None, None, None

    @staticmethod
    def run(x: Tensor, sent: list[int], taken: list[int], group: ProcessGroup) -> Tensor:
        out = x.new_empty(sum(taken))
        distributed.all_to_all_single(out, x.contiguous(), taken, sent, group)
        return out
