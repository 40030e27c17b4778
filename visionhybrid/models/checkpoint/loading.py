"""From a checkpoint to a ready model: which system, which options, strict loading."""

from __future__ import annotations

import difflib
import inspect as introspection
import json
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from visionhybrid.models import registry
from visionhybrid.models.checkpoint import containers, files
from visionhybrid.models.checkpoint.finite import nonfinite, told
from visionhybrid.models.checkpoint.keys import UnknownKeysError
from visionhybrid.models.registry import System

Source = str | os.PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """A state dict taken out of a file, under the names it had there, with all that is known before a model is built."""

    where: str  # the path, or "state dict": opens every error message
    opened: files.Opened
    unwrapped: containers.Unwrapped
    state: dict[str, Tensor]  # without wrappers and prefix
    prefix: str
    system: System | None
    recorded: dict[str, Any]  # options that `save` wrote into the metadata


def find(
    source: Source, *, key: str | None = None, prefix: str | None = None, system: str | None = None
) -> Found:
    """Open, unwrap, clean and identify `source` without building anything; see `load` for the arguments."""
    if isinstance(source, Mapping):
        where, opened = "state dict", files.Opened(Path(), "memory", source)
    elif isinstance(source, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance], callers err
        if not os.fspath(source):
            raise ValueError("load: the path is empty")
        where, opened = os.fspath(source), files.read(Path(source), key=key)
        if Path(source).expanduser().is_dir() and key in ("ema", "model"):
            key = None  # it named the file
    else:
        raise ValueError(f"load: a path or a state dict is needed, got {type(source).__name__}")
    try:
        unwrapped = containers.unwrap(opened.content, key)
        state = containers.clean(unwrapped.state)
        _check_numbers(state)
        name = system or opened.metadata.get("system")
        if name is not None and name not in registry.SYSTEMS:
            raise ValueError(f"no system {name!r}; have {', '.join(sorted(registry.SYSTEMS))}")
        state, removed, owner = _identify(state, prefix, registry.SYSTEMS[name] if name else None)
        recorded = _recorded(opened)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Found(where, opened, unwrapped, state, removed, owner, recorded)


def _check_numbers(state: Mapping[str, Tensor]) -> None:
    """Layers are counted by the numbers in their names: a stray huge number must not make us build a billion of them."""
    limit = max(1000, len(state))
    for name in state:
        if any(part.isdecimal() and len(part) > 3 and int(part[:12]) > limit for part in name.split(".")):
            raise ValueError(f"key {name!r} counts further than {len(state)} tensors can")


def _identify(
    state: dict[str, Tensor], prefix: str | None, given: System | None
) -> tuple[dict[str, Tensor], str, System | None]:
    """The state without its prefix, the prefix, and the system (None if no system knows it)."""
    if prefix is not None:
        taken = _below(state, prefix)
        if not taken:
            raise ValueError(f"no key begins with {prefix!r}; the first are {_some(state)}")
        return taken, prefix, _claimed(given, taken) if given else _owner(taken)
    # The deepest level that is recognised: a system may know its authors' detectors, too, which are all "backbone.".
    found, removed, rest = (state, "", None), "", state
    while True:
        owner = (given if given.recognise(rest) else None) if given else _owner(rest)
        if owner is not None:
            found = (rest, removed, owner)
        common = containers.common_prefix(rest)
        if not common:
            break
        removed, rest = removed + common, _below(rest, common)
    if given and found[2] is None:
        _claimed(given, rest)
    return found


def _owner(state: Mapping[str, Tensor]) -> System | None:
    owners = [system for system in registry.SYSTEMS.values() if system.recognise(state)]
    if len(owners) > 1:
        names = " and ".join(repr(system.name) for system in owners)
        raise ValueError(f"could be {names}; choose with system=")
    return owners[0] if owners else None


def _claimed(system: System, state: Mapping[str, Tensor]) -> System:
    """`system`, if it recognises `state`."""
    if system.recognise(state):
        return system
    others = [other.name for other in registry.SYSTEMS.values() if other.recognise(state)]
    what = f"weights of {' or '.join(others)}, not" if others else "no weights"
    raise ValueError(f"these are {what} of {system.name}; keys: {_some(state)}")


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def _some(names: Iterable[str], count: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f", ... ({len(names)} in all)" if len(names) > count else "")


def _recorded(opened: files.Opened) -> dict[str, Any]:
    """Options written down beside the weights: by `save`, in a run's config, or in a timm hub folder's."""
    try:
        recorded: Any = json.loads(opened.metadata.get("options", "{}"))
    except ValueError as error:
        raise ValueError(f"metadata 'options' is not JSON: {error}") from error
    if not isinstance(recorded, dict):
        raise ValueError("metadata 'options' is not a JSON object")
    options = cast("dict[str, Any]", recorded)
    hub = opened.folder  # config.json of a timm hub folder
    name, extra = hub.get("architecture"), hub.get("model_args")
    if isinstance(hub.get("model"), dict):  # or of a run of ours
        name, extra = hub["model"].get("name"), hub["model"].get("options")
    if not options and name in registry.VARIANTS:
        options = {**registry.VARIANTS[name], **cast("dict[str, Any]", extra or {})}
    return registry.hidden(options)  # the others may have changed since


