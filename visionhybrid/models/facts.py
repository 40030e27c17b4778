"""All we know of a registered model, counted on the meta device: no weights are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from visionhybrid.models import registry

RESTORER_SIDE = 64  # restorers have no input size of their own; papers count at 64 x 64


@dataclass(frozen=True)
class Facts:
    """What `visionhybrid info` prints. Everything is JSON-able (`dataclasses.asdict`)."""

    name: str
    task: str
    system: str
    purpose: str
    paper: str
    source: str
    license: str  # of the reference code
    parameters: int
    macs: int  # multiply-adds of convolutions and matrix products, attention included, one image of `input_size`
    input_size: tuple[int, ...]  # (C, H, W)
    output_size: tuple[int, ...]  # (classes,), (C, H, W), or that of the features without a classifier
    scale: int | None  # of a restorer
    features: tuple[dict[str, Any], ...]  # "module", "num_chs", "reduction" of each tap
    options: dict[str, Any]  # what its system's constructor is given
    tags: tuple[str, ...]
    weights: dict[str, dict[str, Any]]  # tag -> file, hub, url, license, purpose, published
    example: str


def facts(name: str) -> Facts:
    """Facts of the registered model `name` (a tag after a dot is allowed, and decides the input size).

    Raises:
        ValueError: no such name; suggests the nearest.
    """
    base = registry.require(name)
    cfg = registry.default_cfg(name)
    system = registry.SYSTEMS[registry.SYSTEM_OF[base]]
    model = timm.create_model(base, device="meta").eval()
    size = _input_size(model, system.task, cfg)
    macs, output = count(model, size)
    return Facts(
        name=base,
        task=system.task,
        system=system.name,
        purpose=system.purpose,
        paper=system.paper,
        source=system.source,
        license=system.license,
        parameters=parameters(model),
        macs=macs,
        input_size=size,
        output_size=output,
        scale=getattr(model, "scale", None) if system.task == "restoration" else None,
        features=tuple(
            {field: info[field] for field in ("module", "num_chs", "reduction")}
            for info in getattr(model, "feature_info", ())
        ),
        options=dict(registry.VARIANTS[base]),
        tags=tuple(registry.tags_of(base)),
        weights=_weights(base),
        example=_example(base, system.task, size, cfg),
    )


def parameters(model: nn.Module) -> int:
    """Trainable numbers of `model`, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def count(model: nn.Module, size: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Multiply-adds of one forward pass of an image of `size` (C, H, W), and the size of the output.

    The model must be on the meta device; additions of norms, activations and biases do not count, as in papers.
    """
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        out = model(torch.empty(1, *size, device="meta"))
    last = out[-1] if isinstance(out, (list, tuple)) else out
    return counter.get_total_flops() // 2, tuple(last.shape[1:])


def _input_size(model: nn.Module, task: str, cfg: dict[str, Any]) -> tuple[int, ...]:
    channels = int(getattr(model, "in_chans", cfg["input_size"][0]))
    sides = (RESTORER_SIDE, RESTORER_SIDE) if task == "restoration" else cfg["input_size"][1:]
    return (channels, *sides)


def _weights(base: str) -> dict[str, dict[str, Any]]:
    found = {}
    for key, weights in registry.WEIGHTS.items():
        name, _, tag = key.partition(".")
        if name == base:
            entry = {field: value for field, value in vars(weights).items() if value}
            found[tag or "default"] = {**entry, "published": dict(weights.published)}
    return found


def _example(name: str, task: str, size: tuple[int, ...], cfg: dict[str, Any]) -> str:
    if task == "restoration":
        return f"visionhybrid restore IN OUT --model {name} --weights FILE"
    extra = "num_classes=10" if cfg.get("num_classes") else "features_only=True"
    return f"timm.create_model({name!r}, {extra})(torch.randn(1, {', '.join(map(str, size))}))"
