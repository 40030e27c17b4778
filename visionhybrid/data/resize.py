"""MATLAB's `imresize` (bicubic, antialiased), which makes the low-resolution images of every super-resolution benchmark.

Output k (from 1) is centred at u = k/s + (1 - 1/s)/2 for scale s. Enlarging uses the cubic kernel with a = -0.5 and
support 4; shrinking stretches it by 1/s, so its support is 4/s. Weights are normalised to sum 1; outside the image the
picture is mirrored with the edge pixel repeated. Nothing is rounded or clipped for floating-point images.

Pillow, OpenCV and `torch.nn.functional.interpolate` differ (a = -0.75, no antialiasing, clipped borders), by up to a
decibel in published scores. Source: the documented behaviour of MATLAB's imresize; XPixelGroup/BasicSR@8d56e3a
`basicsr/utils/matlab_functions.py` gives the same numbers (golden case hat_degrade_ops_64x80).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# Outputs computed by one matrix product: wide enough for BLAS, narrow enough that the band of weights is mostly non-zero.
BLOCK = 64


class _Band(NamedTuple):
    """Outputs [start, stop) of one axis are weight @ inputs [first, first + weight.shape[1])."""

    start: int
    stop: int
    first: int
    weight: Tensor


def imresize(image: Tensor, scale: float | None = None, *, size: tuple[int, int] | None = None) -> Tensor:
    """Resize as MATLAB's `imresize(image, scale)` or `imresize(image, [rows cols])` does.

    Args:
        image: (..., H, W), any real dtype and device; leading axes are resized independently.
        scale: one factor for both axes; the result is (ceil(H * scale), ceil(W * scale)).
        size: the result's (rows, columns) instead; each axis then has its own factor.
    Returns: (..., rows, columns) in the dtype of `image`. Floating point is differentiable and may overshoot the input's
        range. Half types compute in float32. Integers compute in float64 and are rounded (halves up) and saturated after
        each axis, as MATLAB does.
    Raises: ValueError: not exactly one of scale and size, a size below 1, or an empty image.
    """
    if image.ndim < 2 or not all(image.shape[-2:]):
        raise ValueError(f"imresize: expected (..., H, W) with H, W >= 1, got {tuple(image.shape)}")
    if image.dtype == torch.bool or image.is_complex():
        raise ValueError(f"imresize: expected real numbers, got {image.dtype}")
    plan = []
    for axis, (n, out, factor) in enumerate(_targets(tuple(image.shape[-2:]), scale, size), start=-2):
        if (n, factor) != (out, 1):
            plan.append((factor, axis, _bands(n, out, factor)))
    # The stronger reduction first, rows first among equals: MATLAB's order, which integers can see, and the cheaper one.
    for _, axis, bands in sorted(plan, key=lambda step: step[0]):
        image = _resize_axis(image, axis, bands)
    return image


def modcrop(image: Tensor, multiple: int) -> Tensor:
    """The top-left part of (..., H, W) whose sides are the largest multiples of `multiple` (a view).

    Raises: ValueError: a side is shorter than `multiple`.
    """
    height, width = image.shape[-2:]
    if multiple < 1 or min(height, width) < multiple:
        raise ValueError(f"modcrop: {height}x{width} holds no multiple of {multiple}")
    return image[..., : height - height % multiple, : width - width % multiple]


def _targets(
    sides: tuple[int, ...], scale: float | None, size: tuple[int, int] | None
) -> list[tuple[int, int, float]]:
    """(input side, output side, factor) of each axis."""
    if scale is not None and size is None:
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"imresize: scale must be a positive number, got {scale}")
        return [(n, math.ceil(n * scale), scale) for n in sides]
    if size is None or scale is not None:
        raise ValueError("imresize: give either scale or size")
    if len(size) != 2 or any(out < 1 or out != int(out) for out in size):
        raise ValueError(f"imresize: size must be two whole numbers of at least 1, got {size}")
    return [(n, int(out), out / n) for n, out in zip(sides, size, strict=True)]


def _cubic(t: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5."""
    t = t.abs()
    near = 1.5 * t**3 - 2.5 * t**2 + 1
    far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return torch.where(t <= 1, near, torch.where(t <= 2, far, 0.0))


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # kept for calls that autograd records
def _bands(n: int, out: int, scale: float) -> tuple[_Band, ...]:
    """The weights that map n inputs to `out` outputs, float64, in blocks of outputs."""
    stretch = min(scale, 1.0)
    taps = math.ceil(4 / stretch) + 2
    centre = (torch.arange(1, out + 1, dtype=torch.float64)) / scale + 0.5 * (1 - 1 / scale)  # from 1
    left = torch.floor(centre - 2 / stretch)
    index = left[:, None] + torch.arange(taps)  # (out, taps), from 1, may lie outside
    weight = _cubic((centre[:, None] - index) * stretch)
    weight = weight / weight.sum(1, keepdim=True)
    folded = (index.long() - 1).remainder(2 * n)
    folded = torch.minimum(folded, 2 * n - 1 - folded)
    # Taps of weight 0 must not widen the band.
    used = weight != 0
    bands = []
    for start in range(0, out, BLOCK):
        rows = slice(start, min(start + BLOCK, out))
        columns = folded[rows][used[rows]]
        first, last = int(columns.min()), int(columns.max())
        dense = torch.zeros(rows.stop - start, last - first + 1, dtype=torch.float64)
        place = (folded[rows] - first).clamp(0, last - first)
        dense.scatter_add_(1, place, weight[rows])
        bands.append(_Band(start, rows.stop, first, dense))
    return tuple(bands)


def _resize_axis(image: Tensor, axis: int, bands: tuple[_Band, ...]) -> Tensor:
    exact = image.dtype == torch.float64 or not image.is_floating_point()
    x = image.to(torch.float64 if exact else torch.float32)
    parts = []
    for band in bands:
        weight = band.weight.to(x)
        window = x.narrow(axis, band.first, weight.shape[1])
        parts.append(weight @ window if axis == -2 else window @ weight.mT)
    y = parts[0] if len(parts) == 1 else torch.cat(parts, axis)
    if image.is_floating_point():
        return y.to(image.dtype)
    limits = torch.iinfo(image.dtype)
    return (y + 0.5).floor().clamp(limits.min, limits.max).to(image.dtype)
