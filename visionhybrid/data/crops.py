"""What all sets of pairs share: orientations, conversion to float, checks of their arguments."""

from __future__ import annotations

import random
from typing import Literal

import torch
from torch import Tensor

from visionhybrid.data.errors import CorruptSample

Sample = dict[str, Tensor]
Orient = Literal["all", "flip", "none"]
ORIENTS = ("all", "flip", "none")


def check_crop(patch: int, scale: int, orient: str) -> None:
    """Raises ValueError unless a set of pairs can be made with these."""
    if patch < 1 or scale < 1:
        raise ValueError(f"patch and scale must be at least 1, got {patch} and {scale}")
    if orient not in ORIENTS:
        raise ValueError(f"no orient {orient!r}; have {', '.join(ORIENTS)}")


def draw_orientation(rng: random.Random, orient: str) -> int:
    """A code for `oriented`: one of all 8, of the horizontal flip and nothing, or nothing; equally likely."""
    return {"all": rng.getrandbits(3), "flip": rng.getrandbits(1), "none": 0}[orient]


def oriented(x: Tensor, code: int) -> Tensor:
    """One of the 8 orientations of (C, H, W): bit 0 flips columns, bit 1 flips rows, then bit 2 transposes."""
    flips = [axis for bit, axis in ((1, 2), (2, 1)) if code & bit]
    if flips:
        x = x.flip(flips)
    return x.mT if code & 4 else x


def floating(x: Tensor) -> Tensor:
    """Float32 in [0, 1] of an 8-bit or floating-point picture, contiguous."""
    return (x.float() / 255 if x.dtype == torch.uint8 else x).contiguous()


def at_least(picture: Tensor, side: int, source: str) -> Tensor:
    """`picture` itself. Raises CorruptSample: a side is shorter than `side`, so that nothing is left to use."""
    height, width = picture.shape[1:]
    if min(height, width) < side:
        raise CorruptSample(source, f"{width}x{height} has a side shorter than {side}")
    return picture
