"""Losses of restoration: their definitions, and what they vanish on."""

from __future__ import annotations

import math

import pytest
import torch

from visionhybrid.data.metrics import ssim
from visionhybrid.train.losses import PIXEL_LOSSES, fooled, mistaken


def images(*shape, seed=0):
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed)).unbind()


def test_pixel_losses_are_their_definitions():
    a, b = images(2, 3, 16, 14)
    d = (a - b).double()
    spectrum = torch.fft.fft2(d) / math.sqrt(16 * 14)
    want = {
        "l1": d.abs().mean(),
        "mse": (d * d).mean(),
        "charbonnier": (d * d + 1e-12).sqrt().mean(),
        "frequency": (spectrum.real.abs().mean() + spectrum.imag.abs().mean()) / 2,
    }
    for name, value in want.items():
        assert PIXEL_LOSSES[name](a, b).item() == pytest.approx(value.item(), rel=1e-5), name


def test_ssim_loss_agrees_with_the_metric():
    a, b = ((x * 255).round() / 255 for x in images(2, 3, 20, 24))
    score = ssim(a, b, space="rgb").mean().item()
    assert PIXEL_LOSSES["ssim"](a, b).item() == pytest.approx(1 - score, abs=1e-4)
    with pytest.raises(ValueError, match="at least 11"):
        PIXEL_LOSSES["ssim"](a[..., :10], b[..., :10])


@pytest.mark.parametrize("name", PIXEL_LOSSES)
def test_pixel_losses_vanish_on_the_truth_and_pull_towards_it(name):
    a, b = images(1, 3, 16, 16)
    loss = PIXEL_LOSSES[name]
    assert loss(b, b).item() == pytest.approx(0, abs=2e-6)
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(a, b), a)
    assert gradient.isfinite().all()
    assert loss(a - 0.01 * gradient / gradient.abs().max(), b) < loss(a, b)
    half = loss(a.bfloat16(), b)
    assert half.dtype == torch.float32


def test_adversarial_losses():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])

    def surprise(p):
        return -math.log(p)

    def sure(x):
        return 1 / (1 + math.exp(-x))

    assert fooled(fake).item() == pytest.approx((surprise(sure(0.5)) + surprise(sure(3))) / 2)
    want = (surprise(sure(2)) + surprise(sure(-1))) / 2 + (
        surprise(1 - sure(0.5)) + surprise(1 - sure(3))
    ) / 2
    assert mistaken(real, fake).item() == pytest.approx(want)
