"""A file or a folder of files through a restorer, unattended."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from visionhybrid.data.images import (
    READ_SUFFIXES,
    SUFFIXES,
    ImageError,
    format_of,
    image_size,
    misfit,
    read_image,
    write_image,
)
from visionhybrid.infer.engine import Engine
from visionhybrid.infer.progress import bar
from visionhybrid.infer.tiles import out_of_memory

_EXTENSIONS = {"png": ".png", "jpeg": ".jpg", "jpg": ".jpg", "webp": ".webp", "tiff": ".tif", "tif": ".tif"}
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # the next file would fare no better


@dataclass(frozen=True)
class Done:
    """One restored file. size: (width, height) of the result; notes: what a person may want to know."""

    source: Path
    target: Path
    size: tuple[int, int]
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `restore_path` did. failed and skipped hold (source, reason in one line)."""

    done: tuple[Done, ...] = ()
    failed: tuple[tuple[Path, str], ...] = ()
    skipped: tuple[tuple[Path, str], ...] = ()

    @property
    def ok(self) -> bool:
        """Nothing failed. (A target that was already there counts as skipped, not failed.)"""
        return not self.failed


def restore_path(
    model: nn.Module,
    source: str | Path,
    target: str | Path,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    suffix: str = "",
    format: str | None = None,
    quality: int | None = None,
    recursive: bool = False,
    overwrite: bool = False,
    self_ensemble: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    on_error: str = "skip",
) -> Report:
    """Restore the image file `source`, or every image in the folder `source`, into `target`.

    A file goes to the file `target`, or into it if it is a folder or ends in a slash. A folder goes to a folder, made if
    it is not there; hidden files and files without an image's suffix are passed over. Each result is written under
    a temporary name and renamed, so that whatever stops the run (Ctrl-C, kill, a full disk), only whole files bear
    their name.

    Args:
        tile, overlap, self_ensemble, device, dtype: as in `restore`.
        suffix: put after the name of files that go into a folder: "_x4" turns cat.png into cat_x4.png.
        format: "png", "jpeg", "webp" or "tiff" for files that go into a folder; None keeps each file's own (PNG for those
            that are only read, such as BMP). A single target's own suffix decides.
        quality: 1 to 100, of JPEG (default 95) and WebP (default: lossless).
        recursive: also the folders below, in the same tree under `target`.
        overwrite: replace files that exist. Otherwise a single target that exists is an error, and a folder's run skips
            those that exist: an interrupted run goes on where it stopped.
        progress: show a bar with the time left, by pixels, on a terminal.
        on_error: "skip" reports a file that cannot be read, restored or written and goes on; "raise" raises its error.
            A full or read-only disk ends the run: what was not reached is then in `skipped`.
    Returns: the Report. `report.ok` is False if a file failed: a command should then exit with a non-zero status.
    Raises: ValueError, before anything is computed: no such source, no image in it, source and target are the same, two
        sources with one target, an empty name, unknown format, a single target that exists, or not a restorer. KeyboardInterrupt is
        passed on, no half file left.
    """
    if on_error not in ("skip", "raise"):
        raise ValueError(f"on_error: 'skip' or 'raise', got {on_error!r}")
    if format is not None and format.lower().lstrip(".") not in _EXTENSIONS:
        raise ValueError(f"no format {format!r} to write; have png, jpeg, webp, tiff")
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"quality goes from 1 to 100, got {quality}")
    if any(separator in suffix for separator in "/\\"):
        raise ValueError(f"suffix is put after a name and names no folder, got {suffix!r}")
    if not (str(source) and str(target)):
        raise ValueError("source and target are paths, one of them is empty")
    extension = None if format is None else _EXTENSIONS[format.lower().lstrip(".")]
    engine = Engine(
        model, tile=tile, overlap=overlap, device=device, dtype=dtype, self_ensemble=self_ensemble
    )
    jobs = _plan(Path(source), Path(target), str(target), suffix, extension, recursive)
    _check(jobs)
    skipped = []
    if not overwrite:
        skipped = [(a, f"{b} exists already") for a, b in jobs if b.exists()]
        if skipped and not Path(source).is_dir():
            raise ValueError(f"{skipped[0][1]}; overwrite it with overwrite=True (--overwrite)")
        jobs = [(a, b) for a, b in jobs if not b.exists()]
    return _work(engine, jobs, skipped, quality, progress, on_error)


