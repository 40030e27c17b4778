"""What a run does, as data: frozen dataclasses, `key=value` overrides, JSON.

A recipe (`visionhybrid/configs/*.py`) returns one of the `Config` subclasses below; its class decides the task. Batch size
means the global one: all processes, all accumulated micro-batches. A new task is a new subclass and the file it names.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

C = TypeVar("C", bound="Config")


class ConfigError(ValueError):
    """A configuration that cannot be meant; the message is one line and names the field."""


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str  # as registered with timm
    options: dict[str, Any] = field(default_factory=dict)  # keywords of timm.create_model, JSON-able
    start: str = ""  # checkpoint or run directory whose weights to begin with
    start_strict: bool = True  # False: take what fits and say what did not


@dataclass(frozen=True, kw_only=True)
class Optim:
    name: str = "adamw"  # any name timm.optim knows
    lr: float = 1e-3  # at the recipe's batch size; nothing is scaled behind your back
    weight_decay: float = 0.0
    decay_1d: bool = False  # also decay biases and norm weights
    betas: tuple[float, ...] | None = None
    eps: float | None = None
    momentum: float = 0.9
    layer_decay: float | None = None
    clip_norm: float | None = None  # largest gradient norm
    options: dict[str, Any] = field(default_factory=dict)  # further keywords of the optimiser


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over time; all times are in `unit`s."""

    name: Literal["cosine", "tanh", "poly", "step", "multistep", "constant"] = "cosine"
    unit: Literal["update", "epoch"] = "update"  # "epoch": the rate changes between epochs only
    lag: int = 0  # use the value of `lag` units ago
    warmup: float = 0.0
    warmup_lr: float = 1e-6
    warmup_prefix: bool = False  # True: the schedule begins after the warm-up instead of under it
    min_lr: float = 0.0
    milestones: tuple[int, ...] = ()  # multistep: the first unit (counted from 0) at the lower rate
    gamma: float = 0.5  # step, multistep: factor
    every: int = 0  # step: units between two factors
    power: float = 1.0  # poly


@dataclass(frozen=True, kw_only=True)
class Loop:
    batch_size: int = 32  # global
    epochs: float | None = None  # exactly one of epochs and steps
    steps: int | None = None
    micro_batch: int | None = None  # samples of one process in one forward pass; None: all of its share
    precision: Literal["no", "fp16", "bf16"] = "no"
    ema_decay: float | None = None
    ema_warmup: bool = False  # decay min(ema_decay, (1 + step) / (10 + step))
    seed: int = 0
    workers: int = 4  # loading processes per training process
    compile: bool = False
    channels_last: bool = False
    grad_checkpointing: bool = False
    log_every: int = 50  # steps
    validate_every: int = 0  # steps; 0: once an epoch, and always at the end
    checkpoint_every: int = 0  # steps; 0: with each validation
    keep: int = 3  # newest checkpoints kept, and the best one
    tensorboard: bool = True


@dataclass(frozen=True, kw_only=True)
class Guard:
    """When to skip an update, and when to go back."""

    spike: float = 10.0  # a loss above this times its running mean is not used; 0: no limit
    warm: int = 100  # steps before spikes are looked for
    in_a_row: int = 10  # skipped updates before going back to the last checkpoint with another data order
    rollbacks: int = 3  # more than this ends the run
    corrupt: int = 1000  # more unreadable samples than this end the run


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every task has. Subclasses add fields, and name themselves and the task class that reads them."""

    name: str
    model: Model
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    loop: Loop = Loop()
    guard: Guard = Guard()

    task: ClassVar[str] = ""
    entry: ClassVar[str] = ""  # "module:class" implementing visionhybrid.train.task.Task
    kinds: ClassVar[dict[str, type[Config]]] = {}

    def __init_subclass__(cls) -> None:
        Config.kinds[cls.task] = cls


@dataclass(frozen=True, kw_only=True)
class Images:
    """A labelled image set."""

    dataset: str = ""  # what timm.data.create_dataset calls `name`: "" (folder or tar), "hfds/...", "wds/..."; or "digits"
    root: str = ""
    train: str = "train"  # splits
    held_out: str = "validation"
    class_map: str = ""
    num_classes: int = 1000
    image_size: int = 224
    repeat: int = 1  # passes that count as one epoch


@dataclass(frozen=True, kw_only=True)
class Augment:
    """timm's training transforms, mixing and label smoothing, and the evaluation transform."""

    scale: tuple[float, ...] = (0.08, 1.0)
    ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    flip: float = 0.5
    color_jitter: float | None = None
    policy: str | None = None  # RandAugment and the like, in timm's words: "rand-m9-mstd0.5-inc1"
    erase: float = 0.0
    erase_mode: Literal["const", "rand", "pixel"] = "pixel"
    erase_count: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch: float = 0.5
    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    smoothing: float = 0.0
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    eval_size: int | None = None  # shorter side before the centre crop; None: int(image_size / crop)
    crop: float = 0.875


