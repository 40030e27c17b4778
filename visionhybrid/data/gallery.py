"""Where high-resolution pictures come from: a folder, or the sample photographs. Decoded once if there is room."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from visionhybrid.data.errors import CorruptSample
from visionhybrid.data.images import ImageError, read_image
from visionhybrid.data.samples import photographs
from visionhybrid.data.scan import select

# BT.601, full range: what grey versions of colour benchmarks are made with.
LUMA = (0.299, 0.587, 0.114)


class Gallery(Protocol):
    """An ordered set of pictures."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call picture `index`, without spaces or suffix."""
        ...

    def source(self, index: int) -> str:
        """Where picture `index` comes from, for messages."""
        ...

    def picture(self, index: int) -> Tensor:
        """(C, H, W), uint8 or, for deeper files, float32 in [0, 1]; not to be written to.

        Raises: CorruptSample.
        """
        ...


class Folder:
    """The pictures below a folder, or those of them that a list names.

    Args:
        root: searched recursively; the files may differ in size and format.
        names: file with one relative path a line (the "meta-info" lists of restoration data sets).
        channels: 3 repeats grey pictures, 1 reduces colour ones to luma. Alpha is dropped.
        cache: bytes of decoded pictures kept in memory, in each process; 0 decodes every time. Nothing is evicted:
            with random access any choice of what to keep is as good.
    Raises: ValueError: no such folder, nothing in it, or a listed picture is missing.
    """

    def __init__(
        self, root: str | Path, *, names: str | Path | None = None, channels: int = 3, cache: int = 0
    ) -> None:
        if channels not in (1, 3):
            raise ValueError(f"Folder: channels must be 1 or 3, got {channels}")
        self.root, self.channels = Path(root), channels
        self.files = select(root, names)
        self._room, self._kept = cache, dict[int, Tensor]()

    def __len__(self) -> int:
        return len(self.files)

    def __getstate__(self) -> dict:
        # Loading processes start with an empty cache instead of a copy of this one.
        return {
            **self.__dict__,
            "_kept": {},
            "_room": self._room + sum(x.nbytes for x in self._kept.values()),
        }

    def name(self, index: int) -> str:
        return Path(self.files[index]).with_suffix("").as_posix().replace("/", "_").replace(" ", "_")

    def source(self, index: int) -> str:
        return str(self.root / self.files[index])

    def picture(self, index: int) -> Tensor:
        if index in self._kept:
            return self._kept[index]
        pixels = _read(self.source(index), self.channels)
        if pixels.nbytes <= self._room:
            self._room -= pixels.nbytes
            self._kept[index] = pixels
        return pixels


class Samples:
    """The photographs that come with scikit-image and scikit-learn, see `data.samples`."""

    def __init__(self, split: str = "train", *, channels: int = 3) -> None:
        self.photographs = photographs(split, channels=channels)

    def __len__(self) -> int:
        return len(self.photographs)

    def name(self, index: int) -> str:
        return self.photographs[index].name

    def source(self, index: int) -> str:
        photograph = self.photographs[index]
        return f"{photograph.package}: {photograph.name}"

    def picture(self, index: int) -> Tensor:
        return self.photographs[index].pixels


def _read(path: str, channels: int) -> Tensor:
    try:
        picture = read_image(path)
    except ImageError as error:
        raise CorruptSample(path, error.reason) from error
    pixels = picture.pixels
    if len(pixels) != channels:
        if channels == 3:
            pixels = pixels.expand(3, -1, -1)
        else:
            pixels = (pixels * torch.tensor(LUMA).view(3, 1, 1)).sum(0, keepdim=True)
    # 8-bit files are kept as they are stored: a quarter of the memory, and exact.
    return (pixels * 255).round().to(torch.uint8) if picture.bits == 8 else pixels.contiguous()
