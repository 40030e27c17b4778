"""The `mixers` suite: each mixer beside softmax attention, on image tokens alone and with text beside them.

The peer computes something else, so the agreement that the harness asks for is with the mixer itself in float64, and only the time
is softmax's. Networks that act before the projections (LinFusion's) are not in it: `bench diffusion` has whole models.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from visionhybrid import mixers
from visionhybrid.bench.harness import Case, Runner, Target

# Heads and numbers of each: of the suite, and of Wan 2.1 1.3B, which SLA was published with.
SIZE, WAN = (4, 64), (12, 128)
# Names and options as in docs/mixers.md.
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "linfusion": ("linfusion", dict(mid_dim=-1)),
    "linear": ("linear", {}),
    "linear_conv5": ("linear", dict(conv=5)),
    "lina": ("lina", {}),
    "hyena_se": ("hyena", {}),
    "sla": ("sla", {}),
    "clear_r8": ("clear", dict(radius=8)),
    "clear_r16": ("clear", dict(radius=16)),
    "clear_r8_down4": ("clear", dict(radius=8, down=4)),
    "agent": ("agent", {}),
    "neighborhood_13": ("neighborhood", dict(kernel_size=13)),
    "neighborhood_16_blocks": ("neighborhood", dict(kernel_size=16, stride=16)),
    "window_8": ("window", dict(window_size=8)),
    "window_8_shifted": ("window", dict(window_size=8, shift=4)),
    "window_16_overlapping": ("window", dict(window_size=16, overlap=0.5)),
}


def cases(*, quick: bool = False, only: str | None = None) -> list[Case]:
    """The suite; `quick` takes a small grid and two rounds. `only` is the name of a mixer."""
    if only is not None and only not in mixers.list_mixers():
        raise ValueError(
            f"bench mixers: --only must be one of {', '.join(mixers.list_mixers())}, got {only!r}"
        )
    places = [((16, 16), 8)] if quick else [((64, 64), 0), ((64, 64), 512)]
    common = dict(rounds=2 if quick else 3, judged=not quick)
    suite = [
        Case(
            name=f"{choice}_{'x'.join(map(str, grid))}" + (f"_text{text}" if text else ""),
            title=f"{name}{_words(options)} on {grid[0]}x{grid[1]} tokens"
            + (f" and {text} of text" if text else ""),
            build=partial(_runners, name, options, grid, text, SIZE),
            **common,
        )
        for grid, text in places
        for choice, (name, options) in CHOICES.items()
        if only in (None, name)
    ]
    if only not in (None, "sla"):
        return suite
    grid, size = ((2, 8, 8), (2, 16)) if quick else ((8, 32, 32), WAN)
    return [
        *suite,
        Case(
            name="sla_wan",
            title=f"sla in the shape of Wan's attention, {size[0]} heads of {size[1]}, on {'x'.join(map(str, grid))} tokens, "
            "90 % sparse",
            build=partial(_runners, "sla", dict(topk=0.1), grid, 0, size),
            targets=(Target(runner="sla", what="time", limit=1 / 4),),
            **common,
        ),
    ]


def _words(options: dict[str, Any]) -> str:
    return f"({', '.join(f'{key}={value}' for key, value in options.items())})" if options else ""


def _runners(
    name: str,
    options: dict[str, Any],
    grid: tuple[int, ...],
    text: int,
    size: tuple[int, int],
    device: torch.device,
) -> list[Runner]:
    heads, head_dim = size
    shape = dict(dim=heads * head_dim, heads=heads, head_dim=head_dim)
    generator = torch.Generator().manual_seed(0)
    tokens = prod(grid) + text
    # Heads are strides, as projections leave them.
    drawn = (torch.randn(1, tokens, heads, head_dim, generator=generator) for _ in range(3))
    q, k, v = (x.to(device).transpose(1, 2) for x in drawn)
    mixer, softmax = mixers.create(name, **shape, **options).to(device), mixers.create("softmax", **shape)

    @torch.inference_mode()
    def mixed(mixer: mixers.Mixer) -> Tensor:
        return mixer(q, k, v, grid=grid, text_tokens=text)

    with torch.inference_mode():
        exact = deepcopy(mixer).double()(q.double(), k.double(), v.double(), grid=grid, text_tokens=text)
    return [
        Runner(name="softmax", run=partial(mixed, softmax), output=exact.float, holds=(q, k, v)),
        Runner(name=name, run=partial(mixed, mixer), holds=(mixer, q, k, v)),
    ]