def unknown_architecture(found: Found) -> ValueError:
    """The error for weights no system recognises, with what would help."""
    have = ", ".join(sorted(registry.SYSTEMS)) or "none"
    message = f"{found.where}: no system recognises these weights (have {have}); keys: {_some(found.state)}"
    for head in sorted({f"{name.partition('.')[0]}." for name in found.state if "." in name}):
        part = _owner(_below(found.state, head))
        if part is not None:
            message += f"; the part under {head!r} is {part.name}: load it with prefix={head!r}"
    return ValueError(message)


def keywords(found: Found, given: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor keywords of the found system, from shapes and from `given`; may hold `deployed`."""
    system = found.system
    if system is None:
        raise unknown_architecture(found)
    own = introspection.signature(system.build).parameters.keys() - {"device", "dtype"}
    known = own | system.aliases.keys()  # `options` translates those
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(sorted(own))}"
            raise ValueError(f"{found.where}: {system.name} has no option {name!r}{hint}")
    with _one_line(found):
        _check_kinds(system, given)
        return dict(_without_unknown_keys(lambda state: system.options(state, **given), found.state)[0])


def _check_kinds(system: System, given: Mapping[str, Any]) -> None:
    """Each of `given` has to be of the kind of the constructor's default, or a list of such; None as default says nothing."""
    parameters = introspection.signature(system.build).parameters
    for name, value in given.items():
        parameter = parameters.get(system.aliases.get(name, name))
        default = parameter.default if parameter else None
        if default is None or default is introspection.Parameter.empty:
            continue
        listed = isinstance(value, (list, tuple))
        items = cast("list[Any]", value) if listed else [value]
        several = isinstance(default, (list, tuple))
        one = cast("list[Any]", default)[0] if several else default
        if (several and not listed) or not all(_is_like(item, one) for item in items):
            raise ValueError(f"{name} should be like {json.dumps(default)}, got {value!r}")


def _is_like(value: Any, default: Any) -> bool:
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, type(default)) and (isinstance(default, bool) or not isinstance(value, bool))


def _without_unknown_keys(
    read: Callable[[Mapping[str, Tensor]], dict[str, Any]], state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], list[str]]:
    """`read(state)`, if need be without the keys no rule knows: `fit` tells of those together with what is missing."""
    try:
        return read(state), []
    except UnknownKeysError as error:
        unknown = set(error.keys)
        return read({name: value for name, value in state.items() if name not in unknown}), error.keys


