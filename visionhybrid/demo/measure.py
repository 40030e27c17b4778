"""The demo's classifier and super-resolver: trained by recipe, then measured on images kept out of training.

The numbers are those of the released weights, loaded again from the file a user would load.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import visionhybrid
from visionhybrid.data.metrics import confusion_matrix, psnr, ssim
from visionhybrid.data.resize import imresize, modcrop
from visionhybrid.data.samples import DIGIT_CLASSES, digits, photographs
from visionhybrid.demo.training import Training, record, train
from visionhybrid.train.config import Config

DIGITS_RECIPE, PHOTOGRAPHS_RECIPE = "nextvit_digits", "hat_samples_x2"
SCALE = 2
CROP = 72  # side of the part of a photograph that the report enlarges
SHOWN = 12  # digits that the report pictures


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A held-out digit: `pixels` uint8 (8, 8), what it is, and what the network says with which confidence in [0, 1]."""

    pixels: Tensor = field(repr=False)
    truth: int
    guess: int
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Digits:
    """The first part of the demo: what the classifier says of digits that were kept out of training."""

    training: Training
    count: int
    accuracy: float  # percent of the held-out digits
    confusion: list[list[int]]  # row: true digit; column: prediction
    shown: list[Guess]  # every mistake first (at most SHOWN), then the least certain of the right ones


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A held-out photograph: scores on Y (dB, SSIM), and uint8 (3, H, W) pictures; `box`: top, left, side of the detail."""

    name: str
    credit: str
    license: str
    package: str
    bicubic_psnr: float
    bicubic_ssim: float
    psnr: float
    ssim: float
    box: tuple[int, int, int]
    bicubic: Tensor = field(repr=False)
    restored: Tensor = field(repr=False)
    truth: Tensor = field(repr=False)

    @property
    def gain(self) -> float:
        return self.psnr - self.bicubic_psnr


@dataclass(frozen=True, kw_only=True)
class Photographs:
    """The second part of the demo: held-out photographs, doubled."""

    training: Training
    photos: list[Photo]
    trained_on: list[str]

    @property
    def gain(self) -> float:
        """Mean over the photographs, in dB on Y."""
        return sum(photo.gain for photo in self.photos) / len(self.photos)


def learn_digits(out: Path, *, seed: int = 0, quick: bool = False, progress: bool = True) -> Digits:
    """Train the recipe in `out`/digits, then classify the held-out digits with the released weights."""
    config, result = train(DIGITS_RECIPE, out / "digits", seed=seed, quick=quick, progress=progress)
    model = visionhybrid.load(result["weights"])
    images, labels = digits("val")
    probability = F.softmax(_logits(model, config), 1)
    confidence, guess = probability.max(1)
    order = torch.argsort(confidence + (guess == labels))  # mistakes have no 1 added
    mistakes = int((guess != labels).sum())
    shown = [
        Guess(
            pixels=(images[i, 0] * 255).round().byte(),
            truth=int(labels[i]),
            guess=int(guess[i]),
            confidence=float(confidence[i]),
        )
        for i in order[:SHOWN].tolist()
    ]
    return Digits(
        training=record(config, model, result),
        count=len(labels),
        accuracy=100 * (1 - mistakes / len(labels)),
        confusion=confusion_matrix(guess, labels, DIGIT_CLASSES).tolist(),
        shown=shown,
    )


@torch.inference_mode()
def _logits(model: torch.nn.Module, config: Config) -> Tensor:
    """Of the held-out digits, prepared as in the run's own validation, in the order of `digits("val")`."""
    from visionhybrid.train import task

    held_out = task.build(config).held_out  # type: ignore[attr-defined]
    batch = torch.stack([held_out.sample(i, 0)["image"] for i in range(len(held_out))])
    return torch.cat([model(part) for part in batch.split(64)])


def learn_photographs(out: Path, *, seed: int = 0, quick: bool = False, progress: bool = True) -> Photographs:
    """Train the recipe in `out`/photographs, then double the size of the held-out photographs with the released weights."""
    config, result = train(PHOTOGRAPHS_RECIPE, out / "photographs", seed=seed, quick=quick, progress=progress)
    model = visionhybrid.load(result["weights"])
    photos = []
    for photo in photographs("val", channels=3):
        truth = modcrop(photo.pixels, SCALE)
        if quick:
            truth = truth[:, 100:228, 100:260]
        photos.append(_photo(model, photo, truth))
    return Photographs(
        training=record(config, model, result),
        photos=photos,
        trained_on=[photo.name for photo in photographs("train")],
    )


def _photo(model: torch.nn.Module, photo: Any, truth: Tensor) -> Photo:
    low = imresize(truth, 1 / SCALE)  # 8 bits, as a file would be
    pictures = {"bicubic": imresize(low, SCALE), "restored": visionhybrid.restore(model, low, progress=False)}
    scores = {
        name: (float(psnr(picture, truth, crop_border=SCALE)), float(ssim(picture, truth, crop_border=SCALE)))
        for name, picture in pictures.items()
    }
    return Photo(
        name=photo.name,
        credit=photo.credit,
        license=photo.license,
        package=photo.package,
        bicubic_psnr=scores["bicubic"][0],
        bicubic_ssim=scores["bicubic"][1],
        psnr=scores["restored"][0],
        ssim=scores["restored"][1],
        box=_busiest(truth, CROP),
        truth=truth,
        **pictures,
    )


def _busiest(truth: Tensor, side: int) -> tuple[int, int, int]:
    """The square with the most detail, by the mean difference of neighbouring pixels: a rule that knows no result."""
    grey = truth.float().mean(0)
    step = (grey[1:, :-1] - grey[:-1, :-1]).abs() + (grey[:-1, 1:] - grey[:-1, :-1]).abs()
    mean = F.avg_pool2d(step[None, None], side, stride=4)[0, 0]
    row, column = divmod(int(mean.argmax()), mean.shape[1])
    return 4 * row, 4 * column, side
