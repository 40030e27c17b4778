"""Which mixer each layer gets, checked before anything of the model is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from visionhybrid import mixers
from visionhybrid.hosts.layers import Layer, Selector, choose

__all__ = ["Mixers", "Part", "misfit", "plan"]

Mixers = str | Mapping[str, str | tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Part:
    """One layer, and the mixer that it is to have."""

    layer: Layer
    mixer: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> mixers.Mixer:
        layer = self.layer
        return mixers.create(
            self.mixer, dim=layer.dim, heads=layer.heads, head_dim=layer.head_dim, **self.options
        )


def plan(
    layers: Sequence[Layer], mixer: Mixers, selector: Selector | None, options: Mapping[str, Any]
) -> list[Part]:
    """The parts that `visionhybrid.attach(mixer, layers=selector, **options)` means, in the model's order.

    Raises:
        ValueError: as `attach`; every mixer is looked up and compared with what its layer offers.
    """
    chosen = choose(layers, selector)
    if isinstance(mixer, str):
        parts = [Part(layer, mixer, options) for layer in chosen]
    else:
        if options:
            raise ValueError(
                f"attach: with several mixers give options beside their names, "
                f"{{pattern: (name, {{...}})}}, got {', '.join(options)}"
            )
        parts = _first_match(layers, chosen, mixer)
    if not parts:
        raise ValueError(f"attach: layers={selector!r} selects none of {len(layers)} attention modules")
    for part in parts:
        if reason := misfit(part):
            raise ValueError(f"attach: {reason}")
    return parts


def _first_match(layers: Sequence[Layer], chosen: Sequence[Layer], table: Mapping[str, Any]) -> list[Part]:
    found: dict[str, Part] = {}
    for pattern, value in table.items():
        name, options = (value, {}) if isinstance(value, str) else value
        for layer in choose(layers, pattern):
            found.setdefault(layer.name, Part(layer, name, dict(options)))
    return [found[layer.name] for layer in chosen if layer.name in found]


def misfit(part: Part) -> str | None:
    """Why the mixer cannot do with what its layer offers; None if it can."""
    layer, about = part.layer, mixers.about(part.mixer)
    if about.grids and layer.axes not in about.grids:
        axes = " or ".join(map(str, about.grids))
        return f"{layer.name} has a grid of {layer.axes} axes, {part.mixer} takes {axes}"
    if layer.joint and not about.text:
        return f"{layer.name} mixes text and image tokens together, which {part.mixer} cannot"
    if hasattr(about.mixer, "beside") and not layer.beside:
        return f"{part.mixer} adds something of the hidden states, and {layer.name} has several kinds of them"
    if layer.masked and not about.masks:
        return f"{layer.name} is called with a mask of padded text, which {part.mixer} cannot honour"
    return None
