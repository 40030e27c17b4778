"""Networks by name, with or without weights to start from."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from torch import nn

import visionhybrid.models  # noqa: F401 - registers the vh_ names
from visionhybrid.models import checkpoint
from visionhybrid.train.config import ConfigError, Model


def create(model: Model, notes: list[str], **given: Any) -> nn.Module:
    """`timm.create_model(model.name)` with its options over `given`, started from `model.start` if that is set.

    What was and was not taken from there is appended to `notes`.

    Raises: ConfigError: an unknown name (suggests the nearest) or option, or weights that do not fit exactly with start_strict.
    """
    if not timm.is_model(model.name):
        near = difflib.get_close_matches(model.name, timm.list_models(), 1, 0.0)[0]
        raise ConfigError(f"model.name: timm knows no {model.name!r}; the nearest is {near!r}")
    try:
        net = timm.create_model(model.name, **{**given, **model.options})
    except TypeError as error:
        raise ConfigError(f"model.options: {model.name}: {error}") from None
    if model.start:
        done = checkpoint.warm_start(net, model.start)
        if model.start_strict and (done.new or done.reshaped or done.unused):
            raise ConfigError(
                f"model.start: {model.start} does not fit exactly (model.start_strict=false allows it): {done}"
            )
        notes.append(f"started from {model.start}: {done}")
    return net
