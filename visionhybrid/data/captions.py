"""Images with captions, in a folder: `metadata.jsonl` or `metadata.csv` beside them, or `NAME.txt` beside `NAME.png`.

The metadata are those of Hugging Face's image folders: a column `file_name`, relative to the metadata's folder, and one with
the caption. They may stand in any folder below the root. All text is UTF-8, with a mark at its beginning or without.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from visionhybrid.data.scan import find_pictures, split_folders, stamp_of, walk


class Captioned:
    """A `classification.Source` whose labels are the numbers of `captions`."""

    classes: Sequence[str] = ()

    def __init__(self, folder: Path, names: Sequence[str], captions: Sequence[str]) -> None:
        self.folder, self.names, self.captions = folder, list(names), list(captions)
        self.place = str(folder)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.folder / self.names[index]) as image:
            image.load()
        return image, index

    def name(self, index: int) -> str:
        return str(self.folder / self.names[index])

    def peek(self, index: int) -> tuple[str, int] | None:
        return stamp_of(self.folder / self.names[index]), index

    def labels(self) -> Sequence[int]:
        return range(len(self))

    def every(self, count: int, *, others: bool = False) -> Captioned:
        """Every so many-th image, the first one included, or all others."""
        places = [i for i in range(len(self)) if (i % count == 0) != others]
        return Captioned(self.folder, [self.names[i] for i in places], [self.captions[i] for i in places])


def open_captions(
    root: str, train: str, held_out: str, *, column: str, skip: bool, hold_out: int
) -> tuple[Captioned, Captioned, list[str]]:
    """Images to train on, held-out images, and what a person should know.

    Args:
        root: folder of images, or of the folders `train` and `held_out`.
        column: of the metadata, where the captions are. skip: leave images without a caption out instead of raising.
        hold_out: without a folder `held_out` every so many-th image is held out; 0: all serve for both.
    Raises:
        ValueError: no folder or image, metadata that cannot be read or name no such image, a caption that is missing.
    """
    notes: list[str] = []
    first, second = split_folders(root, train, held_out)
    found = _read(first, column, skip, notes)
    if second is not None:
        return found, _read(second, column, skip, notes), notes
    if not hold_out:
        return found, found, notes
    rest = found.every(hold_out, others=True)
    if not len(rest):
        raise ValueError(f"text.hold_out: every {hold_out}-th of {len(found)} images leaves none to train on")
    return rest, found.every(hold_out), notes


def _read(folder: Path, column: str, skip: bool, notes: list[str]) -> Captioned:
    names = find_pictures(folder)
    captions = dict(_metadata(folder, column))
    if absent := sorted(captions.keys() - set(names)):
        _missing(f"metadata of {folder} name {len(absent)} images that are not there", absent, skip, notes)
    unread: dict[str, str] = {}
    for name in names:
        beside = (folder / name).with_suffix(".txt")
        if name not in captions and beside.is_file():
            try:
                captions[name] = _text(beside)
            except ValueError as error:
                unread[name] = str(error)
    without = [name for name in names if name not in unread and not captions.get(name, "").strip()]
    skip = skip and len(unread) + len(without) < len(names)
    if unread:
        message = f"{len(unread)} of {len(names)} captions in {folder} cannot be read"
        _missing(message, list(unread.values()), skip, notes)
    if without:
        _missing(f"{len(without)} of {len(names)} images in {folder} have no caption", without, skip, notes)
    kept = [name for name in names if captions.get(name, "").strip()]
    return Captioned(folder, kept, [captions[name].strip() for name in kept])


def _missing(message: str, names: Sequence[str], skip: bool, notes: list[str]) -> None:
    message = f"{message}, first {names[0]}"
    if not skip:
        raise ValueError(f"data: {message}; text.missing=skip leaves them out")
    notes.append(f"skipped: {message}")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def _metadata(folder: Path, column: str) -> Iterable[tuple[str, str]]:
    """Names relative to `folder`, and captions."""
    for inside, files in walk(folder):
        for file in sorted({"metadata.csv", "metadata.jsonl"}.intersection(files)):
            path = folder / inside / file
            try:
                for name, caption in _rows(path, column):
                    yield (inside / name).as_posix(), caption
            except ValueError as error:
                raise ValueError(f"data: cannot read captions: {error}") from None


def _rows(path: Path, column: str) -> Iterable[tuple[str, str]]:
    """Names and captions of a file of metadata. Raises: ValueError: with file, line and reason."""
    read = _json_lines if path.suffix == ".jsonl" else _csv_rows
    for number, row in read(path, _text(path)):
        where = f"{path}, line {number}"
        for name in ("file_name", column):
            if not isinstance(row.get(name, ""), str):
                raise ValueError(f"{where}: {name!r} is not text")
            if name not in row:
                raise ValueError(f"{where}: no column {name!r}; it has {', '.join(map(str, row))}")
            if any("\ud800" <= letter <= "\udfff" for letter in row[name]):
                raise ValueError(f"{where}: {name!r} has half of a surrogate pair, which is no text")
        yield row["file_name"], row[column]


def _json_lines(path: Path, text: str) -> Iterable[tuple[int, Mapping[str, Any]]]:
    # not `splitlines`, which also ends lines at characters that may stand in a JSON string
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {line[:40]!r}")
        yield number, row


def _csv_rows(path: Path, text: str) -> Iterable[tuple[int, Mapping[str, Any]]]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in rows:
            # a line shorter than the header has None there: no caption
            yield rows.line_num, {name: value or "" for name, value in row.items() if name is not None}
    except csv.Error as error:  # such as a quotation that never ends
        raise ValueError(f"{path}, line {rows.line_num}: not CSV: {error}") from None
