"""Hosts put any mixer (`visionhybrid.mixers`) into models of another library, and take it out again.

    attach(pipe, "linfusion", weights="Yuanshi/LinFusion-1-5")
    attach(unet, {"down_blocks": "linfusion", "tokens <= 256": "softmax"})
    print(describe(unet))
    detach(unet)                                      # the old modules and outputs, bit for bit

How it is built
    layers.py       `Layer`, one attention module as a host sees it; `choose`, the words by which a caller picks layers
    plan.py         which mixer each layer gets, whether it can take it, and what that saves
    choice.py       what each mixer could do for a model
    report.py       `Report`, what `attach`, `detach` and `describe` return
    own.py          the host of this package's own transformers, whose attention is a mixer anyway
    diffusers/      the diffusers host: see its docstring for how an attention family is added
    timm/           the same for timm's vision transformers

A host is a module with `attach`, `detach` and `describe` of the signatures below, and `attention(model, sample_size)`, which lists
the model's `Layer`s, those that have a mixer as if they had none. The host is found by the library that the model's class comes
from, so nothing is imported before it is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from os import PathLike
from types import ModuleType
from typing import Any

from visionhybrid.hosts.choice import Choice, choices_for
from visionhybrid.hosts.layers import SampleSize, Selector
from visionhybrid.hosts.plan import Mixers
from visionhybrid.hosts.report import Report

__all__ = ["attach", "choices", "describe", "detach"]

logger = logging.getLogger(__name__)

# package of a model's class -> module of its host
HOSTS = {
    "visionhybrid.diffusion": "visionhybrid.hosts.own",
    "diffusers": "visionhybrid.hosts.diffusers",
    "timm": "visionhybrid.hosts.timm",
}


def attach(
    model: Any,
    mixer: Mixers,
    *,
    layers: Selector | None = None,
    weights: str | PathLike[str] | Mapping[str, Any] | None = None,
    sample_size: SampleSize = None,
    **options: Any,
) -> Report:
    """Replace attention of `model` by mixers, in place. Projections, LoRA, adapters and everything else stay the model's own.

    Logs a warning, the same one once, where mixers do more work than softmax attention would at this size.

    Args:
        model: a model of a supported library, or a diffusers pipeline, whose denoisers are then meant.
        mixer: a name of `visionhybrid.mixers.list_mixers()`; or {selector: name or (name, options)}: each layer gets the first
            that matches, and layers that match none are left as they are.
        layers: which attention; every one that can be replaced by default, or those that `weights` name. A shell pattern or
            the beginning of a module's name ("up_blocks.1", "*.attentions.0.*"), a rule ("tokens > 1024", also dim, heads,
            head_dim), a function of a `Layer`, or a list of such.
        weights: published weights: a folder, a repository of the Hugging Face hub, or an open {key: tensor}. The authors' layout
            is recognised; the projections that they replace are kept for `detach`.
        sample_size: what rules and the report count tokens at, in the model's input elements (latent pixels); the size in its
            config by default.
        options: of the mixer, see `visionhybrid.mixers.about(name).options`.
    Returns: what was replaced, what was not and why, and what it saves.
    Raises:
        ValueError: no such mixer, option or layer; a layer that cannot be replaced, by name and with the reason; weights that
            do not fit. The model is then as it was.
    """
    report = _host(model).attach(
        model, mixer, layers=layers, weights=weights, sample_size=sample_size, **options
    )
    if report.slower:
        _warn_once(f"{report.model}: {report.warning}")
    return report


def detach(model: Any, *, layers: Selector | None = None) -> Report:
    """Put the model's own attention back, with the weights it had: outputs are again what they were, bit for bit.

    Args:
        layers: as for `attach`; every mixer by default.
    Raises:
        ValueError: no mixer there, or projections that a checkpoint saved after `attach(weights=...)` no longer holds.
    """
    return _host(model).detach(model, layers=layers)


def describe(model: Any, *, sample_size: SampleSize = None) -> Report:
    """Every attention of `model`: its mixer, or that it can take one, or why not. Print it, or read its `rows`."""
    return _host(model).describe(model, sample_size=sample_size)


def choices(model: Any, *, sample_size: SampleSize = None) -> list[Choice]:
    """What each registered mixer could replace in `model`, what that saves at this size, and from which size on it saves."""
    return choices_for(_host(model).attention(model, sample_size))


@cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def _host(model: Any) -> ModuleType:
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    for cls in type(model).__mro__:
        for package, host in HOSTS.items():
            if f"{cls.__module__}.".startswith(f"{package}."):
                return import_module(host)
    raise ValueError(
        f"no host knows {type(model).__module__}.{type(model).__name__}; there are hosts for {', '.join(HOSTS)}"
    )
