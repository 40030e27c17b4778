"""Putting mixers into one diffusers model and taking them out.

A mixer lives in a child module `attn.mixer` of the attention that it replaces: so it moves, is cast, offloaded, saved and
trained with the model, LoRA finds the projections where they were, and the processor beside it needs no state (diffusers
rebuilds processors by calling their class). What `detach` needs is kept in `model._visionhybrid`, which is no parameter, buffer
or module; the model's class becomes one that can be saved and loaded with its mixers (`models.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from visionhybrid import mixers
from visionhybrid.hosts.diffusers import feed_forward, models
from visionhybrid.hosts.diffusers.family import Family, family_of, known_models
from visionhybrid.hosts.plan import Part

logger = logging.getLogger(__name__)

__all__ = ["Held", "State", "family", "install", "remove", "state_of"]


@dataclass
class Held:
    """What one layer was before it got its mixer."""

    mixer: str
    options: dict[str, Any]
    processor: Any
    weights: str = ""  # whose projections the attention has now; empty for its own
    own: dict[str, Tensor] = field(default_factory=dict)  # projections that `weights` replaced, on the CPU


@dataclass
class State:
    """`model._visionhybrid`: the layers that have a mixer, in the model's order, and the hooks that serve them."""

    layers: dict[str, Held] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)  # weights of a whole model that others replaced
    handles: list[Any] = field(default_factory=list)

    def config(self) -> dict[str, Any]:
        """What `config.json` holds: enough to build the mixers again."""
        layers = {
            name: {"mixer": held.mixer, "options": held.options, "weights": held.weights}
            for name, held in self.layers.items()
        }
        return {"version": 1, "layers": layers}


def state_of(model: nn.Module) -> State:
    return getattr(model, "_visionhybrid", None) or State()


def family(model: nn.Module) -> Family:
    """ValueError for a model whose attention no family knows."""
    found = family_of(model)
    if found is None:
        raise ValueError(f"{type(model).__name__} is not supported; have {', '.join(sorted(known_models()))}")
    return found


def install(
    model: nn.Module,
    parts: Sequence[Part],
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    weights: str = "",
    rest: Mapping[str, Tensor] | None = None,
) -> None:
    """Give each part's layer its mixer; all of them, or the model stays as it was.

    Args:
        tensors: layer -> {key: tensor}, published weights in our keys: `mixer.*`, and projections (`to_q.weight`).
        weights: where they come from, for `describe`.
        rest: published weights of the whole model beside the mixers', in its own keys; `remove` takes them back with the
            last mixer.
    """
    tensors, rest = tensors or {}, rest or {}
    _check_one_process(model)
    built = {part.layer.name: part.build() for part in parts}
    for part in parts:
        attn, given = part.layer.module, tensors.get(part.layer.name)
        if given is not None:
            _fill(built[part.layer.name], given, part.layer.name)
            _check_projections(attn, part.layer.name, given)
        _check_weight(attn, part.layer.name)
    _check_projections(model, type(model).__name__, rest)
    kind, state = family(model), state_of(model)
    if rest and state.own:
        raise ValueError("attach: this model has other weights than its own already; detach first")
    state.own |= _swap(model, rest)
    for part in parts:
        name, attn, mixer = part.layer.name, part.layer.module, built[part.layer.name]
        held = Held(part.mixer, mixer.options, cast(Any, attn).processor)
        if name in tensors or rest:
            held.weights = weights
        if name in tensors:
            held.own = _swap(attn, {k: v for k, v in tensors[name].items() if not k.startswith("mixer.")})
        _mount(model, attn, mixer, kind)
        state.layers[name] = held
    _settle(model, state)


def remove(model: nn.Module, names: Sequence[str]) -> None:
    """Give these layers their own processors and projections back."""
    state = state_of(model)
    _check_one_process(model)
    for name in names:
        held, attn = state.layers[name], model.get_submodule(name)
        if held.weights and not held.own and not state.own:
            raise ValueError(
                f"detach: {name} has projections of {held.weights}; its own ones are not in this checkpoint, "
                "load the model that they were attached to"
            )
        if held.own:
            _check_projections(attn, name, held.own)
    _check_projections(model, type(model).__name__, state.own)
    for name in names:
        held, attn = state.layers.pop(name), cast(Any, model.get_submodule(name))
        _swap(attn, held.own)
        own = attn.processor.release() if hasattr(attn.processor, "release") else held.processor
        attn.set_processor(own)
        del attn.mixer
    if not state.layers:
        _swap(model, state.own)
        state.own = {}
    _settle(model, state)


