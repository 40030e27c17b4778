"""The host of this package's own transformers (`visionhybrid.diffusion.HybridDiT`): their attention is a mixer anyway.

A model of this host has modules with a `mixer` and the number of `heads`, `grid_of(sample size or None)` for the sides of its
token grid, and `note_mixers()`, which makes its config say which mixers it has now.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, cast

from torch import nn

from visionhybrid.hosts.layers import Layer, SampleSize, Selector, choose, sides
from visionhybrid.hosts.plan import Mixers, plan
from visionhybrid.hosts.report import Report, row_of
from visionhybrid.mixers import Mixer

__all__ = ["attach", "attention", "describe", "detach"]


def attach(
    model: Any,
    mixer: Mixers,
    *,
    layers: Selector | None = None,
    weights: str | PathLike[str] | Mapping[str, Any] | None = None,
    sample_size: SampleSize = None,
    **options: Any,
) -> Report:
    """See `visionhybrid.attach`."""
    model = _transformer(model)
    if weights is not None:
        raise ValueError(f"attach: no weights of mixers are published for {type(model).__name__}")
    parts = plan(_layers(model, sample_size), mixer, layers, options)
    built = [part.build() for part in parts]
    kept = _kept(model)
    for part, new in zip(parts, built, strict=True):
        module: Any = part.layer.module
        like = module.to_q.weight
        kept.setdefault(part.layer.name, module.mixer)
        module.mixer = new.to(device=like.device, dtype=like.dtype).train(model.training)
    model.note_mixers()
    return describe(model, sample_size=sample_size)


def detach(model: Any, *, layers: Selector | None = None) -> Report:
    """See `visionhybrid.detach`."""
    model = _transformer(model)
    kept = _kept(model)
    found = [layer for layer in _layers(model, None) if layer.name in kept]
    if not found:
        raise ValueError(f"detach: {type(model).__name__} has no mixers but those it was made with")
    for layer in choose(found, layers, "detach"):
        module: Any = layer.module
        module.mixer = kept.pop(layer.name)
    model.note_mixers()
    return describe(model)


def describe(model: Any, *, sample_size: SampleSize = None) -> Report:
    """See `visionhybrid.describe`. The mixers that a model was made with are listed as well."""
    model = _transformer(model)
    rows = [row_of(layer, cast(Any, layer.module).mixer) for layer in _layers(model, sample_size)]
    return Report(type(model).__name__, rows)


def attention(model: Any, sample_size: SampleSize = None) -> list[Layer]:
    """See `visionhybrid.hosts`."""
    return _layers(_transformer(model), sample_size)


def _transformer(model: Any) -> Any:
    """Of a pipeline, or the model itself, out of what `torch.compile` wraps."""
    model = getattr(model, "transformer", model)
    return getattr(model, "_orig_mod", model)


def _layers(model: Any, size: SampleSize) -> list[Layer]:
    if not hasattr(model, "note_mixers"):
        raise ValueError(f"{type(model).__name__} has no attention that a mixer could replace")
    grid = model.grid_of(sides(model, size))
    return [
        Layer(
            name=name,
            module=module,
            dim=mixer.dim,
            heads=mixer.heads,
            head_dim=mixer.head_dim,
            grid=grid,
            beside=True,
        )
        for name, module in model.named_modules()
        if isinstance(mixer := module._modules.get("mixer"), Mixer)
    ]


def _kept(model: nn.Module) -> dict[str, nn.Module]:
    """Layer -> the mixer it had before `attach`. Not registered: it is no part of the model while another is there."""
    if "_replaced_mixers" not in vars(model):
        vars(model)["_replaced_mixers"] = {}
    return vars(model)["_replaced_mixers"]
