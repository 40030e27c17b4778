"""Losses of restoration. Each takes (B, C, H, W) images, computes in float32 and returns the mean, a scalar.

Source: XPixelGroup/BasicSR@8d56e3a basicsr/losses for Charbonnier's constant; arXiv:2108.05054 (MIMO-UNet) for the frequency
loss; arXiv:1511.08861 for 1 - SSIM as a loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from visionhybrid.data.metrics import SSIM_WINDOW, ssim_map

CHARBONNIER_EPS = 1e-12


def l1(output: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute difference."""
    return F.l1_loss(output.float(), truth.float())


def mse(output: Tensor, truth: Tensor) -> Tensor:
    """Mean squared difference."""
    return F.mse_loss(output.float(), truth.float())


def charbonnier(output: Tensor, truth: Tensor) -> Tensor:
    """Mean of sqrt(d^2 + 1e-12): L1 with a finite second derivative at 0."""
    return ((output.float() - truth.float()).square() + CHARBONNIER_EPS).sqrt().mean()


def frequency(output: Tensor, truth: Tensor) -> Tensor:
    """L1 between the real and imaginary parts of the orthonormal Fourier transforms of every channel.

    Orthonormal, so that the value does not grow with the crop (MIMO-UNet's is this times sqrt(H W)).
    """
    difference = torch.fft.fft2((output.float() - truth.float()), norm="ortho")
    return torch.view_as_real(difference).abs().mean()


def dissimilarity(output: Tensor, truth: Tensor) -> Tensor:
    """1 - SSIM on all channels of images in [0, 1], with the window and constants of the metric; sides of 11 or more."""
    if min(output.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"ssim loss: needs sides of at least {SSIM_WINDOW}, got {tuple(output.shape[-2:])}")
    return 1 - ssim_map(output.float(), truth.float(), peak=1.0).mean()


PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": l1,
    "mse": mse,
    "charbonnier": charbonnier,
    "frequency": frequency,
    "ssim": dissimilarity,
}


def fooled(fake_logits: Tensor) -> Tensor:
    """What the generator pays: binary cross-entropy of the fakes against "real" (the non-saturating loss)."""
    return F.binary_cross_entropy_with_logits(fake_logits.float(), torch.ones_like(fake_logits.float()))


def mistaken(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What the discriminator pays: cross-entropy of the real against "real" plus that of the fakes against "fake"."""
    fake = fake_logits.float()
    return fooled(real_logits) + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
