"""Feed-forward networks a piece of the tokens at a time: the same numbers with a hidden layer of a fraction of the size.

With a mixer that keeps no scores, what a block needs most is its feed-forward network: GEGLU's hidden layer is eight times as
wide as the tokens, its parts and their product eight times again. So a block with a mixer runs it in `PIECES`, which leaves it
about as much as the mixer's q, k, v and output need, at any size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

__all__ = ["InPieces", "in_pieces", "pieces_around"]

# SD 1.5's UNet at 1024x1024 in float32 has 545 MB of tensors alive at once with whole networks, 315 with four pieces, and 294,
# where its convolutions need most, with eight; the resident set is much the same with four, whose products are larger.
PIECES = 4
# Tokens of a piece, below which a network is run whole: its memory is small then, and each piece reads all weights.
SHORTEST = 1024


def in_pieces(run: Callable[[Tensor], Tensor], x: Tensor, count: int) -> Tensor:
    """`run(x)` of (B, N, C), in `count` runs of tokens; `run` must take each token by itself, and N be at least `count`.

    The number of pieces does not depend on N, so that a compiled model may leave N open.
    """
    if count == 1:
        return run(x)
    size = -(-x.shape[1] // count)
    first = run(x[:, :size])
    out = first.new_empty(*x.shape[:2], first.shape[2])
    out[:, :size] = first
    del first  # nothing of a piece lives on while the next one runs
    for i in range(1, count):
        out[:, i * size : (i + 1) * size] = run(x[:, i * size : (i + 1) * size])
    return out


class InPieces(FeedForward):
    """diffusers' feed-forward network of a block with a mixer. Nothing but its forward differs, so it becomes one by its class."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(B, N, C) to (B, N, C); in pieces where no gradient is wanted, which would keep every hidden layer anyway."""
        whole = super().forward
        short = hidden_states.ndim != 3 or hidden_states.shape[1] < PIECES * SHORTEST
        if short or torch.is_grad_enabled() or _fetched(self):
            return whole(hidden_states, *args, **kwargs)
        return in_pieces(lambda x: whole(x, *args, **kwargs), hidden_states, PIECES)


class Handle:
    """Makes a network one that runs in pieces; `remove` makes it diffusers' own again, as for a hook."""

    def __init__(self, network: FeedForward) -> None:
        self.network = network
        network.__class__ = InPieces

    def remove(self) -> None:
        self.network.__class__ = FeedForward


def pieces_around(model: nn.Module, names: set[str]) -> list[Handle]:
    """Handles of the networks beside the attention modules `names`. Other networks than diffusers' `FeedForward` stay whole."""
    blocks = {name.rpartition(".")[0] for name in names}
    networks = [each for block in sorted(blocks) for each in model.get_submodule(block).children()]
    return [Handle(network) for network in networks if type(network) is FeedForward]


def _fetched(network: nn.Module) -> bool:
    """Whether hooks bring weights (offloading) or widen them (fp8) for each call of a layer: then few calls matter more."""
    return any(
        hasattr(each, "_hf_hook") or hasattr(each, "_diffusers_hook") for each in network.net.modules()
    )
