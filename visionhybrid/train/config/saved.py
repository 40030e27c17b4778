"""Whole configs: checked, compared, written as JSON and read again."""

# What a file holds is unknown until it is checked.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import json

from visionhybrid.train.config.common import Config, ConfigError
from visionhybrid.train.config.words import C, build, flat


def check(config: C) -> C:
    """`config` itself if every field has its type and the fields agree with each other.

    Raises: ConfigError naming the field.
    """
    config = build(type(config), config, "")
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
    return check(build(Config.kinds[task], value, ""))
