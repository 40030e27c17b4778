"""What mixers cost at growing length: multiplications and bytes by their own count, seconds by the clock, here and now."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from visionhybrid.mixers import Mixer, crossover

SIDES = (4, 8, 16, 32, 64)  # of the square grid of tokens; the first is the digits'
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one image: float32, one layer, the projections around the mixer left out."""

    tokens: int
    products: int  # multiplications
    bytes: int  # to be read and written at least
    seconds: float  # median


@dataclass(frozen=True, kw_only=True)
class MixerCost:
    """One mixer from the shortest to the longest sequence, beside softmax attention of the same width."""

    name: str
    at: list[Cost]
    fewer_from: int | None  # tokens of the smallest square grid on which it multiplies less
    faster_from: int | None  # the first measured length from which on it took less time; None: at none


def compare(
    mixers: Mapping[str, Mixer], sides: Sequence[int] = SIDES, rounds: int = ROUNDS
) -> list[MixerCost]:
    """The costs of each, in the order given; the first is the softmax attention that the others replace."""
    base = next(iter(mixers))
    found: dict[str, list[Cost]] = {name: [] for name in mixers}
    for side in sides:
        taken = _times(mixers, side, rounds)
        for name, mixer in mixers.items():
            count = mixer.cost(grid=(side, side), bytes_per=4)
            found[name].append(
                Cost(tokens=side * side, products=count.macs, bytes=count.bytes, seconds=median(taken[name]))
            )
    return [
        MixerCost(
            name=name,
            at=found[name],
            fewer_from=None if name == base else crossover(mixer),
            faster_from=None if name == base else faster_from(found[name], found[base]),
        )
        for name, mixer in mixers.items()
    ]


def faster_from(ours: Sequence[Cost], theirs: Sequence[Cost]) -> int | None:
    """The first length from which on every measured time is below theirs."""
    start = None
    for our, their in zip(reversed(ours), reversed(theirs), strict=True):
        if our.seconds >= their.seconds:
            break
        start = our.tokens
    return start


def _times(mixers: Mapping[str, Mixer], side: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each, taken in turns: whatever else loads the machine for a while meets all."""
    generator = torch.Generator().manual_seed(0)
    taken: dict[str, list[float]] = {name: [] for name in mixers}
    for turn in range(rounds + 1):
        for name, mixer in mixers.items():
            inputs = _inputs(mixer, side, generator)
            seconds = _seconds(mixer, inputs, side)
            if turn:  # the first is to warm up
                taken[name].append(seconds)
    return taken


def _inputs(mixer: Mixer, side: int, generator: torch.Generator) -> list[Tensor]:
    shape = (1, side * side, mixer.heads, mixer.head_dim)
    # Strides as projections leave them.
    qkv = (torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(3))
    return [torch.randn(1, side * side, mixer.dim, generator=generator), *qkv]


@torch.inference_mode()
def _seconds(mixer: Mixer, inputs: Sequence[Tensor], side: int) -> float:
    x, q, k, v = inputs
    calls = max(1, 64 // side)  # so that a short one is not lost in the clock
    start = time.perf_counter()
    for _ in range(calls):
        mixer.hidden(x)
        mixer(q, k, v, grid=(side, side))
    return (time.perf_counter() - start) / calls
