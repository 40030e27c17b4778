"""Networks of timm's registry by name: made, started from weights, released."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import timm
from accelerate import PartialState
from timm.layers import convert_sync_batchnorm
from torch import nn

import visionhybrid.models  # noqa: F401 - registers the vh_ names
from visionhybrid.models import checkpoint, registry
from visionhybrid.models.checkpoint import saving
from visionhybrid.train import state
from visionhybrid.train.config import Config, ConfigError, Model


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


def synchronised(net: nn.Module) -> nn.Module:
    """`net` with batch norms over all processes; with one process `net` as it is.

    Raises: ConfigError: torch has none on this device.
    """
    here = PartialState()
    if here.num_processes == 1:
        return net
    if here.device.type in ("cpu", "mps"):
        raise ConfigError(
            f"sync_batch_norm: torch has no batch norm over processes on {here.device.type}; set it to false"
        )
    return convert_sync_batchnorm(net)


class Released:
    """How the tasks on networks of timm's registry release them and open them again. Needs `config` and `notes`."""

    released = "model.safetensors"
    config: Config
    notes: list[str]

    def release(self, model: nn.Module, path: Path, facts: dict[str, Any]) -> None:
        classes, cfg = facts.pop("classes", None), facts.pop("pretrained_cfg", {})
        model.pretrained_cfg = {**(getattr(model, "pretrained_cfg", None) or {}), **cfg}
        text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
        name = self.config.model.name
        if name in registry.SYSTEM_OF:
            checkpoint.save(model, path, classes=classes, metadata=text)
        else:  # any timm model can be trained here; timm reads its weights back
            saving.write(state.whole(model.state_dict()), path, {**text, "architecture": name})
            self.notes.append(f"{path.name}: load with timm.create_model(checkpoint_path=...)")

    def open(self, path: str | Path) -> nn.Module:
        return checkpoint.load(path)
