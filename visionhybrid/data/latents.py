"""Images as latents: encoded once, drawn anew from the encoder's distribution each time they are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from visionhybrid.data.errors import CorruptSample
from visionhybrid.data.seeds import mix
from visionhybrid.data.store import Rows, StoreError, digest


def image_key(image: Image.Image) -> str:
    """A hash of what the image shows, whatever file it came from."""
    return digest(f"{image.mode} {image.size}".encode(), image.tobytes())


@dataclass(frozen=True)
class Cut:
    """The central square of an image whose shorter side is made `size` pixels."""

    size: int

    def __call__(self, image: Image.Image) -> Tensor:
        """(C, size, size) in [-1, 1]."""
        small = F.resize(image, [self.size], F.InterpolationMode.BICUBIC)  # pyright: ignore[reportArgumentType]
        return F.to_tensor(F.center_crop(small, [self.size])) * 2 - 1

    def corner(self, image: Image.Image) -> tuple[int, int]:
        """Top and left of the square in the resized image."""
        width, height = image.size
        shorter = min(width, height)
        tall, wide = (int(self.size * side / shorter) for side in (height, width))
        return round((tall - self.size) / 2), round((wide - self.size) / 2)


@dataclass(frozen=True)
class Affine:
    """Between an encoder's latents and what a generator is trained on: (latent - shift) * scale. Each (C, 1, 1)."""

    shift: Tensor
    scale: Tensor


def drawn(moments: Tensor, generator: torch.Generator) -> Tensor:
    """A latent from mean and log variance, stacked along the first axis (2 C, h, w) -> (C, h, w)."""
    mean, log_variance = moments.chunk(2)
    noise = torch.randn(mean.shape, generator=generator)
    # diffusers' limits of the log variance
    return mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise


class Latents:
    """Latents of labelled images, out of a store. Sample: image (C, h, w), label, size and corner (2,) int64.

    Args:
        classes: names. rows: of each image; None: it could not be read. labels: of each image.
        stochastic: the rows hold mean and log variance. draw: "sample", or "mean".
        flip: share of mirrored images; their rows have both views.
    """

    def __init__(
        self,
        classes: Sequence[str],
        rows: Rows,
        labels: Sequence[int],
        affine: Affine,
        *,
        stochastic: bool,
        draw: str = "sample",
        flip: float = 0.0,
    ) -> None:
        self.classes, self.rows, self.affine = classes, rows, affine
        self.labels = torch.tensor(labels)
        self.stochastic, self.draw, self.flip = stochastic, draw, flip

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        """Raises: CorruptSample: the image could not be read, had no label, or its row was damaged since."""
        try:
            row = self.rows[index]
        except StoreError as error:
            raise CorruptSample(f"image {index}", str(error)) from None
        if row is None:
            raise CorruptSample(f"image {index}", "cannot be read, or has no label")
        generator = torch.Generator().manual_seed(mix(seed, "latent"))
        mirrored = bool(torch.rand((), generator=generator) < self.flip)
        moments = row["moments"][int(mirrored)].float()
        if not self.stochastic:
            latent = moments
        else:
            latent = moments.chunk(2)[0] if self.draw == "mean" else drawn(moments, generator)
        return {
            "image": (latent - self.affine.shift) * self.affine.scale,
            "label": self.labels[index],
            "size": row["size"],
            "corner": row["corner"],
        }
