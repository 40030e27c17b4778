"""Labelled images for training: timm's folders, tar files and Hugging Face data sets, webdataset shards, the digits.

`LabelledImages.sample(index, seed)` takes every random decision from `seed`: timm's transforms draw from Python's, NumPy's
and torch's generators, which are seeded around each sample and put back.

Streams (timm's `wds/`, `tfds/`, `hfids/` readers) have no index, so a run over them could not be resumed exactly. Local
webdataset shards are therefore indexed here (`wds`), Hugging Face data sets read map-style (`hfds/NAME`), TFDS refused.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import timm.data
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.readers import get_img_extensions
from torch import Tensor

from visionhybrid.data import samples
from visionhybrid.data.errors import CorruptSample
from visionhybrid.data.seeds import seeded

# What decoding a damaged image file raises.
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


class Source(Protocol):
    """Images by index. `classes`: their names in label order, or () when the source does not know."""

    @property
    def classes(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def read(self, index: int) -> tuple[Image.Image, int]: ...

    def peek(self, index: int) -> tuple[str, int] | None:
        """What changes when the image does, and its label, without reading it; None where that cannot be said."""
        ...

    def labels(self) -> Sequence[int] | None:
        """Of all images, where they are known without reading them."""
        ...


def stamp_of(path: str | Path, place: int = 0) -> str:
    """A file (an image, or a container that has one at `place`) by name, size and time; "" if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{os.path.abspath(path)}:{place}:{found.st_size}:{found.st_mtime_ns}"


class Digits:
    """scikit-learn's 8x8 digits, fixed split ("train" or "val")."""

    classes = tuple("0123456789")

    def __init__(self, split: str) -> None:
        images, labels = samples.digits(split)
        self.images, self._labels = (images[:, 0] * 255).round().byte().numpy(), labels.tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self._labels[index]

    def peek(self, index: int) -> None:
        return None

    def labels(self) -> list[int]:
        return self._labels


class TimmSource:
    """What `timm.data.create_dataset(name, root, split)` finds, if it can be indexed.

    Raises: ValueError: no such folder, nothing in it, or a stream.
    """

    def __init__(self, name: str, root: str, split: str, class_map: str = "") -> None:
        if name.partition("/")[0] in ("wds", "tfds", "hfids"):
            raise ValueError(
                f"data.dataset: {name!r} is a stream and cannot be resumed exactly; use 'wds' (local shards) or 'hfds/...'"
            )
        if not name and not (root and Path(root).exists()):
            raise ValueError(f"data.root: no such folder or tar file: {root or '(empty)'}")
        try:
            self.dataset: Any = timm.data.create_dataset(
                name, root=root or None, split=split, class_map=class_map or None, is_training=False
            )
        except (RuntimeError, OSError, AssertionError, ImportError) as error:
            raise ValueError(f"data: {root or name}, split {split!r}: {str(error).splitlines()[0]}") from None
        self.reader = getattr(self.dataset, "reader", None)
        if not len(self.dataset):
            raise ValueError(f"data: {root or name}, split {split!r}: no images")
        # timm's folder and tar readers name it differently
        index = (
            getattr(self.reader, "class_to_idx", None)
            or getattr(self.reader, "class_name_to_idx", None)
            or {}
        )
        self.classes = tuple(str(c) for c, _ in sorted(index.items(), key=lambda item: item[1]))

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        # past the reader, timm's data set would take the next image for a damaged one without a word
        if self.reader is None:
            image, label = self.dataset[index]
            return image, int(label)
        file, label, *_ = self.reader[index]
        if isinstance(file, Image.Image):
            return file, int(label)
        with file:
            image = Image.open(file)
            image.load()
        return image, int(label)

    def peek(self, index: int) -> tuple[str, int] | None:
        samples = getattr(self.reader, "samples", None)
        if not samples or not isinstance(
            samples[index][0], str
        ):  # members of tar files, Hugging Face's data sets
            return None
        path, label = samples[index]
        return stamp_of(path), int(label)

    def labels(self) -> list[int] | None:
        samples = getattr(self.reader, "samples", None)
        return [int(label) for _, label in samples] if samples and isinstance(samples[0][0], str) else None