@dataclass(frozen=True, kw_only=True)
class Classification(Config):
    data: Images = Images()
    augment: Augment = Augment()
    eval_batch: int = 64

    task: ClassVar[str] = "classification"
    entry: ClassVar[str] = "visionhybrid.train.classify:Classify"


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Low-quality pictures and their ground truth."""

    # "samples": the built-in photographs; "folder": good pictures, degraded on the fly; "pairs": two folders
    source: Literal["samples", "folder", "pairs"] = "folder"
    high: str = ""  # folder of good pictures
    low: str = ""  # pairs: folder of their low-quality partners
    names: str = ""  # file that lists the pictures of `high` to use, one a line
    degradation: Literal["bicubic", "noise", "jpeg", "second_order"] = "bicubic"
    strength: tuple[
        float, ...
    ] = ()  # noise: sigma or its range, in 8-bit levels; jpeg: the qualities to choose from
    # second_order: "sharp" trains towards unsharp-masked pictures, "both" gives them besides (an adversarial run sets it)
    truth: Literal["plain", "sharp", "both"] = "plain"
    held_out_high: str = ""  # empty: no validation (folder, pairs)
    held_out_low: str = ""  # empty: made from held_out_high
    held_out_crop: int | None = None  # validate on the central crop of so many low-quality pixels a side
    scale: int = 4
    channels: Literal[1, 3] = 3
    patch: int = 64  # side of the low-quality patch
    orient: Literal["all", "flip", "none"] = "all"
    enlarge: bool = False  # pictures smaller than the patch are enlarged instead of skipped
    repeat: int = 1  # patches taken from a picture in one epoch
    cache_mb: int = 0  # decoded pictures kept in memory, in each loading process


@dataclass(frozen=True, kw_only=True)
class Restoration(Config):
    data: Pictures = Pictures()
    loss: Literal["l1", "mse", "charbonnier", "frequency", "ssim"] = "l1"
    tile: int | None = None  # validation in tiles of this many input pixels; None: whole where memory allows
    space: Literal["y", "rgb"] = "y"  # of PSNR and SSIM

    task: ClassVar[str] = "restoration"
    entry: ClassVar[str] = "visionhybrid.train.restore:Restore"


@dataclass(frozen=True, kw_only=True)
class Adversarial(Restoration):
    """Restoration with a perceptual loss and a discriminator; `loss` is that of the pixels. `optim` serves both networks."""

    pixel_weight: float = 1.0
    perceptual_weight: float = 1.0  # 0: without, and without VGG's weights
    adversarial_weight: float = 0.1
    sharp: tuple[
        Literal["pixel", "perceptual", "adversarial"], ...
    ] = ()  # losses that see unsharp-masked truth
    vgg: str = ""  # file of torchvision's VGG19 weights; empty: the one in torch's hub cache
    width: int = 64  # of the discriminator

    task: ClassVar[str] = "adversarial"
    entry: ClassVar[str] = "visionhybrid.train.gan:RestoreAdversarially"


def override(config: C, words: Iterable[str]) -> C:
    """`config` with `["optim.lr=3e-4", ...]` applied, left to right.

    Raises: ConfigError: a word without "=", an unknown field (names the nearest one), or a value of the wrong type.
    """
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"expected field=value, got {word!r}")
        config = _replace(config, key, key.split("."), text, config)
    return config


def _replace(node: Any, key: str, path: list[str], text: str, root: Config) -> Any:
    head, rest = path[0], path[1:]
    if isinstance(node, Mapping):  # free keywords of a model or optimiser
        if rest:
            return {**node, head: _replace(node.get(head, {}), key, rest, text, root)}
        return {**node, head: _guess(text)}
    if not dataclasses.is_dataclass(node) or head not in {f.name for f in dataclasses.fields(node)}:
        raise ConfigError(_unknown(key, root))
    if rest:
        value = _replace(getattr(node, head), key, rest, text, root)
    else:
        value = _parse(text, get_type_hints(type(node))[head], key)
    return dataclasses.replace(node, **{head: value})


def _guess(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _unknown(key: str, root: Config) -> str:
    known = sorted(flat(root))
    near = difflib.get_close_matches(key, known, 1, 0.0)
    leaf = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return f"no field {key!r} in recipe {root.name!r}; the nearest is {(leaf or near)[0]!r}"


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_BOOLS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join("none" if a is type(None) else _describe(a) for a in args)
    if origin is tuple:
        return f"a list of values, each {_describe(args[0])}"
    if origin is dict:
        return "a JSON object"
    return _NAMES.get(hint, f"the fields of {getattr(hint, '__name__', hint)} (set them one by one)")


def _parse(text: str, hint: Any, key: str) -> Any:
    """The value that `text`, as typed on a command line, stands for in a field of type `hint`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if text.lower() in ("none", "null"):
            return None
        inner = next(a for a in args if a is not type(None))
        return _parse_plain(text, inner, key, _describe(hint))
    return _parse_plain(text, hint, key, _describe(hint))


