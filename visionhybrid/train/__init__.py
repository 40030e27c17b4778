"""Training on accelerate: config, one loop, run directories, tasks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_LAZY = {
    "run": "visionhybrid.train.session",
    "validate": "visionhybrid.train.session",
    "find": "visionhybrid.train.recipes",
    "override": "visionhybrid.train.config",
}
# resolved by __getattr__ below, which a checker does not follow
__all__ = ["find", "override", "run", "validate"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'visionhybrid.train' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
