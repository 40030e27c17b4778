"""Hybrid attention for vision: backbones in timm, mixers in diffusers, one command that trains.

Importing this package registers every backbone with timm (`timm.create_model("vh_...")`); training and diffusers are
imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from visionhybrid import models as models
from visionhybrid._version import __version__

_LAZY = {
    "load": "visionhybrid.models.checkpoint",
    "inspect": "visionhybrid.models.checkpoint",
    "list_models": "visionhybrid.models.registry",
    "restore": "visionhybrid.infer.restoration",
    "classify": "visionhybrid.infer.classification",
    "attach": "visionhybrid.hosts",
    "detach": "visionhybrid.hosts",
    "describe": "visionhybrid.hosts",
}
# resolved by __getattr__ below, which a checker does not follow
__all__ = ["__version__", "models", *_LAZY]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'visionhybrid' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
