"""Scores with the conventions of the published tables: PSNR, SSIM, top-k accuracy, confusion matrix.

Restoration scores are computed on 8-bit images: float images in [0, 1] are clamped and rounded to 256 levels first,
`crop_border` pixels are cut from each side, and the luma is BT.601 in [16, 235], *not* rounded. A data-set score is the
plain mean over images. Everything is float64.

Source: XPixelGroup/BasicSR@8d56e3a `basicsr/metrics/psnr_ssim.py` (`calculate_psnr`, `calculate_ssim`; its tensor variants
skip the rounding and add 1e-8 to the error, so their numbers do not compare); Wang et al., IEEE TIP 13(4), 2004 (SSIM).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SPACES = ("y", "rgb")
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


def to_luma(image: Tensor) -> Tensor:
    """BT.601 luma in [16, 235] of an RGB image in [0, 255]: (..., 3, H, W) -> (..., 1, H, W), not rounded, float64."""
    if image.ndim < 3 or image.shape[-3] != 3:
        raise ValueError(f"to_luma: expected (..., 3, H, W), got {tuple(image.shape)}")
    weight = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=image.device)
    luma = torch.einsum("...chw,c->...hw", image.double(), weight) / 255 + 16
    return luma.unsqueeze(-3)


def psnr(restored: Tensor, truth: Tensor, *, crop_border: int = 0, space: str = "y") -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, 10 log10(255^2 / mean squared difference).

    Args:
        restored, truth: (B, C, H, W) or (C, H, W); floating point in [0, 1] or integers in [0, 255]. `restored` may
            overshoot [0, 1] (a network's output does) and is clamped.
        crop_border: pixels ignored at each side; the scale factor in super-resolution tables.
        space: "y" scores the luma of RGB images (one-channel images are scored as they are), "rgb" all channels.
    Returns: float64, (B,) or (); inf where the two 8-bit images are equal, nan where `restored` has a nan.
    Raises: ValueError: shapes differ, values out of range, or nothing is left after cropping.
    """
    a, b = _comparable("psnr", restored, truth, crop_border, space)
    error = (a - b).square().flatten(-3).mean(-1)
    return 10 * torch.log10(255.0**2 / error)


def ssim(restored: Tensor, truth: Tensor, *, crop_border: int = 0, space: str = "y") -> Tensor:
    """Structural similarity of each image: 11x11 Gaussian window (sigma 1.5), fully covered positions only.

    Local moments are the biased E[x^2] - E[x]^2; the score is the mean over positions, then over channels.
    Arguments, result and errors as for `psnr`; sides must be at least 11 after cropping.
    """
    a, b = _comparable("ssim", restored, truth, crop_border, space)
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"ssim: needs sides of at least {SSIM_WINDOW} after cropping, got {tuple(a.shape[-2:])}"
        )
    return ssim_map(a, b, peak=255.0).flatten(-3).mean(-1)


def ssim_map(a: Tensor, b: Tensor, *, peak: float) -> Tensor:
    """Structural similarity at each fully covered position: two (..., C, H, W) -> (..., C, H - 10, W - 10).

    Differentiable, in the dtype of its inputs; neither rounds nor checks. `peak`: the largest value of the scale.
    """
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    var_a = _window_mean(a * a) - mean_a**2
    var_b = _window_mean(b * b) - mean_b**2
    covariance = _window_mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return luminance * structure


def top_k_hits(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Whether each label is among the k largest of its row: (B, classes), (B,) -> bool (B,).

    Rows with a nan are misses, so that a diverged model never scores. `k` above the number of classes is an error.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"top_k_hits: expected (B, classes) and (B,), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    classes = logits.shape[1]
    if not 1 <= k <= classes:
        raise ValueError(f"top_k_hits: k must be in 1..{classes} (the number of classes), got {k}")
    _check_labels("top_k_hits", labels, classes)
    best = logits.topk(k, dim=1).indices
    return (best == labels[:, None]).any(1) & ~logits.isnan().any(1)


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Fraction of rows whose label is among the k largest logits, in [0, 1]; see `top_k_hits`."""
    if not len(labels):
        raise ValueError("top_k_accuracy: needs at least one sample")
    return top_k_hits(logits, labels, k).double().mean().item()


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts, int64 (classes, classes): row = true class, column = predicted class; (B,), (B,) integer inputs."""
    if predicted.ndim != 1 or predicted.shape != labels.shape:
        raise ValueError(
            f"confusion_matrix: expected two (B,), got {tuple(predicted.shape)} and {tuple(labels.shape)}"
        )
    _check_labels("confusion_matrix", labels, classes)
    _check_labels("confusion_matrix", predicted, classes)
    cells = labels.long() * classes + predicted.long()
    return torch.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def _check_labels(who: str, labels: Tensor, classes: int) -> None:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{who}: labels must be integers, got {labels.dtype}")
    if labels.numel() and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError(f"{who}: labels must be in 0..{classes - 1}, got {labels.min()}..{labels.max()}")


def _comparable(who: str, restored: Tensor, truth: Tensor, crop: int, space: str) -> tuple[Tensor, Tensor]:
    """Both images as float64 on the 8-bit scale, cropped, in the colour space to be compared."""
    if space not in SPACES:
        raise ValueError(f"{who}: no space {space!r}; have {', '.join(SPACES)}")
    if restored.shape != truth.shape or truth.ndim not in (3, 4) or not truth.numel():
        raise ValueError(
            f"{who}: expected two (B, C, H, W) or (C, H, W) of one shape, got {tuple(restored.shape)} and "
            f"{tuple(truth.shape)}"
        )
    height, width = truth.shape[-2:]
    if crop < 0 or min(height, width) <= 2 * crop:
        raise ValueError(f"{who}: crop_border {crop} leaves nothing of {height}x{width}")
    if truth.is_floating_point() and not (truth.min() >= 0 and truth.max() <= 1):
        raise ValueError(
            f"{who}: a floating-point truth must be in [0, 1], got {truth.min():g}..{truth.max():g}"
        )
    pair = []
    for image in (restored, truth):
        x = _eight_bit(who, image)[..., crop : height - crop, crop : width - crop]
        pair.append(to_luma(x) if space == "y" and x.shape[-3] == 3 else x)
    if space == "y" and truth.shape[-3] not in (1, 3):
        raise ValueError(f"{who}: luma needs 1 or 3 channels, got {truth.shape[-3]}; use space='rgb'")
    return pair[0], pair[1]


def _eight_bit(who: str, image: Tensor) -> Tensor:
    if image.device.type == "mps":  # has no float64
        image = image.cpu()
    if image.is_floating_point():
        return (image.double().clamp(0, 1) * 255).round()
    if image.is_complex() or image.dtype == torch.bool:
        raise ValueError(f"{who}: images must be integers or floating point, got {image.dtype}")
    if not (image.min() >= 0 and image.max() <= 255):
        raise ValueError(f"{who}: integer images must be in 0..255, got {image.min()}..{image.max()}")
    return image.double()


def _window_mean(x: Tensor) -> Tensor:
    """Gaussian-weighted local means at fully covered positions: (..., C, H, W) -> (..., C, H - 10, W - 10)."""
    offset = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    weight = torch.exp(-(offset**2) / (2 * SSIM_SIGMA**2))
    weight = weight / weight.sum()
    flat = x.flatten(0, -3).unsqueeze(1)  # (planes, 1, H, W)
    flat = F.conv2d(F.conv2d(flat, weight.view(1, 1, -1, 1)), weight.view(1, 1, 1, -1))
    return flat.reshape(*x.shape[:-2], *flat.shape[-2:])
