"""What every registered mixer could do for a model, before any is attached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from visionhybrid import mixers
from visionhybrid.hosts.layers import Layer
from visionhybrid.hosts.plan import Part, misfit

__all__ = ["Choice", "choices_for"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One mixer, at its default options, in all attention of a model that it can replace."""

    mixer: str
    purpose: str
    training_free: bool
    layers: int  # that it fits, of those that can be replaced
    reason: str  # why not the others, empty if it fits all
    # multiplications of softmax attention in these layers over its own; None without sizes
    speedup: float | None
    crossover: int | None  # image tokens from which it multiplies less in every one of them


def choices_for(layers: Sequence[Layer]) -> list[Choice]:
    """One for each registered mixer but softmax, those that save most first."""
    free = [layer for layer in layers if layer.reason is None]
    found = [_choice(name, free) for name in mixers.list_mixers() if name != "softmax"]
    return sorted(found, key=lambda choice: (-choice.layers, -(choice.speedup or 0), choice.mixer))


def _choice(name: str, layers: Sequence[Layer]) -> Choice:
    reasons = [misfit(Part(layer, name)) for layer in layers]
    fits = [layer for layer, reason in zip(layers, reasons, strict=True) if reason is None]
    spent = full = 0
    crossings: set[int | None] = set()
    for layer, count in _alike(fits):
        with torch.device("meta"):
            mixer, softmax = Part(layer, name).build(), Part(layer, "softmax").build()
        if layer.grid is not None:
            spent += count * mixer.cost(grid=layer.grid).macs
            full += count * softmax.cost(grid=layer.grid).macs
        if layer.axes == 2:
            crossings.add(mixers.crossover(mixer))
    about = mixers.about(name)
    return Choice(
        mixer=name,
        purpose=about.purpose,
        training_free=about.training_free,
        layers=len(fits),
        reason=next(filter(None, reasons), ""),
        speedup=full / spent if spent else None,
        crossover=None if None in crossings else max((c for c in crossings if c), default=None),
    )


def _alike(layers: Sequence[Layer]) -> list[tuple[Layer, int]]:
    """Layers of different sizes, and how many there are of each."""
    kinds: dict[object, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault((layer.dim, layer.heads, layer.head_dim, layer.grid, layer.axes), []).append(layer)
    return [(same[0], len(same)) for same in kinds.values()]
