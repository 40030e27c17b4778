"""What a hook does to a call: look up an argument, or add to the dictionary that a model hands down to its attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["Call", "added", "argument", "drop"]

Call = tuple[tuple[Any, ...], dict[str, Any]]  # args, kwargs


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    """The argument `name` of a call, None if it was not given."""
    return args[position] if len(args) > position else kwargs.get(name)


def added(
    args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, extra: Mapping[str, Any]
) -> Call:
    """The call with `extra` in a copy of its dictionary `name`; what the caller put there himself stays."""
    whole = {**extra, **(argument(args, kwargs, position, name) or {})}
    if len(args) > position:
        return (*args[:position], whole, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: whole}


def drop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Hook for attention without a mixer: diffusers warns of keywords that a processor does not name."""
    return args, {key: value for key, value in kwargs.items() if key not in ("grid", "text_tokens")}
