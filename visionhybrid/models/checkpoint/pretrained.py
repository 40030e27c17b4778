"""Published weights for `timm.create_model("vh_...", pretrained=True)`, and authors' files through timm's own arguments.

timm reads only its own containers and key layouts. The entry functions of `registry` therefore turn whatever is asked for (an
authors' file, a container, published weights of `registry.WEIGHTS`) into a plain state dict before timm sees it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm.models
from torch import Tensor, nn

from visionhybrid.models import registry
from visionhybrid.models.checkpoint import containers, loading
from visionhybrid.models.registry import System, Weights

FOLDER = "VISIONHYBRID_WEIGHTS"  # environment variable: a folder with weights fetched by hand
_OWN = "name a file: --weights PATH, in Python pretrained_cfg_overlay=dict(file=PATH)"


def overlay(name: str, system: System, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`pretrained_cfg_overlay` with the state dict to load under "state_dict", if its source is ours to resolve.

    Sources in timm's order: a state dict or a file in the overlay or the cfg; hub folders and URLs that a cfg names are left to
    timm; else the published weights of this name and tag.

    Raises:
        ValueError: an unreadable file, weights of another system, or no published weights.
        FileNotFoundError: they could not be downloaded; says what to fetch from where.
    """
    given = dict(kwargs.get("pretrained_cfg_overlay") or {})
    resolved = timm.models.resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), given)
    cfg = cast("dict[str, Any]", resolved.to_dict())
    source: Any = cfg.get("state_dict") or cfg.get("file")
    if not source and any(cfg.get(field) for field in ("hf_hub_id", "url", "source")):
        return given
    if not source:
        source = locate(name, cfg.get("tag"), kwargs.get("cache_dir"))
    given["state_dict"] = matching(source, system, name)
    return given


def matching(source: loading.Source, system: System, name: str) -> dict[str, Tensor]:
    """The bare state dict of `source`, which has to be one that an undeployed `system` can take."""
    found = loading.find(source)
    if found.system is None:
        raise loading.unknown_architecture(found)
    if found.system is not system:
        raise ValueError(
            f"{found.where}: these are weights of {found.system.name}, but {name} is a {system.name}"
        )
    if loading.keywords(found, found.recorded).get("deployed"):
        raise ValueError(f"{found.where}: these weights are deployed; open them with visionhybrid.load")
    loading.require_finite(found, system.convert(found.state))
    return found.state


def locate(name: str, tag: str | None, cache_dir: str | Path | None = None) -> Path:
    """The file of the published weights `name.tag`: in $VISIONHYBRID_WEIGHTS, else from the Hugging Face hub (cached)."""
    full = f"{name}.{tag}" if tag else name
    weights = registry.WEIGHTS.get(full)
    if weights is None:
        others = sorted(other for other in registry.WEIGHTS if other.partition(".")[0] == name)
        have = f"have {', '.join(others)}" if others else "none are listed for this model"
        raise ValueError(f"no published weights for {full} ({have}); {_OWN}")
    stored = _in_folder(full, weights)
    if stored is not None:
        return stored
    reason = "not on a hub"
    if weights.hub:
        # huggingface_hub is a dependency of timm; importing it costs more than everything else here
        from huggingface_hub import hf_hub_download  # pyright: ignore[reportUnknownVariableType]
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(weights.hub, weights.file, cache_dir=cache_dir))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            reason = f"download failed ({type(error).__name__})"
    where = (
        f"https://huggingface.co/{weights.hub}/resolve/main/{weights.file}" if weights.hub else weights.url
    )
    raise FileNotFoundError(
        f"{full}: {reason}; fetch {weights.file} from {where or 'its authors'}, then put it into a folder named by "
        f"${FOLDER} as {_names(full, weights)[0]}, or {_OWN}"
    )


def _names(full: str, weights: Weights) -> list[str]:
    # Every hub file is called model.safetensors: in one folder only our full name tells them apart.
    file = Path(weights.file)
    suffix = file.suffix
    published = [] if file.name in ("model.safetensors", "pytorch_model.bin") else [file.name]
    return [*published, *dict.fromkeys((f"{full}{suffix}", f"{full}.safetensors", f"{full}.pth", full))]


def _in_folder(full: str, weights: Weights) -> Path | None:
    folder = os.environ.get(FOLDER)
    if not folder:
        return None
    return next((path for name in _names(full, weights) if (path := Path(folder) / name).exists()), None)


def accept_any_layout(
    system_name: str, module: nn.Module, state: dict[str, Any], key_prefix: str, *unused: Any
) -> None:
    """Pre-hook of `load_state_dict`: authors' keys and containers become ours, in place.

    timm's `checkpoint_path=` loads without a filter; with this hook a model takes its authors' file there, too.
    """
    if key_prefix or state.keys() == module.state_dict().keys():
        return
    if any(isinstance(value, Mapping) for value in state.values()):
        state_inside = containers.unwrap(state).state
        state.clear()
        state.update(state_inside)
    system = registry.SYSTEMS[system_name]
    if system.recognise(state):
        converted = system.convert(state)
        if converted is not state:
            converted = dict(converted)
            state.clear()
            state.update(converted)
