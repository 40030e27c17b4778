"""Generated images as files: image `number` of a class always comes from the same noise, whatever else is drawn beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from visionhybrid.data.images import atomic
from visionhybrid.data.seeds import mix
from visionhybrid.diffusion.autoencoder import Autoencoder
from visionhybrid.diffusion.denoisers import FAMILIES, open_any
from visionhybrid.diffusion.new import MODELS
from visionhybrid.diffusion.pipeline import ClassPipeline


def open_pipeline(path: str | Path) -> Any:
    """The pipeline in a run directory or a diffusers folder: ours of classes, or one of diffusers that takes prompts.

    Raises:
        ValueError: none there, or one that takes neither.
    """
    for folder in (Path(path) / "pipeline", Path(path)):
        if (folder / "model_index.json").is_file():
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
            ours = {kind.__name__: kind for _, kind in MODELS.values()}.get(index.get("_class_name"))
            pipe = ours.from_pretrained(folder, use_safetensors=True) if ours else open_any(str(folder))
            call = signature(type(pipe).__call__).parameters
            if ours is None and ("prompt" not in call or "num_frames" in call):
                raise ValueError(f"{path}: {type(pipe).__name__} does not make pictures of prompts")
            return pipe
    raise ValueError(f"{path}: no pipeline; expected model_index.json there or in its folder pipeline/")


def draw_files(
    pipe: Any,
    out: str | Path,
    wanted: Sequence[str | int] | None = None,
    *,
    each: int = 1,
    seed: int = 0,
    steps: int = 50,
    guidance: float = 1.0,
    size: int | None = None,
    batch_size: int = 32,
) -> Iterator[list[Path]]:
    """Write OUT/CLASS/NUMBER.png or OUT/PROMPT/NUMBER.png; files that exist stay as they are.

    Yields the paths of each batch, those of files that were there first.

    Args:
        wanted: classes by name or number (None: all; an unconditional model has one folder, "all"), or prompts.
        each: images of a class or prompt. seed: another one gives other images. steps, guidance: see the pipeline.
        size: side of the images in pixels; None: what the pipeline makes by itself.
    Raises:
        ValueError: an unknown class, or no prompt.
    """
    draws = _of_classes if isinstance(pipe, ClassPipeline) else _of_prompts
    items, names, draw = draws(pipe, wanted, size)
    jobs = [
        (item, mix(seed, "image", item or 0, number), Path(out) / name / f"{number:05d}.png")
        for item, name in zip(items, names, strict=True)
        for number in range(each)
    ]
    if old := [path for _, _, path in jobs if path.is_file()]:
        yield old
    new = [job for job in jobs if not job[2].is_file()]
    pipe.set_progress_bar_config(disable=True)
    for first in range(0, len(new), batch_size):
        part = new[first : first + batch_size]
        images = draw(
            [item for item, _, _ in part],
            generator=[torch.Generator().manual_seed(number) for _, number, _ in part],
            num_inference_steps=steps,
            guidance_scale=guidance,
        ).images
        for image, (_, _, path) in zip(images, part, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as file:
                image.save(file, format="PNG")
        yield [path for _, _, path in part]


Draws = tuple[list[Any], list[str], Callable[..., Any]]  # what is drawn, its folders, and how


def _of_classes(pipe: ClassPipeline, labels: Sequence[str | int] | None, size: int | None) -> Draws:
    names, count = list(pipe.config.labels), pipe.num_classes
    ids = pipe.label_ids(labels) if labels is not None else list(range(count))
    folders = [names[i].replace("/", "_") if names else str(i) for i in ids] or ["all"]
    side = None
    if size is not None:
        factor = 1 if pipe.vae is None else Autoencoder(pipe.vae).factor
        if size % factor:
            raise ValueError(f"size: this pipeline makes multiples of {factor}, got {size}")
        side = size // factor

    def draw(part: list[Any], **call: Any) -> Any:
        classes = part if count else None
        return pipe(classes, num_images=len(part), height=side, width=side, **call)

    return ids or [None], folders, draw


def _of_prompts(pipe: Any, prompts: Sequence[str | int] | None, size: int | None) -> Draws:
    if not prompts:
        raise ValueError("this pipeline draws prompts: give at least one")
    family = FAMILIES.get(type(pipe).__name__)
    given = dict(family.call) if family else {}
    if size is not None:
        given |= {"height": size, "width": size}

    def draw(part: list[Any], **call: Any) -> Any:
        return pipe(prompt=part, **given, **call)

    return [str(prompt) for prompt in prompts], [folder_of(str(prompt)) for prompt in prompts], draw


def folder_of(prompt: str) -> str:
    """A name of a folder for the images of a prompt: its beginning, and a number that tells it from others."""
    words = re.sub(r"[^0-9A-Za-z]+", "-", prompt).strip("-")[:40]
    return f"{words}-{mix('prompt', prompt) % 16**6:06x}"


def draw_grid(paths: Sequence[Path], columns: int, out: str | Path) -> None:
    """The images of `paths` as one picture of so many columns."""
    tiles = []
    for path in paths:
        with Image.open(path) as image:
            tiles.append(image.convert("RGB"))
    with atomic(out) as file:
        sheet(tiles, columns).save(file, format="PNG")


def sheet(
    tiles: Sequence[Image.Image], columns: int, names: Sequence[str] = (), *, side: int = 64
) -> Image.Image:
    """RGB images in rows of so many columns; `names` go before the rows.

    Each is as large as the largest of them, at least `side` pixels.
    """
    margin = 64 if names else 0
    side = max([side, *(max(tile.size) for tile in tiles)])
    rows = -(-len(tiles) // columns)
    canvas = Image.new("RGB", (margin + columns * (side + 2), rows * (side + 2)), "white")
    for i, tile in enumerate(tiles):
        place = margin + i % columns * (side + 2), i // columns * (side + 2)
        canvas.paste(tile.resize((side, side), Image.Resampling.NEAREST), place)
    pen = ImageDraw.Draw(canvas)
    for row, name in enumerate(names):
        pen.text((2, row * (side + 2) + side // 2 - 6), name[:10], fill="black")
    return canvas
