"""Attention as a part: `(q, k, v, grid) -> out`, one file each, the same module in diffusers models and timm transformers.

    mixer = create("clear", dim=3072, heads=24, head_dim=128, radius=16)
    out = mixer(q, k, v, grid=(64, 64), text_tokens=512)

`base.Mixer` is the contract, `about(name)` says what a mixer needs of its host, `mixer.cost(grid=...)` what it costs,
`crossover(mixer)` from which size on that is less than softmax.
"""

from visionhybrid.mixers import (  # noqa: F401  (each file registers its mixer)
    agent,
    clear,
    hyena,
    lina,
    linear,
    linfusion,
    neighborhood,
    sla,
    softmax,
    window,
)
from visionhybrid.mixers.base import About, Cost, Halo, Mixer, crossover
from visionhybrid.mixers.registry import about, create, list_mixers

__all__ = ["About", "Cost", "Halo", "Mixer", "about", "create", "crossover", "list_mixers"]
