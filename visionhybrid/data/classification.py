"""Labelled images for training: timm's folders, tar files and Hugging Face data sets, webdataset shards, the digits.

`LabelledImages.sample(index, seed)` takes every random decision from `seed`: timm's transforms draw from Python's, NumPy's
and torch's generators, which are seeded around each sample and put back.

Streams (timm's `wds/`, `tfds/`, `hfids/` readers) have no index, so a run over them could not be resumed exactly. Local
webdataset shards are therefore indexed here (`wds`), Hugging Face data sets read map-style (`hfds/NAME`), TFDS refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import timm.data
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import Mixup
from torch import Tensor

from visionhybrid.data import samples
from visionhybrid.data.errors import CorruptSample
from visionhybrid.data.scan import stamp_of
from visionhybrid.data.seeds import seeded
from visionhybrid.data.tars import Shards, Tar, in_order

_SPLITS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))
# What decoding a damaged image file raises.
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


class Source(Protocol):
    """Images by index. `classes`: their names in label order, or () when the source does not know."""

    place: str  # folder or file that the images come from; "" where there is none

    @property
    def classes(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def read(self, index: int) -> tuple[Image.Image, int]: ...

    def name(self, index: int) -> str:
        """Of an image, for a person."""
        ...

    def peek(self, index: int) -> tuple[str, int] | None:
        """What changes when the image does, and its label, without reading it; None where that cannot be said."""
        ...

    def labels(self) -> Sequence[int] | None:
        """Of all images, where they are known without reading them."""
        ...


class Digits:
    """scikit-learn's 8x8 digits, fixed split ("train" or "val")."""

    classes = tuple("0123456789")
    place = ""

    def __init__(self, split: str) -> None:
        images, labels = samples.digits(split)
        self.images, self._labels = (images[:, 0] * 255).round().byte().numpy(), labels.tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self._labels[index]

    def name(self, index: int) -> str:
        return f"digit {index}"

    def peek(self, index: int) -> None:
        return None

    def labels(self) -> list[int]:
        return self._labels


class TimmSource:
    """What `timm.data.create_dataset(name, root, split)` finds, if it can be indexed.

    Raises: ValueError: no such folder, nothing in it, or a stream.
    """

    def __init__(self, name: str, root: str, split: str, class_map: str = "") -> None:
        kind = name.partition("/")[0]
        if kind in ("wds", "tfds", "hfids"):
            raise ValueError(
                f"data.dataset: {name!r} is a stream and cannot be resumed exactly; use 'wds' (local shards) or 'hfds/...'"
            )
        if kind not in ("", "hfds", "torch"):
            raise ValueError(
                f"data.dataset: no {name!r}; have '' (folder or tar file), 'digits', 'wds' (local shards), 'hfds/NAME', 'torch/NAME'"
            )
        if not name and not (root and Path(root).exists()):
            raise ValueError(f"data.root: no such folder or tar file: {root or '(empty)'}")
        try:
            self.dataset: Any = timm.data.create_dataset(
                name, root=root or None, split=split, class_map=class_map or None, is_training=False
            )
        except ModuleNotFoundError as error:
            raise ValueError(f"data.dataset: {name!r} needs a package: pip install {error.name}") from None
        except (RuntimeError, OSError, ValueError, AssertionError) as error:
            raise ValueError(f"data: {root or name}, split {split!r}: {str(error).splitlines()[0]}") from None
        self.reader = getattr(self.dataset, "reader", None)
        self.place = "" if name else str(self.reader.root)
        if not len(self.dataset):
            raise ValueError(f"data: {root or name}, split {split!r}: no images")
        self.classes = in_order(getattr(self.reader, "class_to_idx", None) or {})

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

    def name(self, index: int) -> str:
        return str(self.reader.samples[index][0]) if self.place else f"image {index}"

    def peek(self, index: int) -> tuple[str, int] | None:
        if not self.place:
            return None
        path, label = self.reader.samples[index]
        return stamp_of(path), int(label)

    def labels(self) -> list[int] | None:
        return [int(label) for _, label in self.reader.samples] if self.place else None


def open_source(dataset: str, root: str, split: str, class_map: str = "") -> Source:
    """The images that `dataset` names: "digits", "wds" (local shards), or what timm calls it.

    "" is a folder of classes, a tar file, or a folder that has one of these for each split.
    """
    if dataset == "digits":
        return Digits("train" if split == "train" else "val")
    if dataset == "wds":
        return Shards(root, split)
    if not dataset and (file := _tar_of(Path(root), split)):
        return Tar(file, class_map)
    return TimmSource(dataset, root, split, class_map)


def _tar_of(root: Path, split: str) -> Path | None:
    """`root` itself or its tar file of the split, under any of timm's words for it."""
    if root.suffix.lower() == ".tar" and root.is_file():
        return root
    words = next((words for words in _SPLITS if split in words), ())
    found = (root / f"{word}.tar" for word in (split, *words))
    return next((file for file in found if file.is_file()), None)


def open_splits(dataset: str, root: str, train: str, held_out: str, class_map: str = "") -> list[Source]:
    """The images to train on, and those held out.

    Raises: ValueError: as `open_source`, or what is held out is trained on, which only equal names of both splits ask for.
    """
    sources = [open_source(dataset, root, split, class_map) for split in (train, held_out)]
    first, second = (Path(source.place).resolve() for source in sources)
    shared = sources[0].place and (first == second or second in first.parents or first in second.parents)
    if shared and train != held_out:
        raise ValueError(
            f"data.held_out: {root} has no split {held_out!r} of its own, so what is trained on would be measured; "
            f"name the one that is there, or say data.held_out={train} to mean it"
        )
    return sources


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
        except UnidentifiedImageError:
            raise CorruptSample(self.source.name(index), "not an image") from None
        except _DAMAGED as error:
            raise CorruptSample(self.source.name(index), f"{type(error).__name__}: {error}") from None
        if label < 0:
            raise CorruptSample(self.source.name(index), "has no label")
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