def _plan(
    source: Path, target: Path, given: str, suffix: str, extension: str | None, recursive: bool
) -> list[tuple[Path, Path]]:
    """(source file, target file) pairs, in the order of names."""
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")

    def name(path: Path) -> str:
        own = path.suffix if path.suffix.lower() in SUFFIXES else ".png"
        return path.stem + suffix + (extension or own)

    if not source.is_dir():
        if target.is_dir() or given.endswith(("/", os.sep)):
            return [(source, target / name(source))]
        if not target.suffix:
            raise ValueError(
                f"{target}: give it the suffix of an image format, or end it in a slash for a folder"
            )
        if extension and SUFFIXES[extension] != format_of(target):
            raise ValueError(
                f"{target}: its suffix is not that of the format asked for, {SUFFIXES[extension]}"
            )
        format_of(target)
        return [(source, target)]
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: is a file; a folder is restored into a folder")
    if target.suffix.lower() in SUFFIXES and not target.exists() and not given.endswith(("/", os.sep)):
        raise ValueError(f"{target}: named like a file; end it in a slash if the folder shall be called so")
    if source.resolve() == target.resolve():
        raise ValueError(f"{target}: source and target are the same folder")
    inside = target.resolve()
    files = []
    for path in sorted(source.rglob("*") if recursive else source.iterdir()):
        parts = path.relative_to(source).parts
        hidden = any(part.startswith(".") for part in parts)
        result = inside in path.resolve().parents  # a target inside the source
        if path.suffix.lower() in READ_SUFFIXES and not (hidden or result or path.is_dir()):
            files.append((path, target.joinpath(*parts[:-1], name(path))))
    if not files:
        raise ValueError(
            f"{source}: no images in this folder{'' if recursive else ' (folders below it need --recursive)'}"
        )
    return files


def _check(jobs: list[tuple[Path, Path]]) -> None:
    taken: dict[Path, Path] = {}
    for source, target in jobs:
        if other := taken.get(target):
            raise ValueError(
                f"{other} and {source} would both become {target}; rename one or restore them apart"
            )
        taken[target] = source
    originals = {source.resolve() for source, _ in jobs}
    for target in taken:
        if target.resolve() in originals:
            raise ValueError(f"{target}: this would replace a source image; choose another name or folder")


def _work(engine: Engine, jobs, skipped, quality, progress: bool, on_error: str) -> Report:
    done: list[Done] = []
    failed: list[tuple[Path, str]] = []
    pixels = [_pixels(source) for source, _ in jobs]
    total = sum(pixels) or 1
    with bar(progress, "restoring") as update:
        for i, (source, target) in enumerate(jobs):
            before = sum(pixels[:i]) / total
            text = f"{source.name} ({i + 1} of {len(jobs)})"
            update(before, text)
            try:
                share = pixels[i] / total
                one = _one(
                    engine,
                    source,
                    target,
                    quality,
                    lambda part, b=before, s=share, t=text: update(b + part * s, t),
                )
                done.append(one)
            except (ValueError, MemoryError, RuntimeError) as error:
                if on_error == "raise" or (isinstance(error, RuntimeError) and not out_of_memory(error)):
                    raise
                failed.append((source, _reason(error, source)))
                if isinstance(error.__cause__, OSError) and error.__cause__.errno in _DISK:
                    skipped = skipped + [
                        (path, "not reached: the disk cannot be written") for path, _ in jobs[i + 1 :]
                    ]
                    break
    return Report(tuple(done), tuple(failed), tuple(skipped))


def _pixels(path: Path) -> int:
    try:
        width, height = image_size(path)
    except ImageError:
        return 0
    return width * height


def _one(engine: Engine, source: Path, target: Path, quality: int | None, advance) -> Done:
    start = time.monotonic()
    picture = read_image(source)
    format, (width, height) = format_of(target), picture.size
    size = (width * engine.scale, height * engine.scale)
    if reason := misfit(format, size, picture.alpha is not None):
        raise ImageError(target, reason)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(target, f"its folder cannot be made: {error.strerror}") from error
    write_image(target, engine.picture(picture, advance), format=format, quality=quality)
    rounded = ("16 bits rounded to 8",) if picture.bits == 16 and format in ("JPEG", "WEBP") else ()
    return Done(source, target, size, time.monotonic() - start, picture.notes + rounded)


def _reason(error: BaseException, source: Path) -> str:
    if isinstance(error, ImageError):
        return error.reason if error.path == source else str(error)
    return (
        "out of memory"
        if isinstance(error, RuntimeError)
        else " ".join(str(error).split()) or "out of memory"
    )