@contextmanager
def _one_line(found: Found) -> Generator[None, None, None]:
    """Whatever a system raises over keys, shapes or options that it cannot have leaves as a ValueError with the path."""
    name = found.system.name if found.system else "?"
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{found.where}: looks like {name}, but has no key {error.args[0]!r}") from error
    except ValueError as error:
        raise ValueError(f"{found.where}: {name}: {error}") from error
    except (
        IndexError, TypeError, AttributeError, AssertionError, ZeroDivisionError, OverflowError, RuntimeError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{found.where}: {name}: no model has these shapes and options: {reason}") from error


def build(system: System, options: Mapping[str, Any], device: torch.device | str = "cpu") -> nn.Module:
    """A model of `system`; `deployed=True` among the options folds it, so that it takes deployed weights."""
    options = dict(options)
    deployed = options.pop("deployed", False)
    with torch.device(device):
        model = system.build(**options)
    model.eval()
    if deployed:
        model.deploy()  # pyright: ignore[reportCallIssue], every system that answers `deployed` has it
    return model


def outline(found: Found, options: Mapping[str, Any]) -> nn.Module:
    """The model of `options` on the meta device: names and shapes, no memory."""
    assert found.system is not None
    with _one_line(found), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about tensors without elements; `fit` says what is wrong
        return build(found.system, options, "meta")


def load(
    source: Source,
    *,
    key: str | None = None,
    prefix: str | None = None,
    system: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    allow_nonfinite: bool = False,
    **options: Any,
) -> nn.Module:
    """The ready model of a checkpoint, in eval mode. Architecture and options are read from keys and shapes.

    Args:
        source: a file (.pth, .pt, .ckpt, .bin, .safetensors), a run or checkpoint directory of ours, a timm hub folder, or a
            state dict (also inside its container).
        key: which entry of a container to take ("params"); in a checkpoint directory "model" or "ema".
        prefix: take only the keys that begin with it, without it ("backbone." of a detector). Prefixes that all keys share are
            removed without being asked.
        system: the system's name, should two recognise the weights.
        dtype: of the returned model's floats, "bfloat16" or a torch.dtype; float32 by default, whatever the file holds.
        device: where to put the model; the CPU by default.
        allow_nonfinite: take weights with NaN or infinity, too, as they are.
        options: constructor keywords that no shape shows, such as `conv_scale` of HAT.
    Raises:
        ValueError: one line with path and reason: not a checkpoint, unknown architecture, unknown option, keys or shapes that
            do not fit (missing, unexpected and differing ones are named), weights with NaN or infinity, or too large for `dtype`.
    """
    found = find(source, key=key, prefix=prefix, system=system)
    return _load(found, {**found.recorded, **options}, dtype, device, allow_nonfinite)


def load_as(
    name: str,
    source: Source,
    *,
    key: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    allow_nonfinite: bool = False,
    **options: Any,
) -> nn.Module:
    """The registered model `name` (a tag may follow a dot) with the weights of `source`, in eval mode.

    As `load`, but the architecture is that of the name, and so is the description of the input (size, crop) where the
    checkpoint has none.

    Raises:
        ValueError: as `load`; an unknown name; weights of another architecture.
    """
    base = registry.require(name)
    found = find(source, key=key, system=registry.SYSTEM_OF[base])
    made_with = registry.hidden(registry.VARIANTS[base])
    return _load(found, {**made_with, **options}, dtype, device, allow_nonfinite, name)


def _load(
    found: Found,
    given: Mapping[str, Any],
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    allow_nonfinite: bool,
    name: str = "",
) -> nn.Module:
    wanted = as_dtype(dtype)
    chosen = keywords(found, given)
    assert found.system is not None  # else `keywords` raised
    # The shapes are compared on the meta device first: a file that lies about its size costs no memory.
    state = fit(found, outline(found, chosen))
    # Of its type before the weights come: a float64 file must not go through float32.
    model = build(found.system, chosen).to(dtype=wanted)
    model.load_state_dict(state, strict=True)
    registry.remember(model, found.system, chosen)
    _set_pretrained_cfg(model, found, name or next(iter(registry.names_of(found.system, chosen)), ""))
    model = model.to(device=device).eval()
    if not allow_nonfinite:
        require_finite(found, model.state_dict())
    return model


def require_finite(found: Found, taken: Mapping[str, Tensor]) -> None:
    """ValueError if `taken`, what a model takes of `found`, has NaN or infinity; named as in the file."""
    bad = nonfinite(taken)
    if not bad:
        return
    if inside := nonfinite(found.state):
        reason = f"{told(inside, len(found.state))}; load(..., allow_nonfinite=True) takes them as they are"
    else:
        dtype = str(taken[next(iter(bad))].dtype).removeprefix("torch.")
        reason = f"in {dtype} {told(bad, len(taken))}; it does not reach that far"
    raise ValueError(f"{found.where}: {reason}")


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """`dtype` as torch.dtype; ValueError for what is no floating-point type of torch."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"load: dtype must be a floating-point type such as 'bfloat16', got {dtype!r}")
    return found


def fit(found: Found, model: nn.Module) -> dict[str, Tensor]:
    """The state under our names; ValueError with both sides unless names and shapes are exactly those of `model`."""
    assert found.system is not None
    with _one_line(found):
        state, unexpected = _without_unknown_keys(found.system.convert, found.state)
    target = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    unexpected = unexpected + [name for name in state if name not in target]
    missing = [name for name in target if name not in state]
    differing = [
        f"{name} (file {tuple(value.shape)}, model {target[name]})"
        for name, value in state.items()
        if name in target and tuple(value.shape) != target[name]
    ]
    sides = (("missing", missing), ("unexpected", unexpected), ("of another shape", differing))
    wrong = [f"{len(names)} {side}: {_some(names)}" for side, names in sides if names]
    if wrong:
        raise ValueError(f"{found.where}: does not fit {found.system.name}; {'; '.join(wrong)}")
    return dict(state)


def _set_pretrained_cfg(model: nn.Module, found: Found, name: str) -> None:
    """timm's description of the input (size, crop, mean, std) and of the classes, if the file or the registry has one."""
    cfg = registry.default_cfg(name) if name else {}
    folder = found.opened.folder
    written: Any = (folder.get("pretrained_cfg"), _json(found.opened.metadata.get("pretrained_cfg")))
    for part in written:
        cfg.update(part or {})
    classes = (
        _json(found.opened.metadata.get("classes")) or folder.get("label_names") or cfg.get("label_names")
    )
    if classes is not None:
        cfg["label_names"] = list(classes)
    if hasattr(model, "num_classes"):
        cfg["num_classes"] = model.num_classes
    if cfg:
        model.pretrained_cfg = model.default_cfg = cfg  # pyright: ignore[reportArgumentType], not a tensor


def _json(text: str | None) -> Any:
    return json.loads(text) if text else None
