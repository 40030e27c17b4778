"""Checkpoints: `load` and `inspect` any published one, `save` ours, `warm_start` from another, `rename` keys by table.

keys.py renames, files.py opens safely, containers.py unwraps, finite.py looks for NaN, loading.py finds the system and loads,
inspecting.py tells what there is, saving.py writes. foreign.py reads weights of what is no system of ours (mixers, DiT); pretrained.py
finds published weights for `timm.create_model(..., pretrained=True)`.
"""

from visionhybrid.models.checkpoint.inspecting import Inspection, inspect
from visionhybrid.models.checkpoint.keys import UnknownKeysError, rename
from visionhybrid.models.checkpoint.loading import load, load_as
from visionhybrid.models.checkpoint.saving import WarmStart, save, warm_start

__all__ = [
    "Inspection",
    "UnknownKeysError",
    "WarmStart",
    "inspect",
    "load",
    "load_as",
    "rename",
    "save",
    "warm_start",
]
