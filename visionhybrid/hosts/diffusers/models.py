"""Classes of models that carry mixers: diffusers' own, under the same names, that save and load them.

    from visionhybrid.hosts.diffusers.models import UNet2DConditionModel
    unet = UNet2DConditionModel.from_pretrained(folder)

`attach` makes a model an instance of such a class and `detach` of diffusers' again. A pipeline writes this module's name and
the class's into model_index.json, so `DiffusionPipeline.from_pretrained` finds it by itself. The class keeps diffusers' name
because diffusers looks some things up by it (LoRA's block-wise scales).

diffusers' own class would load such a folder, drop the mixers' weights with a warning, and run softmax attention on distilled
projections. It cannot: config.json has a `quantization_config` that only the classes here take away, and diffusers refuses one
that it does not know, quoting its name, which is our message.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import diffusers
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from visionhybrid.hosts.diffusers import parallel
from visionhybrid.hosts.diffusers.family import family_of

if TYPE_CHECKING:
    from visionhybrid.hosts.diffusers.core import State

# diffusers recognises a class that it can load by this name in the module that defines it.
__all__ = ["ModelMixin"]


class Hybrid(parallel.OnCPU):
    """What a model with mixers does differently from diffusers' class, which comes next among its bases."""

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = cast(Any, super()).load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        lock = config.get("quantization_config")
        if isinstance(lock, dict) and "visionhybrid" in lock:
            config.pop("quantization_config")
            if lock["visionhybrid"]:
                config["quantization_config"] = lock["visionhybrid"]
        return loaded

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        model, info = cast(Any, super()).from_pretrained(*args, output_loading_info=True, **kwargs)
        for what, keys in (("lacks", info.get("missing_keys")), ("has unknown", info.get("unexpected_keys"))):
            strange = [key for key in keys or () if ".mixer." in key]
            if strange:
                raise ValueError(
                    f"{cls.__name__}: the checkpoint {what} weights of mixers: {', '.join(strange[:4])}"
                    f"{' ...' if len(strange) > 4 else ''}"
                )
        return (model, info) if output_loading_info else model

    def enable_parallelism(self, *, config: Any, cp_plan: parallel.Plan | None = None) -> None:
        """As diffusers'; where it has no plan for the model, there is one of ours (`parallel.py`)."""
        family = cast(Any, family_of(cast(Any, self)))
        layers = family.layers(self, None)
        parallel.check(self, layers)
        cast(Any, super()).enable_parallelism(config=config, cp_plan=cp_plan or family.cp_plan(self))
        for layer in layers:
            if layer.whole and hasattr(layer.module.processor, "_parallel_config"):
                layer.module.processor._parallel_config = None

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        model = cast(Any, self)
        if getattr(diffusers, type(self).__name__, None) is not _base(type(self)):
            raise ValueError(
                f"{type(self).__name__}: only classes that diffusers exports can be saved with mixers; detach first"
            )
        config = json.loads(model.to_json_string())
        message = (
            f"visionhybrid: this folder has mixers, which diffusers' own class would lose. Load it with "
            f"{__name__}.{type(self).__name__}; in model_index.json its library is {__name__!r}"
        )
        config["quantization_config"] = {
            "quant_method": message,
            "visionhybrid": config.get("quantization_config") or {},
        }
        path = Path(json_file_path)
        draft = path.with_name(f"{path.name}.part")
        draft.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        draft.replace(path)


def set_attn_processor(self: Any, processor: Any) -> None:
    """As in diffusers, for the attention that has no mixer: those that have one keep it, and a dict must agree with that."""
    ours = {f"{name}.processor": self.get_submodule(name).processor for name in self._visionhybrid.layers}
    if isinstance(processor, dict):
        adapt = cast(Any, family_of(self)).adapt
        held = {f"{name}.processor": self.get_submodule(name) for name in self._visionhybrid.layers}
        processor |= {key: adapt(held[key], processor[key]) for key in ours if key in processor}
        lost = [key for key in ours if key in processor and not getattr(processor[key], "mixes", False)]
        if lost and len(processor) == len(self.attn_processors):  # diffusers counts first
            raise ValueError(f"set_attn_processor: {lost[0]} runs a mixer; detach that layer first")
    else:
        processor = {**dict.fromkeys(self.attn_processors, processor), **ours}
    _base(type(self)).set_attn_processor(self, processor)


def _keeping(method: str) -> Any:
    """diffusers' `method`, which changes processors, with the mixers' kept out of its reach."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        ours = {name: self.get_submodule(name).processor for name in self._visionhybrid.layers}
        for name, held in self._visionhybrid.layers.items():
            self.get_submodule(name).set_processor(held.processor)
        try:
            return getattr(_base(type(self)), method)(self, *args, **kwargs)
        finally:
            for name, processor in ours.items():
                self.get_submodule(name).set_processor(processor)

    return run


# The methods of diffusers' models that put other processors into attention. A mixer needs none of what they do.
_GUARDED = {
    "set_attn_processor": set_attn_processor,
    **{
        name: _keeping(name)
        for name in (
            "set_default_attn_processor",
            "set_attention_slice",
            "set_use_memory_efficient_attention_xformers",
            "set_use_npu_flash_attention",
            "set_use_xla_flash_attention",
        )
    },
}


@functools.cache
def hybrid(base: type[nn.Module]) -> type[nn.Module]:
    """The class of `base` models that carry mixers."""

    def __init__(self: Any, *args: Any, visionhybrid: dict[str, Any] | None = None, **kwargs: Any) -> None:  # noqa: N807
        from visionhybrid.hosts.diffusers import core  # it needs this module

        base.__init__(self, *args, **kwargs)
        core.rebuild(self, visionhybrid or {"version": 1, "layers": {}})

    # diffusers reads the names of a config from the constructor's signature.
    signature = inspect.signature(base.__init__)
    ours = inspect.Parameter("visionhybrid", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    rest = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    cast(Any, __init__).__signature__ = signature.replace(parameters=[*parameters, ours, *rest])
    body = {name: method for name, method in _GUARDED.items() if hasattr(base, name)}
    body |= {"__init__": __init__, "__module__": __name__, "__doc__": base.__doc__, "_plain": base}
    return type(base.__name__, (Hybrid, base), body)


def _base(cls: Any) -> Any:
    return cls._plain


def enter(model: Any, state: State) -> None:
    """Make `model` an instance of the class that saves and loads `state`."""
    model._visionhybrid = state
    model.register_to_config(visionhybrid=state.config())
    if not isinstance(model, Hybrid):
        model.__class__ = hybrid(type(model))


def leave(model: Any) -> None:
    """Make `model` an instance of diffusers' class again."""
    del model._visionhybrid
    model._internal_dict = FrozenDict(
        {key: value for key, value in model.config.items() if key != "visionhybrid"}
    )
    model.__class__ = _base(type(model))


def __getattr__(name: str) -> Any:
    from visionhybrid.hosts.diffusers.family import known_models

    if name not in known_models():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return hybrid(getattr(diffusers, name))
