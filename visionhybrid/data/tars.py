"""Images inside tar files: folders of classes, webdataset shards.

Each image is known by where it begins and read by itself: loading processes share no open file.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image
from timm.data.readers import get_img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from visionhybrid.data.scan import stamp_of


def in_order(index: Mapping[str, int]) -> tuple[str, ...]:
    """Names of classes, in the order of their numbers."""
    return tuple(str(name) for name, _ in sorted(index.items(), key=lambda item: item[1]))


class Members:
    """Images by where they begin in which tar file."""

    classes: Sequence[str] = ()
    place: str
    entries: list[tuple[Path, str, int, int, int]]  # file, name, offset, size, label

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, index: int) -> tuple[Image.Image, int]:
        path, _, offset, size, label = self.entries[index]
        with open(path, "rb") as file:
            file.seek(offset)
            return Image.open(io.BytesIO(file.read(size))), label

    def name(self, index: int) -> str:
        path, member, *_ = self.entries[index]
        return f"{path}:{member}"

    def peek(self, index: int) -> tuple[str, int] | None:
        path, _, offset, _, label = self.entries[index]
        return stamp_of(path, offset), label

    def labels(self) -> list[int]:
        return [label for *_, label in self.entries]


class Tar(Members):
    """A tar file with a folder or a tar file for each class, as timm finds them.

    Raises: ValueError: not a tar file, or no images in it.
    """

    def __init__(self, file: Path, class_map: str = "") -> None:
        self.place = str(file)
        try:
            # timm's cache of what is inside would be a pickle beside the data
            reader = ReaderImageInTar(str(file), class_map=class_map, cache_tarinfo=False)
        except (tarfile.TarError, OSError, ValueError, AssertionError) as error:
            reason = "no images in it" if isinstance(error, ValueError) else error
            raise ValueError(f"data.root: {file}: {reason}") from None
        self.classes = in_order(reader.class_name_to_idx)
        self.entries = [
            (
                file,
                member.name,
                member.offset_data + (inner.offset_data if inner else 0),
                member.size,
                int(label),
            )
            for (member, _, inner), label in zip(reader.samples, reader.targets, strict=True)
        ]


class Shards(Members):
    """webdataset tar files (`KEY.jpg` beside `KEY.cls`), indexed once, so that every image has a number.

    `root` is a folder with `*.tar`, or has a sub-folder of the split's name with them, or is one tar file.
    """

    def __init__(self, root: str, split: str) -> None:
        base = Path(root)
        folder = base / split if (base / split).is_dir() else base
        self.place = str(folder)
        files = [base] if base.is_file() else sorted(folder.glob("*.tar"))
        if not files:
            raise ValueError(f"data.root: no tar files in {folder}")
        self.entries = []
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
