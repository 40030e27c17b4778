"""Gaussian and Poisson noise as Real-ESRGAN adds it.

Both add to the un-rounded image and clamp to [0, 1]. Per-image values are tensors or lists of length B; a number stands
for all images. The same generator state gives the same noise on the same kind of device.

Source: XPixelGroup/BasicSR@8d56e3a `basicsr/data/degradations.py` (the `_pt` functions).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PerImage = float | Sequence[float] | Tensor
# The luma of torchvision's rgb_to_grayscale, which the published code uses; its weights sum to 0.9999.
LUMA = (0.2989, 0.587, 0.114)


def add_gaussian_noise(
    x: Tensor, sigma: PerImage, *, gray: PerImage = False, generator: torch.Generator | None = None
) -> Tensor:
    """Add N(0, sigma) to (B, C, H, W) in [0, 1], independently per pixel and channel, and clamp.

    Args:
        sigma: standard deviation in 8-bit levels (the 15, 25, 50 of denoising tables).
        gray: images whose channels share one noise field. As published, the gray images of one batch also share the
            field itself, scaled by their sigmas.
    """
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    chosen = _column(gray, x).bool()
    if chosen.any():
        field = torch.randn(x.shape[-2:], generator=generator, dtype=x.dtype, device=x.device)
        noise = torch.where(chosen, field, noise)
    return (x + noise * _column(sigma, x) / 255).clamp(0, 1)


def add_poisson_noise(
    x: Tensor, scale: PerImage, *, gray: PerImage = False, generator: torch.Generator | None = None
) -> Tensor:
    """Add `scale` times the shot noise of (B, C, H, W) in [0, 1], and clamp.

    Shot noise is Poisson(V x) / V - x on the image rounded to 8 bits, with V = 2^ceil(log2(its number of levels)).
    Images in `gray` get the shot noise of their luma in every channel.
    """
    noise = _shot_noise(x, generator)
    chosen = _column(gray, x).bool()
    if chosen.any():
        if x.shape[1] == 3:
            luma = torch.einsum("bchw,c->bhw", x, torch.tensor(LUMA).to(x)).unsqueeze(1)
        else:
            luma = x.mean(1, keepdim=True)
        noise = torch.where(chosen, _shot_noise(luma, generator), noise)
    return (x + noise * _column(scale, x)).clamp(0, 1)


def _shot_noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    levels = (x * 255).round().clamp(0, 255)
    counts = [torch.bincount(image.flatten().long(), minlength=256).count_nonzero() for image in levels]
    # 2^ceil(log2 n) of an integer n, exactly.
    peak = _column([2.0 ** (int(n) - 1).bit_length() for n in counts], x)
    exact = levels / 255
    return torch.poisson(exact * peak, generator=generator) / peak - exact


def _column(value: PerImage, x: Tensor) -> Tensor:
    """A per-image value as (B, 1, 1, 1), or (1, 1, 1, 1) for one that all share."""
    column = torch.as_tensor(value, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)
    if len(column) not in (1, len(x)):
        raise ValueError(f"noise: expected one value or {len(x)}, got {len(column)}")
    return column
