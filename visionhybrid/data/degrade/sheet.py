"""A sheet that shows what a degradation does: one row per seed, one column per step, the parameters under each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from visionhybrid.data.degrade.plan import Plan, Step, trace
from visionhybrid.data.degrade.recipes import Degradation
from visionhybrid.data.images import Picture, write_image
from visionhybrid.data.resize import modcrop

CELL, CAPTION, LINES = 200, 13, 6  # pixels: side of a cell, height of a line of text; lines under a cell


def preview(
    image: Tensor, degradation: Degradation, path: str | Path, *, seeds: Iterable[int] = range(4)
) -> list[Plan]:
    """Write the sheet of `degradation` on one image to `path` (.png, .jpg, .webp) and return the plans drawn.

    Args:
        image: (3, H, W) in [0, 1]; its middle is shown at most 200 pixels wide. Each cell is enlarged to the same
            size without smoothing, so pixels of the low-resolution steps can be seen.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"preview: expected (3, H, W), got {tuple(image.shape)}")
    image = modcrop(image.float(), degradation.scale)
    rows, plans = [], []
    for seed in seeds:
        plan = degradation.draw(seed, size=(image.shape[1], image.shape[2]))
        cells = [_cell(image, [f"seed {seed}"])]
        cells += [_cell(x[0], _caption(step)) for step, x in trace(image[None], plan)]
        rows.append(torch.cat(cells, 2))
        plans.append(plan)
    if not rows:
        raise ValueError("preview: needs at least one seed")
    # Plans differ in length: fill with white.
    width = max(row.shape[2] for row in rows)
    rows = [F.pad(row, (0, width - row.shape[2]), value=1.0) for row in rows]
    write_image(path, Picture(pixels=torch.cat(rows, 1)))
    return plans


def _cell(image: Tensor, text: list[str]) -> Tensor:
    """(3, CELL + text, CELL): the image's centre square, with lines of text below."""
    side = min(image.shape[1:])
    top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
    square = image[:, top : top + side, left : left + side].clamp(0, 1)
    shown = F.interpolate(square[None], (CELL - 4, CELL - 4), mode="nearest-exact")[0]
    shown = F.pad(shown, (2, 2, 2, 2), value=1.0)
    caption = Image.new("L", (CELL, CAPTION * LINES), 255)
    draw = ImageDraw.Draw(caption)
    for line, words in enumerate(text[:LINES]):
        draw.text((3, line * CAPTION), words, fill=0)
    ink = torch.frombuffer(bytearray(caption.tobytes()), dtype=torch.uint8).view(1, CAPTION * LINES, CELL)
    return torch.cat([shown, (ink / 255).expand(3, -1, -1)], 1)


def _caption(step: Step) -> list[str]:
    lines = [step.name]
    for name, value in step.params.items():
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        entries: dict[str, Any] = value if isinstance(value, dict) else {name: value}
        lines += [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in entries.items()]
    return lines
