"""Which pictures a folder holds, and which file of another folder belongs to each."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from visionhybrid.data.images import READ_SUFFIXES

# "0001_s001.png (480,480,3)", and LMDB lists with a compression level after that.
_LISTED = re.compile(r"(?P<name>.+?)\s*(\(\d+,\s*\d+(,\s*\d+)?\)(\s+\d+)?)?\s*")


def walk(root: str | Path) -> Iterator[tuple[PurePosixPath, list[str]]]:
    """Each folder below `root`, relative to it ("." first), and the names of its files; what is hidden is passed over.

    Links to folders are followed, each folder once. Raises: ValueError: no such folder, or one that cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")

    def refuse(error: OSError) -> None:  # else its pictures would be left out without a word
        raise ValueError(f"{error.filename}: the folder cannot be read: {error.strerror}")

    seen: set[str] = set()
    for folder, below, files in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        below[:] = [] if real in seen else sorted(name for name in below if not name.startswith("."))
        if real not in seen:
            seen.add(real)
            inside = PurePosixPath(Path(folder).relative_to(root).as_posix())
            yield inside, sorted(name for name in files if not name.startswith("."))


def find_pictures(root: str | Path) -> list[str]:
    """Image files below `root`, as sorted posix paths relative to it; hidden files and folders are passed over.

    Raises: ValueError: as `walk`, or no picture in it.
    """
    found = [
        (inside / name).as_posix()
        for inside, files in walk(root)
        for name in files
        if PurePosixPath(name).suffix.lower() in READ_SUFFIXES
    ]
    if not found:
        raise ValueError(
            f"{root}: no pictures in this folder (looked for {', '.join(sorted(READ_SUFFIXES))})"
        )
    return sorted(found)


def split_folders(root: str, train: str, held_out: str) -> tuple[Path, Path | None]:
    """The folders of a data set: that to train on, `root` itself where it has none, and the held-out one, if there is one.

    Raises: ValueError: no such root, or a held-out folder beside none to train on.
    """
    base = Path(root)
    if not root or not base.is_dir():
        raise ValueError(f"data.root: no such folder: {root or '(empty)'}")
    first = base / train if train and (base / train).is_dir() else base
    if not (held_out and (base / held_out).is_dir()):
        return first, None
    if first == base:
        raise ValueError(f"data.root: {base} has a folder {held_out!r} but none {train!r}")
    return first, base / held_out


def stamp_of(path: str | Path, place: int = 0) -> str:
    """A file (an image, or a container that has one at `place`) by name, size and time; "" if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{os.path.abspath(path)}:{place}:{found.st_size}:{found.st_mtime_ns}"


def read_list(path: str | Path) -> list[str]:
    """Names from a meta-info list: one relative path a line, a size in brackets after it is ignored.

    Raises: ValueError: no such file, or no names in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read the list of names: {error}") from error
    matches = [_LISTED.fullmatch(line.strip()) for line in lines if line.strip()]
    if not matches:
        raise ValueError(f"{path}: the list of names is empty")
    return [match["name"] for match in matches if match]


def select(root: str | Path, names: str | Path | None) -> list[str]:
    """The pictures below `root`, or those of them that the list in the file `names` names, in its order.

    Raises: ValueError: as `find_pictures` and `read_list`, or a listed picture is not there.
    """
    found = find_pictures(root)
    if names is None:
        return found
    listed, there = read_list(names), set(found)
    missing = [name for name in listed if name not in there]
    if missing:
        raise ValueError(
            f"{root}: {len(missing)} of {len(listed)} pictures of {names} are not there, first {missing[0]}"
        )
    return listed


def match_pairs(high: Sequence[str], low: Iterable[str], scale: int) -> list[tuple[str, str]]:
    """Each high-resolution name with its low-resolution partner, by folder and stem.

    The partner of `a/0801.png` is `a/0801.*`, else `a/0801x4.*`, `a/0801_x4.*` or `a/0801-x4.*` (for scale 4); that
    of `a/img_HR.png` also `a/img_LR.*`, `a/img_LR4.*`. Pictures of `low` without a partner are ignored.
    Raises: ValueError: a partner is missing or not unique.
    """
    by_stem: dict[str, list[str]] = {}
    for name in low:
        by_stem.setdefault(_without_suffix(name), []).append(name)
    pairs, alone = [], []
    for name in high:
        hit = next(
            (by_stem[stem] for stem in _partners(_without_suffix(name), scale) if stem in by_stem), None
        )
        if hit is None:
            alone.append(name)
        elif len(hit) > 1:
            raise ValueError(f"{name} has more than one low-resolution partner: {', '.join(hit)}")
        else:
            pairs.append((name, hit[0]))
    if alone:
        tried = ", ".join(_partners(_without_suffix(alone[0]), scale))
        raise ValueError(
            f"{len(alone)} of {len(high)} pictures have no low-resolution partner, first {alone[0]} (tried {tried})"
        )
    return pairs


def _without_suffix(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _partners(stem: str, scale: int) -> list[str]:
    stems = [stem, *(f"{stem}{sign}x{scale}" for sign in ("", "_", "-"))]
    if stem.endswith("HR"):
        stems += [f"{stem[:-2]}LR", f"{stem[:-2]}LR{scale}"]
    return stems
