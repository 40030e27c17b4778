"""Weights as their authors published them, for the layers of a diffusers model: LinFusion here, CLEAR and SLA in `authors.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visionhybrid.hosts.diffusers import authors
from visionhybrid.hosts.layers import Layer
from visionhybrid.hosts.plan import Mixers, Part
from visionhybrid.models.checkpoint.foreign import read_state

__all__ = ["Published", "read"]

PROJECTIONS = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
# Where LinFusion's repositories keep what.
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Published:
    """Layers with their mixers, and for each layer its tensors: `mixer.*`, and projections that replace the model's.

    Where a whole model was fine-tuned, `rest` holds all that is no mixer's, under the model's names.
    """

    name: str
    parts: Sequence[Part]
    tensors: Mapping[str, Mapping[str, Tensor]]
    rest: Mapping[str, Tensor] = field(default_factory=dict)


def read(
    source: str | PathLike[str] | Mapping[str, Any],
    mixer: Mixers,
    layers: Sequence[Layer],
    options: Mapping[str, Any],
    model: nn.Module,
) -> Published:
    """The published weights of `mixer` at `source`, for `model`, which has `layers`.

    Args:
        source: for "linfusion" a folder, or the name of a Hugging Face repository, with config.json and safetensors file; for
            "clear" and "sla" a file or an open {key: tensor}, for "clear" also a repository that has the authors' file names.
    Raises:
        ValueError: no weights of this mixer are known, they are another model's, or some are NaN or infinite.
        FileNotFoundError: the repository could not be fetched; says which files to put where.
    """
    name = "the weights given" if isinstance(source, Mapping) else str(source)
    if mixer == "clear":
        if (
            isinstance(source, str)
            and re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.safetensors)", source)
            and not Path(source).exists()
        ):
            name = f"clear_local_{options.get('radius', 16)}"
            name += f"_down_{options['down']}.safetensors" if options.get("down", 1) > 1 else ".safetensors"
            source = _fetch(source, name) / name
        return Published(name, *authors.clear(name, _state(source, name), layers, options))
    if mixer == "sla":
        return Published(name, *authors.turbodiffusion(name, _state(source, name), layers, options, model))
    if mixer != "linfusion":
        raise ValueError(
            f"attach: no published layout of weights is known for {mixer!r}; have linfusion, clear, sla"
        )
    if options:
        raise ValueError(f"attach: the weights say what the options are, got {', '.join(options)}")
    if isinstance(source, Mapping):
        raise ValueError("attach: LinFusion's weights need their config.json; give the folder that has both")
    folder = _folder(str(source))
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no readable {CONFIG} of LinFusion: {error}") from error
    return linfusion(name, config, read_state(folder / WEIGHTS), layers)


def _state(source: str | PathLike[str] | Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The tensors of a file, or those given, which go by `name` in messages."""
    if not isinstance(source, Mapping) and not Path(source).expanduser().is_file():
        raise ValueError(f"attach: weights={str(source)!r} is no file")
    return read_state(source, where=name)


def linfusion(
    name: str, config: Mapping[str, Any], state: Mapping[str, Tensor], layers: Sequence[Layer]
) -> Published:
    """LinFusion's layout: `modules_list` names the layers, tensors are called by their number in it.

    Its second revision ("LinFusion") has dictionaries, the first ("StableMamba") `[name, dim, heads]`.
    """
    by_name = {layer.name: layer for layer in layers}
    modules = [_module(entry) for entry in config.get("modules_list") or ()]
    if not modules:
        raise ValueError(f"{name}: {CONFIG} has no modules_list, so these are not weights of LinFusion")
    problems, parts, tensors, left = [], [], {}, set(state)
    for number, (path, dim, heads, mid) in enumerate(modules):
        layer = by_name.get(path)
        if layer is None or (layer.dim, layer.heads) != (dim, heads):
            has = "no such attention" if layer is None else f"{layer.dim} in {layer.heads} heads"
            problems.append(f"{path} is {dim} in {heads} heads there, {has} here")
            continue
        if layer.reason:
            problems.append(f"{path}: {layer.reason}")
            continue
        own = {key.removeprefix(f"{number}."): key for key in state if key.startswith(f"{number}.")}
        left -= set(own.values())
        tensors[path] = {k if k in PROJECTIONS else f"mixer.{k}": state[key] for k, key in own.items()}
        problems += [f"{path} lacks {key}" for key in PROJECTIONS if key not in own]
        parts.append(Part(layer, "linfusion", {"mid_dim": mid}))
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{name} does not fit this model: {'; '.join(problems[:3])}{more}")
    if left:
        raise ValueError(f"{name}: {len(left)} tensors belong to no module, {min(left)} first")
    return Published(name, parts, tensors)


def _module(entry: Any) -> tuple[str, int, int, int | None]:
    if isinstance(entry, Mapping):
        return entry["module_name"], entry["dim_n"], entry["heads"], entry.get("projection_mid_dim")
    path, dim, heads = entry
    return path, dim, heads, None


def _folder(source: str) -> Path:
    """A folder on this machine, or a repository of the hub, fetched or from the cache."""
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    if source.count("/") != 1:
        raise ValueError(f"attach: weights={source!r} is neither a folder nor a repository of the hub")
    return _fetch(source, CONFIG, WEIGHTS)


def _fetch(repository: str, *files: str) -> Path:
    """The folder where these files of a repository of the hub are, fetched or from the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        paths = [hf_hub_download(repository, file) for file in files]
        return Path(paths[0]).parent
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{repository}: download failed ({type(error).__name__}); fetch {' and '.join(files)} from "
            f"https://huggingface.co/{repository} into a folder, and give that{' folder' if len(files) > 1 else ' file'}"
        ) from error
