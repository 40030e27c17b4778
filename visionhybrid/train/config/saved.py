"""Whole configs: checked, compared, written as JSON and read again."""

# What a file holds is unknown until it is checked.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import json

from visionhybrid.train.config.bounds import check_bounds
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
    check_bounds(config)
    if schedule.name == "step" and schedule.every <= 0:
        raise ConfigError(f"schedule.every: a step schedule needs a period above 0, got {schedule.every}")
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
