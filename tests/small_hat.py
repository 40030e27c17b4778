"""HATs small enough for a test: ours, and spandrel's for comparison."""

from __future__ import annotations

import warnings

import pytest
import torch

from visionhybrid.models.hat import HAT

TINY = dict(
    dim=16,
    depths=(2, 1),
    num_heads=(2, 2),
    window_size=4,
    key_window_size=6,
    conv_dim=4,
    gate_dim=4,
    mlp_dim=32,
    tail_dim=8,
)


def tiny(**options):
    """A small HAT with weights large enough that every part matters."""
    torch.manual_seed(0)
    model = HAT(**{**TINY, "scale": 2, "conv_scale": 0.5, **options})
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.1 if p.dim() < 3 else 0.2)
    return model.eval()


def spandrel_model(**options):
    spandrel = pytest.importorskip("spandrel.architectures.HAT", reason="the bench extra is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.meshgrid's indexing
        return spandrel.HAT(
            **{
                "embed_dim": 24,
                "depths": (2, 1),
                "num_heads": (2, 3),
                "window_size": 4,
                "compress_ratio": 3,
                "squeeze_factor": 6,
                "mlp_ratio": 2,
                "upsampler": "pixelshuffle",
                "img_size": 16,
                **options,
            }
        )
