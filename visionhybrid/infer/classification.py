"""Classes of image files.

    for p in visionhybrid.classify(model, ["cat.jpg", "dog.png"]):
        print(p.source, p.error or p.guesses[0])

Images may be paths, PIL images or tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps

# timm re-exports these without telling type checkers.
from timm.data import (
    ImageNetInfo,  # pyright: ignore[reportPrivateImportUsage]
    create_transform,  # pyright: ignore[reportPrivateImportUsage]
    resolve_data_config,  # pyright: ignore[reportPrivateImportUsage]
)
from torch import Tensor, nn

from visionhybrid.data.images import READ_SUFFIXES, ImageError, read_image, samples_of
from visionhybrid.infer.progress import bar

AnyImage = str | Path | Image.Image | Tensor


@dataclass(frozen=True)
class Guess:
    """One class: its number, its name, and its probability by softmax."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first; or why there are none."""

    source: str  # the path, or "image 3" for what is not a file
    guesses: tuple[Guess, ...] = ()
    error: str = ""


def classify(
    model: nn.Module,
    images: AnyImage | Iterable[AnyImage],
    topk: int = 5,
    labels: Sequence[str] | None = None,
    *,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> list[Prediction]:
    """The `topk` most probable classes of each image.

    Images are resized, cropped and normalised as timm does for the model's `pretrained_cfg` (which `visionhybrid.load` sets).
    EXIF orientation is applied, alpha left out; grey images have three equal channels for a colour model.

    Args:
        model: a classifier, (B, C, H, W) -> (B, classes); evaluated in eval mode, its training flag put back afterwards.
        images: one or several of: path, PIL image, tensor (C, H, W), uint8 or float in [0, 1]; or a tensor (B, C, H, W).
        topk: at most the number of classes are returned.
        labels: names in the order of the logits; default: those stored with the weights, ImageNet's for 1000 classes without
            any, else the numbers.
        batch_size: images computed at once.
        device: the model is moved there; default: where it is.
        progress: show a bar on the terminal's error stream once it takes more than a moment.
    Returns: one Prediction for each image, in their order. An image that cannot be read has its `error` set.
    Raises:
        ValueError: not a classifier, a wrong number of labels, or a wrong kind of image.
    """
    if topk < 1 or batch_size < 1:
        raise ValueError(f"classify: topk and batch_size start at 1, got {topk} and {batch_size}")
    if isinstance(images, Tensor) and images.ndim == 4:
        images = list(images)
    items = [images] if isinstance(images, (str, Path, Image.Image, Tensor)) else list(images)
    names = label_names(model, labels)
    transform, mode = transform_of(model)
    if device is not None:
        model.to(device)
    was_training = model.training
    model.eval()
    found: list[Prediction] = []
    try:
        with bar(progress, "classifying") as update:
            for start in range(0, len(items), batch_size):
                found += _batch(model, items[start : start + batch_size], start, transform, mode, names, topk)
                update(len(found) / len(items))
    finally:
        model.train(was_training)
    return found


def label_names(model: nn.Module, labels: Sequence[str] | None = None) -> list[str]:
    """The names of the classes of `model`, in the order of its logits (see `classify`).

    Raises:
        ValueError: the model has no classes, or another number of them.
    """
    classes = getattr(model, "num_classes", 0)
    if not isinstance(classes, int) or classes < 1:
        raise ValueError(
            f"classify: {type(model).__name__} has no classes; a model with a classifier is needed"
        )
    cfg = getattr(model, "pretrained_cfg", None) or {}
    stored = labels if labels is not None else cfg.get("label_names")
    if stored is not None:
        if len(stored) != classes:
            raise ValueError(f"classify: {len(stored)} class names for {classes} classes")
        told = cfg.get("label_descriptions") if labels is None else None
        return [str(told.get(name, name)) if isinstance(told, dict) else str(name) for name in stored]
    if classes == 1000:
        info = ImageNetInfo()
        return [info.index_to_description(index) for index in range(classes)]
    return [str(index) for index in range(classes)]


def transform_of(model: nn.Module) -> tuple[Callable[[Image.Image], Tensor], str]:
    """timm's evaluation transform for `model`, and the mode of the PIL images it takes."""
    cfg: dict[str, Any] = resolve_data_config(pretrained_cfg=getattr(model, "pretrained_cfg", None) or {})
    channels = int(getattr(model, "in_chans", cfg["input_size"][0]))
    if channels not in (1, 3):
        raise ValueError(f"classify: images have 1 or 3 channels, the model takes {channels}")
    cfg["input_size"] = (channels, *cfg["input_size"][1:])
    for name in ("mean", "std"):  # of a colour model's description, where the model is grey: their mean
        values = tuple(cfg[name])
        cfg[name] = values if len(values) == channels else (sum(values) / len(values),) * channels
    return cast(
        "Callable[[Image.Image], Tensor]", create_transform(**cfg, is_training=False)
    ), "RGB" if channels == 3 else "L"


def _batch(
    model: nn.Module,
    items: Sequence[AnyImage],
    start: int,
    transform: Callable[[Image.Image], Tensor],
    mode: str,
    names: list[str],
    topk: int,
) -> list[Prediction]:
    found: list[Prediction | None] = []
    pixels: list[Tensor] = []
    for number, item in enumerate(items, start):
        try:
            pixels.append(transform(pil_image(item).convert(mode)))
            found.append(None)
        except ImageError as error:
            found.append(Prediction(_name(item, number), error=error.reason))
    rows: list[Tensor] = []
    if pixels:
        first = next(model.parameters())
        with torch.inference_mode():
            rows = list(model(torch.stack(pixels).to(first.device, first.dtype)).float().softmax(1).cpu())
    answers = iter(rows)
    return [
        known or _prediction(_name(item, number), next(answers), names, topk)
        for number, (item, known) in enumerate(zip(items, found, strict=True), start)
    ]


def _prediction(source: str, probabilities: Tensor, names: list[str], topk: int) -> Prediction:
    if not probabilities.isfinite().all():
        return Prediction(source, error="the model's output is not finite")
    best = probabilities.topk(min(topk, len(names)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Prediction(source, tuple(Guess(index, names[index], value) for index, value in pairs))


def _name(item: AnyImage, number: int) -> str:
    return str(item) if isinstance(item, (str, Path)) else f"image {number}"


def pil_image(item: AnyImage) -> Image.Image:
    """An upright 8-bit PIL image of any of the kinds `classify` takes."""
    if isinstance(item, Image.Image):
        samples, peak, _ = samples_of(ImageOps.exif_transpose(item), [])
        colours = samples[..., : 3 if samples.shape[2] > 2 else 1]
        return _from_tensor(torch.from_numpy(colours if peak == 255 else colours / peak).permute(2, 0, 1))
    if isinstance(item, (str, Path)):
        return _from_tensor(read_image(item).pixels)
    if isinstance(item, Tensor) and item.ndim == 3:
        return _from_tensor(item)
    told = f"shape {tuple(item.shape)}" if isinstance(item, Tensor) else type(item).__name__
    raise ValueError(f"classify: expected a path, PIL image or tensor (C, H, W), got {told}")


def _from_tensor(pixels: Tensor) -> Image.Image:
    if pixels.shape[0] not in (1, 3):
        raise ValueError(f"classify: an image has 1 or 3 channels, got shape {tuple(pixels.shape)}")
    if pixels.dtype != torch.uint8:
        pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    array = np.ascontiguousarray(pixels.cpu().permute(1, 2, 0).numpy())
    return Image.fromarray(array if array.shape[2] == 3 else array[..., 0])


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """The image files among `paths`; of a folder those directly in it, in the order of names, hidden ones left out.

    Raises:
        ValueError: a folder without images, an empty path. (A file that does not exist is left to `classify` to report.)
    """
    found: list[Path] = []
    paths = list(paths)
    if not all(map(str, paths)):
        raise ValueError("an image is named by an empty path")
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        inside = [
            f
            for f in sorted(path.iterdir())
            if f.suffix.lower() in READ_SUFFIXES and not f.name.startswith(".")
        ]
        if not inside:
            raise ValueError(f"{path}: no images in this folder")
        found += inside
    return found


def read_labels(path: str | Path) -> list[str]:
    """Class names from a file: a JSON list, or one a line.

    Raises:
        ValueError: the file cannot be read or holds no names.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        names = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no list of class names: {error}") from error
    names = [str(name).strip() for name in names if str(name).strip()]
    if not names:
        raise ValueError(f"{path}: no class names in it")
    return names
