"""What the host has to know of one kind of attention: where it is, how it is run with a mixer, where its grid comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from torch import nn

from visionhybrid.hosts.diffusers.parallel import Plan
from visionhybrid.hosts.layers import IMAGE_SIDES, Layer

__all__ = ["Family", "Sides", "attention_of", "does_more", "family_of", "hook_others", "layers_of"]

Sides = tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One way of attention in diffusers, and the models that have it. One file each; `family_of` looks them up.

    Args:
        models: names of diffusers' model classes; subclasses of them count.
        layers: (model, sample size or None for the config's) -> every attention module, those that no mixer can replace
            with the reason. It must not depend on mixers that are attached already.
        processor: (attention module) -> a fresh processor that runs `module.mixer`. Its class has no state, needs no
            arguments, has an attribute `mixes = True`, and names every parameter of `__call__`: diffusers drops the rest.
        hooks: (model, names of the layers that have a mixer) -> handles of the hooks that tell processors the grid. A grid
            has to travel as an argument, not as state: a checkpointed layer runs again when other sizes may have come by.
        plain: names of diffusers' processors that compute nothing but the attention which a mixer replaces.
        sides: what the numbers of a sample size are.
        adapt: (attention with a mixer, processor that is to be set there) -> one that runs the mixer and does what that one
            does beside attention; or that one, which is then refused. It may have `release()`, what `detach` leaves behind.
        cp_plan: model -> how ranks share its tokens (`parallel.py`), where diffusers has no plan. ValueError: they cannot.
    """

    models: tuple[str, ...]
    layers: Callable[[nn.Module, Sides], list[Layer]]
    processor: Callable[[nn.Module], Any]
    hooks: Callable[[nn.Module, set[str]], list[Any]]
    plain: frozenset[str]
    sides: tuple[str, ...] = IMAGE_SIDES
    adapt: Callable[[Any, Any], Any] = lambda attn, processor: processor
    cp_plan: Callable[[Any], Plan] = lambda model: model._cp_plan


def family_of(model: nn.Module) -> Family | None:
    """The family of a model's attention, None if none is known."""
    names = {cls.__name__ for cls in type(model).__mro__}
    return next((family for family in _families() if names.intersection(family.models)), None)


def does_more(attn: Any, plain: frozenset[str], than: str = "softmax") -> str | None:
    """Why the processor of `attn` must stay: it is none of the `plain` ones, and none of ours."""
    name = type(attn.processor).__name__
    if name in plain or getattr(attn.processor, "mixes", False):
        return None
    return f"its processor {name} does more than {than} attention, and a mixer would undo that"


def layers_of(
    model: nn.Module, kind: type[nn.Module], facts: Callable[[str, Any], Mapping[str, Any]]
) -> list[Layer]:
    """Every attention of class `kind`; `facts` (name, module) are those of `Layer` beside its widths."""
    return [
        Layer(
            name=name,
            module=module,
            dim=module.to_q.in_features,
            heads=module.heads,
            head_dim=module.inner_dim // module.heads,
            **facts(name, module),
        )
        for name, module in attention_of(model, kind)
    ]


def attention_of(model: nn.Module, kind: type[nn.Module]) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def hook_others(
    model: nn.Module, kind: type[nn.Module], names: set[str], hook: Callable[..., Any]
) -> list[Any]:
    """Handles of `hook`, which takes keywords, before every attention of class `kind` that is not among `names`."""
    return [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for name, module in attention_of(model, kind)
        if name not in names
    ]


def known_models() -> list[str]:
    return [name for family in _families() for name in family.models]


def _families() -> Sequence[Family]:
    from visionhybrid.hosts.diffusers import classic, cogvideox, flux, hunyuan_video, sana, sd3, wan

    files = (classic, flux, sd3, sana, wan, hunyuan_video, cogvideox)
    return [family for file in files for family in file.FAMILIES]


def as_pair(size: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """A sample size as diffusers' configs give it, int or list, as (height, width)."""
    return None if size is None else (size, size) if isinstance(size, int) else tuple(size)


def halved(size: tuple[int, ...], padded: bool) -> tuple[int, ...]:
    """What a stride-2 convolution of kernel 3 leaves: with padding 1 the ceiling, else diffusers pads one side only."""
    return tuple(ceil(n / 2) if padded else max(n // 2, 1) for n in size)
