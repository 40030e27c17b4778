"""The effective receptive field: which pixels the centre of the last feature map depends on, and how strongly.

Definition of RepLKNet (arXiv:2203.06717; DingXiaoH/RepLKNet-pytorch, erf/), which the papers of hybrid backbones use: pictures of
1024 x 1024 pixels; of each, the gradient of the sum over channels of relu(f) at the centre of the last feature map f; negative
parts count as 0. A network that saw everything alike would need 99 % of the picture for 99 % of the contribution.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_data_config  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from visionhybrid.infer.classification import AnyImage, pil_image
from visionhybrid.infer.progress import bar

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)


@dataclass(frozen=True, kw_only=True)
class ReceptiveField:
    """What `receptive_field` found for pictures of H x W pixels."""

    mean: Tensor  # (H, W) float64: positive input gradients, summed over colours, mean over pictures
    display: Tensor  # (H, W): log10(mean + 1), its maximum 1
    # share of the sum of `display` -> side of the smallest centred square that holds more, pixels
    sides: dict[float, int]
    ratios: dict[float, float]  # the same squares as a share of the area: "high-contribution area ratio"
    images: int  # that count
    skipped: int  # whose gradient was not finite


def receptive_field(
    model: nn.Module,
    images: Iterable[AnyImage],
    *,
    size: int = 1024,
    thresholds: Sequence[float] = THRESHOLDS,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ReceptiveField:
    """The effective receptive field of a backbone over `images`, in eval mode.

    Args:
        model: any backbone with timm's `forward_intermediates`; the last map before the final norm is looked at.
        images: paths, PIL images or tensors (C, H, W), as for `classify`; stretched to `size` x `size`, bicubic, and normalised
            as the model's `pretrained_cfg` says.
        size: side, pixels. Published figures: 1024; less needs less memory, and is another figure.
        thresholds: shares in (0, 1).
        device: the model is moved there; default: where it is.
        progress: show a bar on the terminal.
    Raises:
        ValueError: no backbone, no images, or no image with a finite gradient that is not 0 everywhere.
    """
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"receptive_field: a backbone with forward_intermediates is needed, got {type(model).__name__}"
        )
    if size < 32 or not all(0 < t < 1 for t in thresholds):
        raise ValueError(
            f"receptive_field: size starts at 32 and thresholds lie in (0, 1), got {size} and {list(thresholds)}"
        )
    images = list(images)
    if not images:
        raise ValueError("receptive_field: no images")
    model = model.to(device) if device is not None else model
    trained, learns = model.training, [p.requires_grad for p in model.parameters()]
    total, count = torch.zeros(size, size, dtype=torch.float64), 0
    try:
        model.eval().requires_grad_(False)  # only the gradient at the input is wanted
        with bar(progress, "receptive field") as update:
            for done, image in enumerate(images):
                gradient = centre_gradient(model, _pixels(model, image, size))
                if gradient.isfinite().all():
                    total, count = total + gradient, count + 1
                update((done + 1) / len(images))
    finally:
        model.train(trained)
        for p, learnt in zip(model.parameters(), learns, strict=True):
            p.requires_grad_(learnt)
    if not total.any():
        raise ValueError(
            f"receptive_field: the gradient is not finite, or 0 everywhere, for all of {len(images)} images"
        )
    mean = total / count
    display = (mean + 1).log10()
    display = display / display.max()
    sides = {t: square(display, t) for t in thresholds}
    return ReceptiveField(
        mean=mean,
        display=display,
        sides=sides,
        ratios={t: side**2 / size**2 for t, side in sides.items()},
        images=count,
        skipped=len(images) - count,
    )


def centre_gradient(model: nn.Module, x: Tensor) -> Tensor:
    """The positive gradient at the pixels of x (B, C, H, W) of the centre of the last feature map: (H, W) float64, on the CPU."""
    network: Any = model
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (tap,) = network.forward_intermediates(x, 1, intermediates_only=True)
        centre = tap[:, :, tap.shape[2] // 2, tap.shape[3] // 2].relu().sum()
        (gradient,) = torch.autograd.grad(centre, x)
    # Not relu: minus infinity has to be seen.
    return torch.where(gradient < 0, 0 * gradient, gradient).sum((0, 1)).double().cpu()


def square(display: Tensor, threshold: float) -> int:
    """Side of the smallest square around the centre (H // 2, W // 2) that holds more than this share of the sum, at least 3."""
    H, W = display.shape
    rows = (torch.arange(H) - H // 2).abs()[:, None]
    columns = (torch.arange(W) - W // 2).abs()
    ring = torch.maximum(rows, columns)  # the half side of the square that a pixel enters
    share = torch.bincount(ring.flatten(), display.flatten(), minlength=2).cumsum(0) / display.sum()
    inside = (share[1:] > threshold).nonzero()
    reach = int(inside[0]) + 1 if len(inside) else max(H, W) // 2
    return min(2 * reach + 1, max(H, W))


def _pixels(model: nn.Module, image: AnyImage, size: int) -> Tensor:
    """(1, C, size, size) on the model's device and in its type."""
    cfg: dict[str, Any] = resolve_data_config(pretrained_cfg=getattr(model, "pretrained_cfg", None) or {})
    channels = int(getattr(model, "in_chans", 3))
    if channels not in (1, 3):
        raise ValueError(f"receptive_field: images have 1 or 3 channels, the model takes {channels}")
    picture = pil_image(image).convert("RGB" if channels == 3 else "L")
    picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(picture)).float().div(255).view(size, size, channels).permute(2, 0, 1)
    mean, std = (torch.tensor(cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))
    if channels == 1:  # of a colour model's description, where the model is grey: their mean
        mean, std = mean.mean(), std.mean()
    return ((x - mean) / std)[None].to(next(model.parameters()))