class Shards:
    """webdataset tar files (`KEY.jpg` beside `KEY.cls`), indexed once, so that every image has a number.

    `root` is a folder with `*.tar`, or has a sub-folder of the split's name with them, or is one tar file.
    """

    classes: Sequence[str] = ()

    def __init__(self, root: str, split: str) -> None:
        base = Path(root)
        folder = base / split if (base / split).is_dir() else base
        files = [base] if base.is_file() else sorted(folder.glob("*.tar"))
        if not files:
            raise ValueError(f"data.root: no tar files in {folder}")
        self.entries: list[tuple[Path, str, int, int, int]] = []  # file, name, offset, size, label
        for file in files:
            self._index(file)
        if not self.entries:
            raise ValueError(f"data.root: no image with a .cls beside it in {folder}")

    def _index(self, file: Path) -> None:
        images: dict[str, tarfile.TarInfo] = {}
        labels: dict[str, int] = {}
        try:
            with tarfile.open(file) as tar:
                for member in tar:
                    key, _, ending = member.name.rpartition(".")
                    if f".{ending.lower()}" in get_img_extensions():
                        images[key] = member
                    elif ending == "cls" and (content := tar.extractfile(member)):
                        with suppress(
                            ValueError
                        ):  # without a readable label the image is left out, as without any
                            labels[key] = int(content.read())
        except tarfile.TarError as error:
            raise ValueError(f"data.root: {file} is not a tar file: {error}") from None
        self.entries += [
            (file, m.name, m.offset_data, m.size, labels[key]) for key, m in images.items() if key in labels
        ]

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, index: int) -> tuple[Image.Image, int]:
        path, _, offset, size, label = self.entries[index]
        with open(path, "rb") as file:
            file.seek(offset)
            return Image.open(io.BytesIO(file.read(size))), label

    def peek(self, index: int) -> tuple[str, int] | None:
        path, _, offset, _, label = self.entries[index]
        return stamp_of(path, offset), label

    def labels(self) -> list[int]:
        return [label for *_, label in self.entries]


def open_source(dataset: str, root: str, split: str, class_map: str = "") -> Source:
    """The images that `dataset` names: "digits", "wds" (local shards), or what timm calls it ("" is a folder or tar)."""
    if dataset == "digits":
        return Digits("train" if split == "train" else "val")
    if dataset == "wds":
        return Shards(root, split)
    return TimmSource(dataset, root, split, class_map)


class LabelledImages:
    """A source with a transform: `sample(index, seed)` gives image float32 (C, H, W) and label int64 ()."""

    def __init__(self, source: Source, transform: Callable[[Image.Image], Tensor], mode: str = "RGB") -> None:
        self.source, self.transform, self.mode = source, transform, mode

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.source.classes)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Image and label as they are. Raises: CorruptSample: see `sample`."""
        try:
            image, label = self.source.read(index)
            image = image.convert(self.mode)
        except _DAMAGED as error:
            raise CorruptSample(f"image {index}", f"{type(error).__name__}: {error}") from None
        if label < 0:
            raise CorruptSample(f"image {index}", "has no label")
        return image, label

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        """Raises: CorruptSample: the image cannot be decoded, or has no label."""
        image, label = self.read(index)
        with seeded(seed):
            pixels = self.transform(image)
        return {"image": pixels, "label": torch.tensor(label)}


class Mix:
    """Mixup and CutMix of a batch by timm; labels become (B, classes) distributions. Draws from `seed` only."""

    def __init__(self, classes: int, **options: Any) -> None:
        self.mixup = Mixup(num_classes=classes, **options)

    def __call__(self, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        if len(batch["label"]) % 2:
            raise ValueError(f"mixup needs an even batch in each process, got {len(batch['label'])}")
        with seeded(seed):
            image, label = self.mixup(batch["image"], batch["label"])
        return {"image": image, "label": label}