def rebuild(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Empty mixers where `config` (see `State.config`) says, for weights that are loaded next."""
    if config.get("version") != 1:
        raise ValueError(
            f"{type(model).__name__}: mixers saved in format {config.get('version')}, this reads 1"
        )
    kind, state = family(model), State()
    for name, entry in config["layers"].items():
        layer = next((layer for layer in kind.layers(model, None) if layer.name == name), None)
        if layer is None or layer.reason:
            raise ValueError(
                f"{type(model).__name__}: no attention {name!r} that could have a mixer, as its config says"
            )
        mixer = Part(layer, entry["mixer"], entry["options"]).build()
        attn = cast(Any, layer.module)
        state.layers[name] = Held(entry["mixer"], mixer.options, attn.processor, entry["weights"])
        _mount(model, attn, mixer, kind)
    _settle(model, state)


def _check_one_process(model: Any) -> None:
    if model._parallel_config is not None:
        raise ValueError(f"{type(model).__name__}: attach and detach before enable_parallelism")


def _mount(model: nn.Module, attn: Any, mixer: mixers.Mixer, kind: Family) -> None:
    weight = attn.to_q.weight
    # A quantised or fp8 projection computes in the model's type.
    narrow = not weight.is_floating_point() or weight.element_size() == 1
    mixer.to(device=weight.device, dtype=cast(Any, model).dtype if narrow else weight.dtype)
    attn.mixer = mixer.train(model.training)
    attn.set_processor(kind.processor(attn))


def _settle(model: Any, state: State) -> None:
    """Hooks, class and config of `model` for the layers that now have a mixer."""
    for handle in state.handles:
        handle.remove()
    state.handles = []
    if not state.layers:
        if isinstance(model, models.Hybrid):
            models.leave(model)
        return
    kind = family(model)
    names = set(state.layers)
    state.handles = [*kind.hooks(model, names), *feed_forward.pieces_around(model, names)]
    for name in state.layers:
        attn = model.get_submodule(name)
        guard = partial(_guard, name=name, processor=attn.processor, plain=kind.plain)
        state.handles.append(attn.register_forward_pre_hook(guard))
    models.enter(model, state)


def _guard(attn: Any, args: tuple[Any, ...], *, name: str, processor: Any, plain: frozenset[str]) -> None:
    """Runs before each call: nothing may put softmax attention in the place of a mixer unnoticed.

    Another way to compute softmax (slices, xformers) concerns the attention that still does; a mixer stays until it is
    detached. A processor that does something else was meant to have an effect, so it is refused. Either way ours is back.
    """
    if not getattr(attn.processor, "mixes", False):
        other, mixer = type(attn.processor).__name__, attn.mixer.about.name
        attn.set_processor(processor)
        if other not in plain:
            raise ValueError(
                f"{name}: {other} was put in the place of its {mixer} mixer, which is back now; detach this layer "
                "first, or leave it out (perturbed attention, PAG, has no meaning for a mixer)"
            )
        logger.warning("%s keeps its %s mixer, %s is dropped; detach it first", name, mixer, other)


def _projections(attn: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """key -> parameter of the attention, that below a LoRA layer if there is one."""
    found = {}
    for key in tensors:
        path, _, leaf = key.rpartition(".")
        layer = cast(Any, attn.get_submodule(path))
        if getattr(layer, "merged", False):
            raise ValueError(f"{path}: a LoRA is fused into this projection; unfuse it first")
        if getattr(attn.get_submodule(path.rpartition(".")[0]), "fused_projections", False):
            raise ValueError(f"{path}: fused with its neighbours; unfuse_qkv_projections() first")
        found[key] = getattr(getattr(layer, "base_layer", layer), leaf)
    return found


def _fill(mixer: nn.Module, given: Mapping[str, Tensor], name: str) -> None:
    own = {k.removeprefix("mixer."): v for k, v in given.items() if k.startswith("mixer.")}
    try:
        mixer.load_state_dict(own, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from error


def _check_projections(attn: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    given = {key: value for key, value in tensors.items() if not key.startswith("mixer.")}
    for key, parameter in _projections(attn, given).items():
        if parameter.is_meta or not parameter.is_floating_point():
            kind = "offloaded" if parameter.is_meta else f"quantised ({parameter.dtype})"
            raise ValueError(
                f"{name}.{key} is {kind}, so its values cannot be replaced; attach or detach first"
            )
        if parameter.shape != given[key].shape:
            raise ValueError(
                f"{name}.{key}: expected {tuple(parameter.shape)}, the weights have {tuple(given[key].shape)}"
            )


def _check_weight(attn: Any, name: str) -> None:
    if attn.to_q.weight.is_meta:
        raise ValueError(f"attach: {name} is offloaded; attach first, then enable offloading")


@torch.no_grad()
def _swap(attn: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write projections, return those that were there."""
    old = {}
    for key, parameter in _projections(attn, tensors).items():
        old[key] = parameter.detach().to("cpu", copy=True)
        parameter.copy_(tensors[key])
    return old
