"""Weights of models that no system here describes: opened by the same door as all others, refused by the same rules."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor

from visionhybrid.models.checkpoint import containers, files
from visionhybrid.models.checkpoint.finite import nonfinite, told
from visionhybrid.models.checkpoint.loading import Source


def read_state(source: Source, *, where: str = "") -> dict[str, Tensor]:
    """The state dict in a file, or the one given, bare and under the names it has there.

    Args:
        source: a file or folder, opened safely, or a state dict; either may have a container around it.
        where: how error messages begin; by default the path, or "state dict".
    Raises:
        ValueError: one line with the reason: no such file, not a checkpoint, no weights in it, NaN or infinity among them.
    """
    if isinstance(source, Mapping):
        where, content = where or "state dict", source
    else:
        where, content = where or os.fspath(source), files.read(os.fspath(source)).content
    try:
        state = containers.clean(containers.unwrap(content).state)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if bad := nonfinite(state):
        raise ValueError(f"{where}: {told(bad, len(state))}")
    return state
