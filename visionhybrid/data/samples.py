"""Real images that come with two installed packages: handwritten digits and 22 photographs. Nothing is downloaded.

The digits are the UCI optical recognition set in scikit-learn (1797 images of 8x8). The photographs are the natural
images in the wheels of scikit-image and scikit-learn, whole and uncompressed; drawings, phantoms and checkerboards are
left out. Both have a fixed split, so that numbers from two machines compare. The files stay in their packages; each
photograph carries its credit and the rights as its package states them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

SPLITS = ("train", "val")
DIGIT_CLASSES = 10

_SKIMAGE, _SKLEARN = "scikit-image", "scikit-learn"
_CC0, _CC_BY, _PUBLIC = "CC0", "CC BY 2.0", "public domain"
_NO_KNOWN, _UNSTATED = "no known restrictions", "not stated by the package"

# name: (package, credit, rights). Order and names are part of the split: do not change them.
_PHOTOGRAPHS = {
    "astronaut": (_SKIMAGE, "NASA, Eileen Collins", _PUBLIC),
    "chelsea": (_SKIMAGE, "Stefan van der Walt", _CC0),
    "coffee": (_SKIMAGE, "Rachel Michetti", _CC0),
    "hubble_deep_field": (_SKIMAGE, "NASA, Hubble eXtreme Deep Field", _PUBLIC),
    "immunohistochemistry": (_SKIMAGE, "Center for Microscopy and Molecular Imaging", _NO_KNOWN),
    "retina": (_SKIMAGE, "Haggstrom, Wikimedia Commons", _CC0),
    "rocket": (_SKIMAGE, "SpaceX", _PUBLIC),
    "motorcycle_left": (_SKIMAGE, "Middlebury stereo 2014", _UNSTATED),
    "motorcycle_right": (_SKIMAGE, "Middlebury stereo 2014", _UNSTATED),
    "camera": (_SKIMAGE, "Lav Varshney", _CC0),
    "brick": (_SKIMAGE, "CC0Textures", _CC0),
    "grass": (_SKIMAGE, "linolafett, DeviantArt", _CC0),
    "gravel": (_SKIMAGE, "CC0Textures", _CC0),
    "moon": (_SKIMAGE, "unknown", _UNSTATED),
    "cell": (_SKIMAGE, "Paul Mueller and others", _CC0),
    "clock": (_SKIMAGE, "Stefan van der Walt", _PUBLIC),
    "coins": (_SKIMAGE, "Brooklyn Museum collection", _NO_KNOWN),
    "page": (_SKIMAGE, "unknown", _UNSTATED),
    "text": (_SKIMAGE, "Wikimedia Commons", _PUBLIC),
    "microaneurysms": (_SKIMAGE, "Andreas Maier", _CC0),
    "china": (_SKLEARN, "danielbuechele, flickr", _CC_BY),
    "flower": (_SKLEARN, "vultilion, flickr", _CC_BY),
}
HELD_OUT = ("coffee", "rocket", "camera", "china")


@dataclass(frozen=True)
class Photograph:
    """A photograph and where it comes from. `pixels`: uint8 (C, H, W), shared: do not write to it."""

    name: str
    pixels: Tensor
    package: str
    credit: str
    license: str


def digits(split: str = "train") -> tuple[Tensor, Tensor]:
    """Handwritten digits: images float32 (N, 1, 8, 8) in [0, 1] and labels int64 (N,) in 0..9.

    Split by a rule without randomness: within each class, in the order of the data set, every fifth image is held out.
    "train" has 1442 images, "val" 355. Raises: ValueError: unknown split; ImportError: scikit-learn is missing.
    """
    _check_split("digits", split)
    bunch = _package("sklearn.datasets").load_digits()
    images = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(DIGIT_CLASSES):
        held_out[(labels == digit).nonzero().flatten()[4::5]] = True
    chosen = held_out if split == "val" else ~held_out
    return images[chosen], labels[chosen]


def photographs(split: str = "train", *, channels: int | None = None) -> list[Photograph]:
    """The photographs of a split, always in the same order.

    Args:
        split: "train" (18 photographs) or "val" (coffee, rocket, camera, china).
        channels: 3 repeats the grey ones, 1 reduces colour to BT.601 luma (full range), None leaves both as they are.
    Raises: ValueError: unknown split or channels; ImportError: scikit-image or scikit-learn is missing.
    """
    _check_split("photographs", split)
    if channels not in (None, 1, 3):
        raise ValueError(f"photographs: channels must be None, 1 or 3, got {channels}")
    names = HELD_OUT if split == "val" else [name for name in _PHOTOGRAPHS if name not in HELD_OUT]
    return [Photograph(name, _with_channels(_pixels(name), channels), *_PHOTOGRAPHS[name]) for name in names]


@cache
def _pixels(name: str) -> Tensor:
    if _PHOTOGRAPHS[name][0] == _SKLEARN:
        array = _package("sklearn.datasets").load_sample_image(f"{name}.jpg")
    elif name.startswith("motorcycle_"):
        left, right, _disparity = _package("skimage.data").stereo_motorcycle()
        array = left if name.endswith("left") else right
    else:
        array = getattr(_package("skimage.data"), name)()
    pixels = torch.tensor(array)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def _with_channels(pixels: Tensor, channels: int | None) -> Tensor:
    if channels is None or channels == pixels.shape[0]:
        return pixels
    if channels == 3:
        return pixels.expand(3, -1, -1)
    weight = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (pixels * weight).sum(0, keepdim=True).round().to(torch.uint8)


def _package(module: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = _SKIMAGE if module.startswith("skimage") else _SKLEARN
        raise ImportError(
            f'sample images need {package}: pip install "visionhybrid[samples]" (missing: {error.name})'
        ) from error


def _check_split(who: str, split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"{who}: no split {split!r}; have {', '.join(SPLITS)}")
