"""Systems and the names under which timm knows them.

A system file calls `register` once. Every name starts with `vh_` so that nothing of timm's is shadowed, now or later.
timm files a model under the last part of the module that defines its entry function; all entry functions live here, so
ours never mix with a timm module of the same name (`timm.models.nextvit`).
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm.models
from torch import Tensor, nn

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class System:
    """One published family: how to recognise, read and build it.

    `options(state, **given)` returns the keywords of `build`, read from keys and shapes, `given` by the user where no shape
    shows them; it raises `ValueError` when that does not decide. `convert` renames any known key layout to ours; `adapt`, of
    systems with tables for one image size, also resizes those to what a model needs (`pretrained=True`, but not `load`).
    """

    name: str
    task: str  # "classification" or "restoration"
    build: Callable[..., nn.Module]
    recognise: Callable[[State], bool]
    options: Callable[..., dict[str, Any]]
    convert: Callable[[State], dict[str, Tensor]]
    paper: str
    source: str  # official repository @ commit
    license: str  # of the official code
    purpose: str = ""
    # authors' names of keywords -> ours, for `load(..., name=value)`
    aliases: Mapping[str, str] = field(default_factory=dict)
    adapt: Callable[[State, nn.Module], dict[str, Tensor]] | None = None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where one set of published weights lives, and what it is for. A system file lists them under `name.tag`.

    `hub` is the Hugging Face repository that holds `file`; without it the file has to be fetched by hand from `url`.
    `published` holds the numbers its authors (or timm) report, for instance `{"ImageNet-1K top-1 %": 82.5}`.
    """

    file: str  # name as published, also looked for in $VISIONHYBRID_WEIGHTS
    license: str
    purpose: str  # what these weights do, and what they do not: "x4 of clean bicubic-downscaled photographs"
    hub: str = ""  # "timm/nextvit_small.bd_in1k"
    url: str = ""  # page where a person finds the file
    published: Mapping[str, Any] = field(default_factory=dict)


VISIBLE = ("num_classes", "in_chans", "deployed")  # options that every system reads from keys and shapes

SYSTEMS: dict[str, System] = {}
SYSTEM_OF: dict[str, str] = {}  # registered name -> system name
VARIANTS: dict[str, dict[str, Any]] = {}  # registered name -> keywords of its system's `build`
WEIGHTS: dict[str, Weights] = {}  # "name.tag" (or "name") -> published weights
default_cfgs: dict[str, Any] = {}  # read by timm's register_model


def register(
    system: System,
    variants: Mapping[str, Mapping[str, Any]],
    cfgs: Mapping[str, Mapping[str, Any]],
    *,
    feature_cfg: Mapping[str, Any] | None = None,
    weights: Mapping[str, Weights] | None = None,
) -> None:
    """Make `system` known to `load`, and each of its variants to `timm.create_model`.

    Args:
        variants: registered name -> keywords of `system.build`.
        cfgs: `name` or `name.tag` -> fields of timm's `PretrainedCfg`.
        feature_cfg: how `features_only=True` takes taps; timm's own words.
        weights: `name.tag` -> published weights, for `pretrained=True`. They stay out of `cfgs` (no `url`, no `hf_hub_id`),
            because timm's tests download everything that claims weights there.
    """
    SYSTEMS[system.name] = system
    WEIGHTS.update(weights or {})
    default_cfgs.update(timm.models.generate_default_cfgs({key: dict(cfg) for key, cfg in cfgs.items()}))
    for name, options in variants.items():
        if not name.startswith("vh_"):
            raise ValueError(f"register: names start with 'vh_', got {name!r}")
        if name in SYSTEM_OF:  # timm would replace the first with no more than a warning
            raise ValueError(f"register: {name!r} is taken by {SYSTEM_OF[name]}")
        SYSTEM_OF[name] = system.name
        VARIANTS[name] = dict(options)
        timm.models.register_model(_entry(system, name, dict(options), dict(feature_cfg or {})))


def _entry(
    system: System, name: str, options: dict[str, Any], feature_cfg: dict[str, Any]
) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            from visionhybrid.models.checkpoint.pretrained import overlay  # late: it looks systems up here

            kwargs["pretrained_cfg_overlay"] = overlay(name, system, kwargs)
        model = timm.models.build_model_with_cfg(
            partial(_build, system),
            name,
            pretrained,
            pretrained_filter_fn=system.adapt or (lambda state, model: dict(system.convert(state))),
            feature_cfg=dict(feature_cfg),
            **{**options, **kwargs},
        )
        cfg: Any = model.pretrained_cfg
        cfg.pop("state_dict", None)  # timm would keep a second copy of the weights alive
        return model

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{system.purpose} {system.paper}".strip()
    return entry


