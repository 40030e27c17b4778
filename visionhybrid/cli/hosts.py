"""`visionhybrid describe` and `attach`: mixers in the pipelines of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from visionhybrid.cli import show
from visionhybrid.cli.app import Json, Options, UsageError, command, parse_option

Pipeline = Annotated[
    str, typer.Argument(metavar="PIPELINE", help="A folder of a diffusers pipeline, or its name on the hub.")
]
Size = Annotated[
    str,
    typer.Option(
        "--size", metavar="HxW", help="Latents to count tokens at, TxHxW for video; default: the model's."
    ),
]


@command(
    "  visionhybrid describe stable-diffusion-v1-5/\n"
    "  visionhybrid describe stable-diffusion-v1-5/ --size 256x256\n"
    "  visionhybrid describe Wan2.1-T2V-1.3B-Diffusers/ --size 21x60x104 --json"
)
def describe(pipeline: Pipeline, size: Size = "", json: Json = False) -> None:
    """The attention of a pipeline, what each mixer could replace, what that saves, and from how many tokens on it does."""
    import visionhybrid
    from visionhybrid.diffusion.denoisers import open_any
    from visionhybrid.hosts import choices

    pipe, sides = open_any(pipeline), _sides(size)
    report = visionhybrid.describe(pipe, sample_size=sides)
    found = choices(pipe, sample_size=sides)
    if json:
        show.as_json({"model": report.model, "attention": report.rows, "choices": found})
        return
    typer.echo(f"{report}\n")
    rows = [
        (
            choice.mixer,
            choice.layers,
            "" if choice.speedup is None else f"{choice.speedup:.2f} x",
            choice.crossover or "",
            "none" if choice.training_free else "needed",
            choice.purpose if choice.layers else choice.reason,
        )
        for choice in found
    ]
    columns = (
        "mixer",
        "fits",
        "fewer products",
        "from tokens",
        "training",
        "what it does, or why it does not fit",
    )
    show.table(columns, rows, right=columns[1:4])


@command(
    "  visionhybrid attach stable-diffusion-v1-5/ linfusion --weights LinFusion-1-5/ --out sd15-linfusion\n"
    "  visionhybrid attach FLUX.1-dev/ clear -o radius=16 --layers 'transformer_blocks.*' --out flux-clear\n"
    "  visionhybrid attach SDXL/ neighborhood --layers 'tokens > 1024' -o kernel_size=15 --dtype float16 --out local"
)
def attach(
    pipeline: Pipeline,
    mixer: Annotated[str, typer.Argument(metavar="MIXER", help="A name that `visionhybrid describe` lists.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the pipeline with its mixers.")],
    weights: Annotated[
        str, typer.Option("--weights", "-w", help="Published weights: a folder, file, or name on the hub.")
    ] = "",
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layers", "-l", help="A name's beginning, pattern, or rule; repeatable; default: all."
        ),
    ] = None,
    options: Options = None,
    size: Size = "",
    dtype: Annotated[str, typer.Option("--dtype", help="Of the weights that are written.")] = "float32",
) -> None:
    """Put a mixer into a pipeline and save that; `DiffusionPipeline.from_pretrained` opens the folder."""
    import torch

    import visionhybrid
    from visionhybrid.diffusion.denoisers import open_any

    if dtype not in ("float32", "float16", "bfloat16"):
        raise UsageError(f"--dtype is float32, float16 or bfloat16, got {dtype!r}")
    if out.exists():
        raise UsageError(f"--out {out} exists")
    given = dict(parse_option(word) for word in options or ())
    pipe = open_any(pipeline, dtype=getattr(torch, dtype))
    report = visionhybrid.attach(
        pipe, mixer, layers=layers or None, weights=weights or None, sample_size=_sides(size), **given
    )
    typer.echo(str(report))
    draft = out.with_name(f"{out.name}.part")
    pipe.save_pretrained(draft)
    draft.replace(out)
    typer.echo(f"pipeline: {out}")


def _sides(size: str) -> tuple[int, ...] | None:
    if not size:
        return None
    sides = size.lower().split("x")
    if len(sides) not in (2, 3) or not all(side.isdecimal() and int(side) for side in sides):
        raise UsageError(f"--size takes HxW or TxHxW, got {size!r}")
    return tuple(map(int, sides))
