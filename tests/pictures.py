"""Pictures of known samples."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageCms

from visionhybrid.data.images import Picture
from visionhybrid.data.resize import imresize

RNG = np.random.default_rng(7)
SIZE = (11, 13)  # height, width
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def samples(channels: int, bits: int = 8) -> np.ndarray:
    x = RNG.integers(0, 2**bits, (*SIZE, channels), dtype=np.uint16 if bits == 16 else np.uint8)
    return x[..., 0] if channels == 1 else x


def stored(picture: Picture) -> np.ndarray:
    """The picture as integer samples (H, W, C), which must come out whole."""
    x = picture.pixels if picture.alpha is None else torch.cat([picture.pixels, picture.alpha])
    scaled = x.double() * (2**picture.bits - 1)
    assert (scaled - scaled.round()).abs().max() < 0.01
    return scaled.round().permute(1, 2, 0).numpy().astype(np.uint16)


def picture_of(x: np.ndarray, **options) -> Picture:
    bits = 16 if x.dtype == np.uint16 else 8
    planes = torch.from_numpy(np.atleast_3d(x).astype(np.float32)).permute(2, 0, 1) / (2**bits - 1)
    colours = 3 if len(planes) > 2 else 1
    return Picture(
        pixels=planes[:colours],
        alpha=planes[colours:] if len(planes) > colours else None,
        bits=bits,
        **options,
    )


def save(path, height, width, seed=0, mode="RGB"):
    """Write a smooth picture, so that JPEG keeps it; returns its pixels (H, W, C) or (H, W)."""
    g = torch.Generator().manual_seed(seed)
    channels = {"RGB": 3, "L": 1, "RGBA": 4, "LA": 2}[mode]
    coarse = torch.rand(channels, max(2, height // 6), max(2, width // 6), generator=g)
    smooth = (imresize(coarse, size=(height, width)).clamp(0, 1) * 255).round().byte()
    array = smooth[0].numpy() if channels == 1 else smooth.permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return array


def picture_folder(root, classes, count=3, size=(20, 24), damage=None):
    """PNG files of noise, `count` in a folder for each class; `damage`: one of them that is cut short."""
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    if damage:
        (root / damage).write_bytes((root / damage).read_bytes()[:60])


def numbered_pictures(folder, count, first=0):
    """PNG files of noise called 0.png, 1.png, ..., each of another height; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(first)
    for number in range(first, first + count):
        pixels = torch.randint(256, (20 + number, 24, 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return folder
