"""Cut large pictures into overlapping crops once, so that training reads small files."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from visionhybrid.data.errors import CorruptSample
from visionhybrid.data.images import ImageError, encode_image, read_image
from visionhybrid.data.scan import find_pictures


class Extracted(NamedTuple):
    """What `extract_subimages` did: crops written, and pictures left out with the reason."""

    crops: int
    skipped: list[CorruptSample]


def extract_subimages(
    source: str | Path,
    target: str | Path,
    *,
    crop: int = 480,
    step: int = 240,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Extracted:
    """Write crops of every picture below `source` to the new folder `target`: 0801_s001.png, 0801_s002.png, ...

    The last crop of a row or column is flush with the border. The defaults are those of the DF2K ground truth; for its
    x4 partners use crop 120, step 60. An ending x2, x3, x4 or x8 of a name is dropped, so that names of both sides agree. Crops
    are PNG with the bit depth of their picture. The folder appears under its name when it is complete.

    Args:
        workers: threads. progress: called with (pictures done, pictures).
    Raises: ValueError: no pictures in `source`, `target` exists, or two pictures would get the same names.
    """
    if min(crop, step, workers) < 1:
        raise ValueError(
            f"extract_subimages: crop, step and workers must be at least 1, got {crop}, {step}, {workers}"
        )
    source, target = Path(source), Path(target)
    files = find_pictures(source)
    if target.exists():
        raise ValueError(f"{target}: exists already")
    stems = [re.sub(r"x[2348]$", "", Path(name).stem) for name in files]
    stem, count = Counter(stems).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{source}: more than one picture is called {stem}")
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was interrupted
    aside.mkdir(parents=True)

    def cut(name: str, stem: str) -> int | CorruptSample:
        try:
            picture = read_image(source / name)
        except ImageError as error:
            return CorruptSample(source / name, error.reason)
        width, height = picture.size
        if min(width, height) < crop:
            return CorruptSample(source / name, f"{width}x{height} is smaller than the crop, {crop}")
        places = [(top, left) for top in _starts(height, crop, step) for left in _starts(width, crop, step)]
        for number, (top, left) in enumerate(places, 1):
            piece = picture.pixels[:, top : top + crop, left : left + crop]
            data = encode_image(replace(picture, pixels=piece, alpha=None, exif=None), format="PNG")
            (aside / f"{stem}_s{number:03d}.png").write_bytes(data)
        return len(places)

    crops, skipped = 0, []
    with ThreadPoolExecutor(workers) as pool:
        for done, result in enumerate(pool.map(cut, files, stems), 1):
            if isinstance(result, CorruptSample):
                skipped.append(result)
            else:
                crops += result
            if progress:
                progress(done, len(files))
    os.replace(aside, target)
    return Extracted(crops, skipped)


def _starts(length: int, crop: int, step: int) -> list[int]:
    starts = list(range(0, length - crop + 1, step))
    return starts if starts[-1] == length - crop else [*starts, length - crop]
