"""Generated images as files: image `number` of a class always comes from the same noise, whatever else is drawn beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from visionhybrid.data.images import atomic
from visionhybrid.data.seeds import mix
from visionhybrid.diffusion.pipeline import HybridDiTPipeline


def open_pipeline(path: str | Path) -> HybridDiTPipeline:
    """The pipeline in a run directory or a diffusers folder.

    Raises:
        ValueError: none there.
    """
    path = Path(path)
    for folder in (path / "pipeline", path):
        if (folder / "model_index.json").is_file():
            return HybridDiTPipeline.from_pretrained(folder, use_safetensors=True)
    raise ValueError(f"{path}: no pipeline; expected model_index.json there or in its folder pipeline/")


def draw_files(
    pipe: HybridDiTPipeline,
    out: str | Path,
    labels: Sequence[str | int] | None = None,
    *,
    each: int = 1,
    seed: int = 0,
    steps: int = 50,
    guidance: float = 1.0,
    batch_size: int = 32,
) -> Iterator[list[Path]]:
    """Write OUT/CLASS/NUMBER.png; files that exist stay as they are. Yields the paths of each batch, old ones first.

    Args:
        labels: names or numbers; None: all classes. An unconditional model has one folder, "all".
        each: images of a class. seed: another one gives other images. steps, guidance: see the pipeline.
    Raises:
        ValueError: an unknown class.
    """
    out, names = Path(out), list(pipe.config.labels)
    count = pipe.transformer.config.num_classes
    ids = pipe.label_ids(labels) if labels is not None else list(range(count))
    folders = [names[i] if names else str(i) for i in ids] or ["all"]
    jobs = [
        (label, mix(seed, "image", label or 0, number), out / folder.replace("/", "_") / f"{number:05d}.png")
        for label, folder in zip(ids or [None], folders, strict=True)
        for number in range(each)
    ]
    if old := [path for _, _, path in jobs if path.is_file()]:
        yield old
    new = [job for job in jobs if not job[2].is_file()]
    pipe.set_progress_bar_config(disable=True)
    for first in range(0, len(new), batch_size):
        part = new[first : first + batch_size]
        images = pipe(
            [label for label, _, _ in part] if count else None,  # pyright: ignore[reportArgumentType]
            num_images=len(part),
            generator=[torch.Generator().manual_seed(number) for _, number, _ in part],
            num_inference_steps=steps,
            guidance_scale=guidance,
        ).images
        for image, (_, _, path) in zip(images, part, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as file:
                image.save(file, format="PNG")
        yield [path for _, _, path in part]


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
    """RGB images in rows of so many columns, each `side` pixels or the largest's size if that is more; `names` go before the rows."""
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
