"""The diffusers host: mixers in the attention of diffusers models, or of the denoisers of a pipeline.

    family.py       `Family`: what the host knows of one kind of attention
    classic.py      a family: `Attention` over images (UNets, DiT, PixArt)
    joint.py        processors of joint attention, text beside the image; families with them are in
                    flux.py, sd3.py, hunyuan_video.py, cogvideox.py
    wan.py          a family: self attention over video
    sana.py         a family: SANA, whose own attention is linear
    core.py         putting mixers in and taking them out; the guard against processors that would replace them
    models.py       the classes that save and load models with mixers
    parallel.py     ranks that share the tokens: context parallelism
    published.py    authors' weights: LinFusion; authors.py: CLEAR, SLA

To add a kind of attention: a file with a stateless processor, a function that lists a model's layers, one that makes the grid
known, and a `Family` of the three, named in `family._families`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from visionhybrid.hosts.diffusers import core, published
from visionhybrid.hosts.diffusers.family import family_of
from visionhybrid.hosts.layers import Layer, SampleSize, Selector, choose, sides
from visionhybrid.hosts.plan import Mixers, plan
from visionhybrid.hosts.report import Report, Row, row_of

__all__ = ["attach", "attention", "describe", "detach"]

# Components of pipelines that denoise. A second one refines (Wan 2.2), and gets the same mixers.
DENOISERS = ("unet", "transformer", "transformer_2")


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
    work = []
    if weights is not None and len(list(_denoisers(model))) > 1:
        raise ValueError(
            "attach: weights are one model's; attach to each of this pipeline's transformers by itself"
        )
    for denoiser in _denoisers(model):
        found = _marked(denoiser, sample_size)
        given = None if weights is None else published.read(weights, mixer, found, options, denoiser)
        if given is None:
            work.append((denoiser, plan(found, mixer, layers, options), {}, "", {}))
        else:
            parts = given.parts
            if layers is not None:
                wanted = {layer.name for layer in choose(found, layers)}
                parts = [part for part in parts if part.layer.name in wanted]
            work.append((denoiser, parts, given.tensors, given.name, given.rest))
    for denoiser, parts, tensors, name, rest in work:
        core.install(denoiser, parts, tensors, name, rest)
    _refresh(model)
    return describe(model, sample_size=sample_size)


def detach(model: Any, *, layers: Selector | None = None) -> Report:
    """See `visionhybrid.detach`."""
    work = []
    for denoiser in _denoisers(model):
        held = core.state_of(denoiser).layers
        found = [layer for layer in core.family(denoiser).layers(denoiser, None) if layer.name in held]
        if not found:
            raise ValueError(f"detach: {type(denoiser).__name__} has no mixers")
        work.append((denoiser, [layer.name for layer in choose(found, layers, "detach")]))
    for denoiser, names in work:
        core.remove(denoiser, names)
    _refresh(model)
    return describe(model)


def describe(model: Any, *, sample_size: SampleSize = None) -> Report:
    """See `visionhybrid.describe`."""
    rows, names = [], []
    for denoiser in _denoisers(model):
        names.append(type(denoiser).__name__)
        held = core.state_of(denoiser).layers
        for layer in _layers(denoiser, sample_size):
            rows.append(_row(layer, held.get(layer.name)))
    return Report(", ".join(names), rows)


def attention(model: Any, sample_size: SampleSize = None) -> list[Layer]:
    """See `visionhybrid.hosts`."""
    return [layer for denoiser in _denoisers(model) for layer in _layers(denoiser, sample_size)]


def _denoisers(model: Any) -> Iterator[nn.Module]:
    """The models meant: the denoisers of a pipeline, or the model itself, out of what `torch.compile` wraps."""
    if isinstance(model, DiffusionPipeline):
        parts = [getattr(model, name, None) for name in DENOISERS]
        found = [part for part in (getattr(p, "_orig_mod", p) for p in parts) if isinstance(part, ModelMixin)]
        known = [part for part in found if family_of(part)]
        if not known:
            classes = ", ".join(type(part).__name__ for part in found) or "no denoiser"
            raise ValueError(f"{type(model).__name__}: no mixer fits what denoises in it ({classes})")
        yield from known
        return
    yield getattr(model, "_orig_mod", model)


def _refresh(model: Any) -> None:
    """A pipeline notes the classes of its components when they are set; it saves what it noted."""
    if isinstance(model, DiffusionPipeline):
        for name in DENOISERS:
            if getattr(model, name, None) is not None:
                setattr(model, name, getattr(model, name))


def _layers(model: nn.Module, sample_size: SampleSize) -> list[Layer]:
    """The model's layers at a caller's size, or its config's."""
    kind = core.family(model)
    return kind.layers(model, sides(model, sample_size, kind.sides))


def _marked(model: nn.Module, size: SampleSize) -> list[Layer]:
    """The model's layers; those that have a mixer already cannot get another."""
    held = core.state_of(model).layers
    return [
        replace(layer, reason=f"it has a mixer, {held[layer.name].mixer}; detach it first")
        if layer.name in held
        else layer
        for layer in _layers(model, size)
    ]


def _row(layer: Layer, held: core.Held | None) -> Row:
    if held is None:
        return row_of(layer, None)
    mixer: Any = layer.module.mixer
    return row_of(layer, mixer, weights=held.weights)
