"""From what a file holds to the one state dict meant by it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

# Names under which weights are saved, best first: averaged weights are what authors evaluate and release.
# BasicSR: params_ema, params. timm: state_dict_ema, model_ema, state_dict. DeiT and Next-ViT: model. mmcv, Lightning: state_dict.
PREFERRED = (
    "params_ema",
    "params-ema",
    "ema_params",
    "params",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "generator",
    "netG",
    "g_ema",
    "module",
    "weights",
)

# Put into the middle of names by torch.compile, FSDP and activation checkpointing wrappers.
_WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")


@dataclass(frozen=True)
class Unwrapped:
    """A state dict, where in the file it was, what else could have been taken, and what is no tensor."""

    state: dict[str, Tensor]
    container: str  # "" for a bare state dict, "params_ema", "checkpoint.model", ...
    alternatives: tuple[str, ...]  # other entries that hold weights
    other: tuple[str, ...]  # entries that hold none: "epoch", "optimizer", ...


def unwrap(content: Any, key: str | None = None) -> Unwrapped:
    """The state dict inside `content`.

    Args:
        content: what a file held: a state dict, or mappings around it to any depth.
        key: the entry to take, "params" or dotted "checkpoint.params"; by default the first of `PREFERRED` that is there,
            else the only one that holds tensors.
    Raises:
        ValueError: no weights, no such key, or several unknown entries hold weights.
    """
    path: list[str] = []
    alternatives: tuple[str, ...] = ()
    other: list[str] = []
    wanted = key
    for _ in range(8):
        if not isinstance(content, Mapping):
            raise ValueError(f"holds {_article(content)} where weights are expected" + _at(path))
        content = cast("Mapping[Any, Any]", content)
        if wanted is not None and wanted in content:
            choice, wanted = wanted, None
        elif wanted is not None and wanted.partition(".")[0] in content:
            choice, _, wanted = wanted.partition(".")
        elif wanted is not None:
            entries = [str(name) for name, value in content.items() if _holds_weights(value)]
            raise ValueError(
                f"no entry {wanted!r}{_at(path)}; weights are in {_list(entries) or 'the file itself'}"
            )
        elif _is_state(content):
            state = {name: t.detach() for name, t in content.items() if isinstance(t, Tensor)}
            odd = [name for name, t in state.items() if t.layout != torch.strided or t.is_quantized]
            if odd:
                raise ValueError(f"{_list(odd)}: sparse or quantised tensors are not read" + _at(path))
            other += [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
            return Unwrapped(state, ".".join(path), alternatives, tuple(other))
        else:
            entries = [str(name) for name, value in content.items() if _holds_weights(value)]
            choice = _choose(entries, path)
            alternatives += tuple(".".join([*path, name]) for name in entries if name != choice)
            other += [str(name) for name in content if str(name) not in entries]
        path.append(choice)
        content = content[choice]
    raise ValueError(f"weights are nested too deeply{_at(path)}")


def _choose(entries: list[str], path: list[str]) -> str:
    if not entries:
        raise ValueError(f"holds no weights{_at(path)}")
    known = next((name for name in PREFERRED if name in entries), None)
    if known is None and len(entries) > 1:
        raise ValueError(f"several entries hold weights{_at(path)}: {_list(entries)}; choose one with key=")
    return known or entries[0]


def _is_state(content: Mapping[Any, Any]) -> bool:
    """Tensors under string names, beside nothing that holds more of them."""
    tensors = sum(isinstance(value, Tensor) for value in content.values())
    if not tensors or not all(isinstance(name, str) for name in content):
        return False
    return not any(isinstance(value, Mapping) and _holds_weights(value) for value in content.values())


def _holds_weights(value: Any, depth: int = 0) -> bool:
    """Whether a state dict is in `value`: tensors under dotted names. An optimiser's numbers and random states are none."""
    if not isinstance(value, Mapping) or depth > 6:
        return False
    entries = cast("Mapping[Any, Any]", value)
    named = [(name, item) for name, item in entries.items() if isinstance(name, str)]
    if any("." in name and isinstance(item, Tensor) for name, item in named):
        return True
    return any(_holds_weights(item, depth + 1) for _, item in named)


def _at(path: list[str]) -> str:
    return f" in {'.'.join(path)!r}" if path else ""


def _list(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:8]) + (", ..." if len(names) > 8 else "")


def _article(value: Any) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def clean(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the names that compile, FSDP and averaging wrappers add.

    `torch.optim.swa_utils.AveragedModel` also counts its updates in `n_averaged`; that one entry is dropped.
    """
    cleaned = {_WRAPPERS.sub("", name): value for name, value in state.items()}
    if "n_averaged" in cleaned and all(
        name == "n_averaged" or name.startswith("module.") for name in cleaned
    ):
        del cleaned["n_averaged"]
    return cleaned


def common_prefix(state: Mapping[str, Tensor]) -> str:
    """The first dotted part of the names if all have it ("module.", "backbone."), else ""."""
    heads = {name.partition(".")[0] if "." in name else "" for name in state}
    return f"{heads.pop()}." if len(heads) == 1 and "" not in heads else ""