def _parse_plain(text: str, hint: Any, key: str, expected: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple:
        parts = [part.strip() for part in text.strip("[]()").split(",")]
        return tuple(_parse(part, args[0], key) for part in parts if part)
    if origin is dict:
        return _typed(_guess(text), hint, key)
    choices = (
        _BOOLS if hint is bool else {str(choice): choice for choice in args} if origin is Literal else None
    )
    if choices is not None:
        if (value := choices.get(text.lower() if hint is bool else text, ...)) is not ...:
            return value
        near = difflib.get_close_matches(text, choices, 1)
        raise ConfigError(
            f"{key}: expected {expected}, got {text!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    try:
        if hint in (int, float, str):
            return hint(text)
    except ValueError:
        pass
    raise ConfigError(f"{key}: expected {expected}, got {text!r}")


def _typed(value: Any, hint: Any, key: str, expected: str = "") -> Any:
    """`value`, read from JSON or given by a recipe, as the type `hint`."""
    origin, args = get_origin(hint), get_args(hint)
    wrong = ConfigError(f"{key}: expected {expected or _describe(hint)}, got {value!r}")
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _typed(value, next(a for a in args if a is not type(None)), key, _describe(hint))
    if origin is Literal:
        if value not in args:
            raise wrong
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise wrong
        return tuple(_typed(v, args[0], f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong
        return dict(value)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, key)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise wrong
    return value


def _build(cls: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key or 'config'}: expected fields, got {value!r}")
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for name in value:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1, 0.0)[0]
            wrong, right = (f"{key}.{n}".lstrip(".") for n in (name, near))
            raise ConfigError(f"no field {wrong!r}; the nearest is {right!r}")
    required = [
        f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in value]:
        raise ConfigError(f"{key or 'config'}: field {missing[0]!r} is missing")
    return cls(**{name: _typed(v, hints[name], f"{key}.{name}".lstrip(".")) for name, v in value.items()})


def check(config: C) -> C:
    """`config` itself if every field has its type and the fields agree with each other.

    Raises: ConfigError naming the field.
    """
    config = _build(type(config), config, "")
    loop, schedule = config.loop, config.schedule
    if (loop.epochs is None) == (loop.steps is None):
        raise ConfigError(
            f"loop: set one of epochs and steps, got epochs={loop.epochs} and steps={loop.steps}; "
            "write the other as none"
        )
    positive = {
        "loop.batch_size": loop.batch_size,
        "loop.epochs": loop.epochs,
        "loop.steps": loop.steps,
        "loop.micro_batch": loop.micro_batch,
        "loop.log_every": loop.log_every,
        "loop.keep": loop.keep,
        "guard.in_a_row": config.guard.in_a_row,
    }
    for key, value in positive.items():
        if value is not None and value <= 0:
            raise ConfigError(f"{key}: expected more than 0, got {value}")
    if schedule.name == "step" and schedule.every <= 0:
        raise ConfigError(f"schedule.every: a step schedule needs a period above 0, got {schedule.every}")
    if loop.ema_decay is not None and not 0 <= loop.ema_decay < 1:
        raise ConfigError(f"loop.ema_decay: expected a number in [0, 1), got {loop.ema_decay}")
    try:
        json.dumps([config.model.options, config.optim.options])
    except TypeError as error:
        raise ConfigError(f"model.options and optim.options must be JSON-able: {error}") from None
    return config


def flat(config: Config) -> dict[str, Any]:
    """Dotted field -> value, free keywords included."""
    found: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if dataclasses.is_dataclass(node):
            for f in dataclasses.fields(node):
                walk(getattr(node, f.name), f"{prefix}.{f.name}".lstrip("."))
        elif isinstance(node, Mapping) and node:
            for name, value in node.items():
                walk(value, f"{prefix}.{name}")
        else:
            found[prefix] = node

    walk(config, "")
    return found


def diff(config: Config, base: Config) -> list[str]:
    """One line per field of `config` that differs from `base`: `optim.lr: 0.001 -> 0.0003`."""
    new, old = flat(config), flat(base)
    return [
        f"{key}: {old.get(key, '(none)')} -> {new.get(key, '(none)')}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key, ...) != new.get(key, ...)
    ]


def to_json(config: Config) -> str:
    """JSON text that `from_json` turns back into an equal config."""
    return json.dumps({"task": config.task, **dataclasses.asdict(config)}, indent=2) + "\n"


def from_json(text: str) -> Config:
    """The config that `to_json` wrote.

    Raises: ConfigError: not JSON, an unknown task or field, or a value of the wrong type.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"not a saved config: {error}") from None
    task = value.pop("task", None) if isinstance(value, dict) else None
    if task not in Config.kinds:
        raise ConfigError(f"no task {task!r}; have {', '.join(sorted(Config.kinds))}")
    return check(_build(Config.kinds[task], value, ""))
