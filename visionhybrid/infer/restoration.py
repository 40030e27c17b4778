"""Restoration at use: one call for one image, of whatever kind, and one for a file or a folder.

    sharp = visionhybrid.restore(model, "blurred.png")          # a Picture
    report = restore_path(model, "in/", "out/", suffix="_x4")   # files; see infer/folders.py

`model` is any restorer: (B, C, H, W) in [0, 1] -> (B, C, H * scale, W * scale), with the attributes `scale`, `in_chans`
and `multiple_of`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from visionhybrid.data.images import Picture, read_image, samples_of
from visionhybrid.infer.engine import Engine
from visionhybrid.infer.folders import Done, Report, restore_path
from visionhybrid.infer.progress import bar

AnyImage = str | Path | Picture | Image.Image | np.ndarray | Tensor


def restore(
    model: nn.Module,
    image: AnyImage,
    tile: int | None = None,
    overlap: int | None = None,
    progress: bool = True,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    self_ensemble: bool = False,
) -> Any:
    """`image` through `model`; the result is of the same kind.

    | given | returned |
    |---|---|
    | a path | `Picture` (pixels, alpha and metadata; `write_image` stores it) |
    | `Picture` | `Picture` |
    | PIL image, 8 bits or `I;16` | PIL image, upright: `L`, `LA`, `RGB`, `RGBA` or `I;16`, with ICC profile and dpi |
    | array (H, W) or (H, W, 1 to 4), uint8, uint16 or float in [0, 1] | array of the same dtype and number of axes |
    | tensor (C, H, W) or (B, C, H, W), uint8 or float in [0, 1] | tensor of the same dtype, device and number of axes |

    Two or four channels mean that the last is alpha, unless the model itself has that many. Results are clamped to the
    range of the kind. Grey images through a colour model: the three channels are averaged. Colour images through
    a one-channel model: channel by channel. Alpha: as a grey image.

    Args:
        model: a restorer; evaluated in eval mode, its training flag put back afterwards.
        tile: side of the blended tiles in input pixels; None: the whole image where memory allows, else the largest
            tile that does (`infer/memory.py` says how this is known). Memory running out halves the tile.
        overlap: input pixels that neighbouring tiles share at least; default 32, at most half the tile.
        progress: show a bar on the terminal's error stream once it takes more than two seconds.
        device: where to compute (the model is moved there); default: where the model is.
        dtype: torch.bfloat16 or torch.float16 computes under autocast; default: as the model is.
        self_ensemble: mean over the eight flips and rotations: eight times the work for about 0.1 dB.
    Raises: ValueError: not an image (ImageError for a file), or not a restorer.
    """
    engine = Engine(
        model, tile=tile, overlap=overlap, device=device, dtype=dtype, self_ensemble=self_ensemble
    )
    given: Any = read_image(image) if isinstance(image, str | Path) else image
    with bar(progress, "restoring") as advance:
        if isinstance(given, Picture):
            return engine.picture(given, advance)
        if isinstance(given, Image.Image):
            return _pil(engine, given, advance)
        if isinstance(given, np.ndarray):
            return _array(engine, given, advance)
        if isinstance(given, Tensor):
            return _tensor(engine, given, advance)
    raise ValueError(
        f"restore: expected a path, Picture, PIL image, array or tensor, got {type(image).__name__}"
    )


def _pil(engine: Engine, image: Image.Image, advance) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        samples, icc = np.asarray(image), image.info.get("icc_profile")
    else:
        samples, _, icc = samples_of(image, [])
        samples = samples[..., 0] if samples.shape[2] == 1 else samples
    result = Image.fromarray(_array(engine, samples, advance))
    kept = {"icc_profile": icc, "dpi": image.info.get("dpi")}
    result.info.update({key: value for key, value in kept.items() if value})  # Pillow saves these
    return result


def _array(engine: Engine, image: np.ndarray, advance) -> np.ndarray:
    if image.ndim not in (2, 3):
        raise ValueError(f"restore: expected an array (H, W) or (H, W, C), got shape {image.shape}")
    peak = _peak(image.dtype.name)
    x = torch.from_numpy(np.atleast_3d(image).astype(np.float32)).permute(2, 0, 1) / peak
    y = engine.channels(x[None], advance)[0].clamp(0, 1).permute(1, 2, 0)
    y = y.numpy() if peak == 1 else (y * peak).round().numpy()
    return (y[..., 0] if image.ndim == 2 else y).astype(image.dtype)


def _tensor(engine: Engine, image: Tensor, advance) -> Tensor:
    if image.ndim not in (3, 4):
        raise ValueError(
            f"restore: expected a tensor (C, H, W) or (B, C, H, W), got shape {tuple(image.shape)}"
        )
    peak = _peak(str(image.dtype).removeprefix("torch."))
    x = image.detach().float().cpu() / peak
    y = engine.channels(x if x.ndim == 4 else x[None], advance).clamp(0, 1)
    y = y if peak == 1 else (y * peak).round()
    return (y if image.ndim == 4 else y[0]).to(image.dtype).to(image.device)


def _peak(dtype: str) -> int:
    if dtype in ("uint8", "uint16"):
        return 255 if dtype == "uint8" else 65535
    if dtype.startswith(("float", "bfloat")):
        return 1
    raise ValueError(f"restore: samples must be uint8, uint16 or floating point, got {dtype}")


__all__ = ["Done", "Report", "restore", "restore_path"]
