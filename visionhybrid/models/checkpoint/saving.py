"""Writing a model that `load` can read, and starting a model from weights of another."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from visionhybrid._version import __version__
from visionhybrid.models import registry
from visionhybrid.models.checkpoint import loading
from visionhybrid.models.checkpoint.finite import nonfinite, told
from visionhybrid.models.registry import System

# What of timm's description of the input travels with the weights.
_CFG_FIELDS = (
    "input_size",
    "mean",
    "std",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "fixed_input_size",
    "license",
)


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    classes: list[str] | None = None,
    options: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    allow_nonfinite: bool = False,
) -> Path:
    """Write `model` as safetensors that `load` reads back to the same model, deployed or not.

    The metadata holds `system`, `options` (JSON), `version`, `classes` (JSON) and `pretrained_cfg` (JSON). The file appears
    whole or not at all: it is written under a temporary name, flushed to the disk and renamed.

    Args:
        model: of a registered system; wrappers of DDP and `torch.compile` are looked through.
        classes: names of the classes, in the order of the logits.
        options: constructor keywords that no shape shows; needed only for a model that came from neither `timm.create_model`
            nor `load` and has an unusual one.
        metadata: further text entries.
        allow_nonfinite: write weights with NaN or infinity, too, as they are.
    Returns: the path.
    Raises:
        ValueError: no system recognises the model, `classes` does not have one name per class, or weights are NaN or infinite.
    """
    model = unwrap_model(model)
    system, chosen = describe(model, options)
    entries = {
        **(metadata or {}),
        "format": "pt",
        "system": system.name,
        "options": json.dumps(chosen),
        "version": __version__,
    }
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    classes = classes if classes is not None else cfg.get("label_names")
    if classes is not None:
        if len(classes) != getattr(model, "num_classes", len(classes)):
            raise ValueError(f"save: {len(classes)} class names for {model.num_classes} classes")
        entries["classes"] = json.dumps(list(classes))
    entries["pretrained_cfg"] = json.dumps(
        {name: cfg[name] for name in _CFG_FIELDS if cfg.get(name) is not None}
    )
    state = model.state_dict()
    if not allow_nonfinite and (bad := nonfinite(state)):
        raise ValueError(
            f"save: {told(bad, len(state))}; save(..., allow_nonfinite=True) writes them as they are"
        )
    # Tied tensors are written under each of their names: safetensors refuses shared memory.
    write({name: t.detach().cpu().contiguous().clone() for name, t in state.items()}, path, entries)
    return Path(path)


def write(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Tensors to a safetensors file: temporary name in the same folder, flush to the disk, rename.

    Raises: OSError: no permission, a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(dict(tensors), temporary, dict(metadata))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:  # as which the disk's errors come back
        raise OSError(f"{path}: cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def unwrap_model(model: nn.Module) -> nn.Module:
    """The module inside DDP and `torch.compile` wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def describe(model: nn.Module, options: Mapping[str, Any] | None = None) -> tuple[System, dict[str, Any]]:
    """The system of `model` and the options that build it as it is now.

    Keys and shapes give most options; what a model was made with by `timm.create_model` or `load` gives the others.

    Raises:
        ValueError: no system recognises the model, or no options build it as it is (layers were removed or replaced).
    """
    found = loading.find(model.state_dict())
    made_with = registry.hidden(registry.made_with(model))
    chosen = loading.keywords(found, {**made_with, **(options or {})})
    assert found.system is not None  # else `keywords` raised
    loading.fit(found, loading.outline(found, chosen))
    return found.system, chosen


@dataclass(frozen=True)
class WarmStart:
    """What `warm_start` did, by our names of the tensors."""

    loaded: tuple[str, ...]
    new: tuple[str, ...]  # of the model, not in the file: as initialised
    reshaped: tuple[str, ...]  # in both, of another shape: as initialised
    unused: tuple[str, ...]  # of the file, not in the model

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for label, names in (("new", self.new), ("of another shape", self.reshaped), ("unused", self.unused)):
            if names:
                parts.append(
                    f"{len(names)} {label}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
                )
        return "; ".join(parts)


def warm_start(model: nn.Module, source: loading.Source, *, key: str | None = None) -> WarmStart:
    """Copy into `model` every tensor of a checkpoint that has its name and shape; the others stay as they are.

    For x2 weights under an x4 model, and for fine-tuning with other classes. Nothing is adapted or cut.

    Args:
        model: changed in place; of the same system as the checkpoint.
        source, key: as in `load`.
    Returns: which tensors were loaded, new, of another shape, unused.
    Raises:
        ValueError: nothing fits, what does has NaN or infinity, or the checkpoint is deployed (folded weights cannot be
            trained further).
    """
    found = loading.find(source, key=key)
    if found.system is None:
        raise loading.unknown_architecture(found)
    if loading.keywords(found, found.recorded).get("deployed"):
        raise ValueError(
            f"{found.where}: deployed weights have no norms left to train; start from the original checkpoint"
        )
    state = found.system.convert(found.state)
    target = unwrap_model(model).state_dict()
    loaded = [name for name in state if name in target and state[name].shape == target[name].shape]
    if not loaded:
        raise ValueError(f"{found.where}: no tensor of this {found.system.name} fits the model")
    loading.require_finite(found, {name: state[name] for name in loaded})
    with torch.no_grad():
        for name in loaded:
            target[name].copy_(state[name])
    return WarmStart(
        loaded=tuple(loaded),
        new=tuple(name for name in target if name not in state),
        reshaped=tuple(name for name in state if name in target and state[name].shape != target[name].shape),
        unused=tuple(name for name in state if name not in target),
    )
