"""Which input pixels a super-resolution network uses: local attribution maps (LAM) and the Diffusion Index.

Source: arXiv:2011.11036, X-Lowlevel-Vision/LAM_Demo@6e75cc0. Integrated gradients of a gradient detector on a window of the output,
along a path that goes from a blurred input to the input itself. Made for super-resolution; the paper claims nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """What `attribute` found for one image of height H and width W."""

    values: Tensor  # (C, H, W), the signed path integral
    map: Tensor  # (H, W), absolute value of the sum over channels, its maximum 1 (all 0 where nothing contributes)
    gini: float  # 0: every pixel contributes alike; towards 1: few pixels do
    diffusion_index: float  # 100 (1 - gini): larger = more pixels used


def gaussian_kernel(size: int, sigma: float) -> Tensor:
    """Isotropic (size, size) float64 kernel of sum 1; sigma 0 is nearly the identity."""
    r = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    # 1e-5 as in the authors' code: it keeps sigma 0 finite.
    kernel = torch.exp(-(r[:, None] ** 2 + r**2) / (2 * (sigma + 1e-5) ** 2))
    return kernel / kernel.sum()


def blur(image: Tensor, kernel: Tensor) -> Tensor:
    """Correlation of (C, H, W) with a (size, size) kernel, borders mirrored; a side must exceed size // 2."""
    pad = len(kernel) // 2
    if min(image.shape[-2:]) <= pad:
        raise ValueError(
            f"blur: both sides must exceed {pad} for a kernel of {len(kernel)}, got {tuple(image.shape)}"
        )
    weight = kernel.to(image.dtype).to(image.device)[None, None]
    return F.conv2d(F.pad(image[:, None], (pad, pad, pad, pad), mode="reflect"), weight)[:, 0]


def blur_path(image: Tensor, *, fold: int = 50, sigma: float = 1.2, size: int = 9) -> tuple[Tensor, Tensor]:
    """The points of the path from a blurred `image` (C, H, W) to itself, and the path's derivative at each.

    Returns: two (fold, C, H, W); point i has blur sigma (1 - (i + 1) / fold), so the last is the image.
    """
    kernels = [gaussian_kernel(size, sigma * (1 - i / fold)) for i in range(fold + 1)]
    points = [blur(image, kernel) for kernel in kernels[1:]]
    slopes = [fold * blur(image, after - before) for before, after in pairwise(kernels)]
    return torch.stack(points), torch.stack(slopes)


def detect(output: Tensor, row: int, column: int, window: int) -> Tensor:
    """Sum over channels and window of the gradient's length, sqrt(dy^2 + dx^2), per image of (B, C, H, W): (B,)."""
    patch = output[:, :, row : row + window + 1, column : column + window + 1]
    down = patch[:, :, :-1, :-1] - patch[:, :, 1:, :-1]
    right = patch[:, :, :-1, :-1] - patch[:, :, :-1, 1:]
    square = down**2 + right**2
    # The root has no slope at 0: take 0 there, as the authors do with the NaN they get.
    flat = square == 0
    return torch.where(flat, 0.0, torch.where(flat, 1.0, square).sqrt()).sum((1, 2, 3))


def gini(values: Tensor) -> float:
    """Gini coefficient of non-negative values; 1e-7 is added to each, as in the authors' code."""
    v = (values.flatten().double() + 1e-7).sort().values
    n = len(v)
    weight = 2 * torch.arange(1, n + 1, dtype=v.dtype, device=v.device) - n - 1
    return float((weight * v).sum() / (n * v.sum()))


def attribute(
    model: nn.Module,
    image: Tensor,
    *,
    row: int,
    column: int,
    window: int = 16,
    fold: int = 50,
    sigma: float = 1.2,
    size: int = 9,
    batch: int = 1,
) -> Attribution:
    """Local attribution map of `model` on `image` for a window of the output.

    Args:
        model: any restorer: (B, C, H, W) in [0, 1] -> (B, C, H * scale, W * scale).
        image: (C, H, W) in [0, 1], on the model's device and of its dtype.
        row, column: upper left pixel of the window on the output image; one more row and column must lie inside.
        window: side of the window, output pixels.
        fold, sigma, size: steps of the path, its first blur, side of the blur kernel.
        batch: points of the path per forward pass.
    Returns: the attribution on the input grid.
    Raises: ValueError: the image has another rank, or the window lies outside the output.
    """
    if image.dim() != 3:
        raise ValueError(f"attribute: image must be (C, H, W), got {tuple(image.shape)}")
    points, slopes = blur_path(image.detach(), fold=fold, sigma=sigma, size=size)
    total = torch.zeros_like(image, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, fold, batch):
            x = points[start : start + batch].requires_grad_()
            with torch.enable_grad():
                output = model(x)
                _check_window(output, row, column, window)
                (slope,) = torch.autograd.grad(detect(output, row, column, window).sum(), x)
            total += (slope * slopes[start : start + batch]).double().sum(0)
    finally:
        model.train(was_training)
    values = (total / fold).to(image.dtype)
    strength = values.sum(0).abs()
    peak = strength.max()
    strength = strength / peak if peak > 0 else strength
    share = gini(strength)
    return Attribution(values=values, map=strength, gini=share, diffusion_index=100 * (1 - share))


def _check_window(output: Tensor, row: int, column: int, window: int) -> None:
    H, W = output.shape[2:]
    if window < 1 or row < 0 or column < 0 or row + window >= H or column + window >= W:
        raise ValueError(
            f"attribute: a window of {window} at ({row}, {column}) needs one pixel more below and right inside the "
            f"output of {H} x {W}"
        )


def overlay(attribution: Attribution, image: Tensor, *, strength: float = 0.5) -> Tensor:
    """The map in red over the input (3, H, W) in [0, 1], for a picture; white where nothing contributes."""
    heat = torch.stack([torch.ones_like(attribution.map), 1 - attribution.map, 1 - attribution.map])
    return (1 - strength) * image + strength * heat.to(image)