def _build(system: System, **options: Any) -> nn.Module:
    model = system.build(**options)
    remember(model, system, options)
    model.register_load_state_dict_pre_hook(partial(_accept_any_layout, system.name))
    return model


def _accept_any_layout(system: str, *args: Any) -> None:
    from visionhybrid.models.checkpoint.pretrained import accept_any_layout  # late: it looks systems up here

    accept_any_layout(system, *args)


def remember(model: nn.Module, system: System, options: Mapping[str, Any]) -> None:
    """Note on `model` what it was built with, for `checkpoint.save`."""
    kept = {name: value for name, value in options.items() if name not in ("device", "dtype", "deployed")}
    model._visionhybrid = {"system": system.name, "options": kept}  # pyright: ignore[reportArgumentType], not a tensor


def made_with(model: nn.Module) -> dict[str, Any]:
    """The options `model` was built with by `timm.create_model` or `load`; empty for a model built otherwise."""
    return dict(getattr(model, "_visionhybrid", {}).get("options", {}))


def hidden(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` without those that keys and shapes of a checkpoint always show."""
    return {name: value for name, value in options.items() if name not in VISIBLE}


def names_of(system: System, options: Mapping[str, Any]) -> list[str]:
    """Registered names whose architecture `options` describe: same keywords but for classes, channels and training rates."""
    free = {*VISIBLE, "global_pool", "device", "dtype"}
    defaults = {name: p.default for name, p in inspect.signature(system.build).parameters.items()}

    def plain(given: Mapping[str, Any]) -> dict[str, Any]:
        full = {**defaults, **given}
        return {
            name: _plain(value)
            for name, value in full.items()
            if name not in free and not name.endswith("_rate")
        }

    wanted = plain(options)
    return [
        name for name, owner in SYSTEM_OF.items() if owner == system.name and plain(VARIANTS[name]) == wanted
    ]


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def require(name: str) -> str:
    """The registered name in `name`, which may have a tag after a dot; ValueError with the nearest one if there is none such."""
    base, _, tag = name.partition(".")
    if base not in SYSTEM_OF:
        near = difflib.get_close_matches(base, [*SYSTEM_OF, *(n.removeprefix("vh_") for n in SYSTEM_OF)], 1)
        hint = f"; did you mean {near[0] if near[0] in SYSTEM_OF else 'vh_' + near[0]!r}?" if near else ""
        raise ValueError(f"no model {base!r}{hint} (`visionhybrid list` has {len(SYSTEM_OF)})")
    if tag and tag not in tags_of(base):
        raise ValueError(f"{base} has no tag {tag!r}; have {', '.join(tags_of(base)) or 'none'}")
    return base


def tags_of(base: str) -> list[str]:
    """Tags of the registered name `base`, as after a dot in `timm.create_model`."""
    entry = default_cfgs.get(base)  # timm groups the cfgs of a name's tags
    tags = list(entry.cfgs) if entry is not None else []
    published = [key.partition(".")[2] for key in WEIGHTS if key.partition(".")[0] == base]
    return [tag for tag in dict.fromkeys([*tags, *published]) if tag]


def default_cfg(name: str) -> dict[str, Any]:
    """timm's default description of a registered model: input size, crop, mean, std, classes."""
    cfg = timm.models.get_pretrained_cfg(name)
    return cfg.to_dict() if cfg is not None else {}


def list_models(filter: str = "vh_*", *, task: str | None = None, system: str | None = None) -> list[str]:
    """Registered names, sorted. `task` is "classification" or "restoration"; `filter` a shell pattern."""
    tasks = sorted({s.task for s in SYSTEMS.values()})
    if task is not None and task not in tasks:
        raise ValueError(f"list_models: task must be one of {', '.join(tasks)}, got {task!r}")
    if system is not None and system not in SYSTEMS:
        raise ValueError(f"list_models: no system {system!r}; have {', '.join(sorted(SYSTEMS))}")
    return sorted(
        name
        for name, owner in SYSTEM_OF.items()
        if fnmatch.fnmatch(name, filter) and task in (None, SYSTEMS[owner].task) and system in (None, owner)
    )
