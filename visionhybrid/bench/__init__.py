"""This machine's figures beside the peers': `python -m visionhybrid.bench models`.

A suite is a module of this package with `cases(*, quick, only) -> list[Case]`; `SUITES` names them.
"""

from __future__ import annotations

# suite -> (module, what it compares)
SUITES: dict[str, tuple[str, str]] = {
    "models": ("visionhybrid.bench.models", "whole models and training steps beside timm and spandrel"),
    "kernels": ("visionhybrid.bench.kernels", "operators beside what one would use without them"),
    "diffusion": (
        "visionhybrid.bench.diffusion",
        "generators with mixers beside diffusers, at use and in training",
    ),
    "mixers": ("visionhybrid.bench.mixers", "mixers beside softmax attention"),
}
