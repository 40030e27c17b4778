"""`visionhybrid graft`, `generate` and `evaluate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from visionhybrid.cli import show
from visionhybrid.cli.app import Device, Json, Progress, UsageError, command, open_model, pick_device
from visionhybrid.cli.training import Changes


@command(
    "  visionhybrid graft hybrid_dit_digits_linfusion teacher=runs/hybrid_dit_digits\n"
    "  visionhybrid graft hybrid_dit_digits_sla mixer_options.topk=0.5 budget=0.01 --out runs/sla\n"
    "  visionhybrid graft linfusion_sd15 model.pipeline=stable-diffusion-v1-5/stable-diffusion-v1-5 data.root=/data/laion\n"
    "  visionhybrid graft vit_small_in1k_linear model.options.pretrained=true data.root=/data/imagenet\n"
    "  accelerate launch -m visionhybrid.train linfusion_sd15 ...      (the same on every GPU)"
)
def graft(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A name, file.py:function, or a saved config.json.")
    ],
    changes: Changes = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the phases; default runs/RECIPE. What is there goes on."),
    ] = None,
    progress: Progress = True,
) -> None:
    """Put other mixers into a trained model and train them to imitate it; says what each layer costs and saves."""
    from visionhybrid.train import find, override
    from visionhybrid.train.grafting import graft as run

    config = override(find(recipe), changes or ())
    folder = out or Path("runs") / config.name
    report = run(config, folder, progress=progress)
    columns = ("layer", "mixer", "own error", "output error", "ms before", "ms after", "kept")
    show.table(
        columns,
        [
            (
                x.name,
                x.mixer,
                f"{x.error:.2g}",
                f"{x.output_error:.2g}",
                f"{1e3 * x.seconds_before:.2f}",
                f"{1e3 * x.seconds_after:.2f}",
                "yes" if x.kept else "no",
            )
            for x in report.layers
        ],
        right=columns[2:6],
    )
    for name, value in report.student.items():
        show.fields([(name, f"{value:.4g} (teacher {report.teacher.get(name, 0.0):.4g})")])
    typer.echo(f"report: {folder / 'report.md'}\npipeline: {report.weights}")


@command(
    "  visionhybrid generate runs/hybrid_dit_digits digits/ --each 100\n"
    "  visionhybrid generate runs/mine cats/ --label cat --label dog --each 8 --guidance 4 --grid cats.png\n"
    "  visionhybrid generate runs/sd15_cats cats/ --prompt 'a cat on a roof' --each 4 --guidance 7.5 --size 512"
)
def generate(
    pipeline: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory or a diffusers folder.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder; images go to OUT/CLASS_OR_PROMPT/NUMBER.png.")
    ],
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", help="A class, by name or number; default: all.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="What a text-to-image pipeline is to draw.")
    ] = None,
    each: Annotated[int, typer.Option("--each", "-n", min=1, help="Images of each class or prompt.")] = 1,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Calls of the model for an image.")] = 50,
    guidance: Annotated[float, typer.Option("--guidance", help="1: none.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Another one gives other images.")] = 0,
    size: Annotated[
        int | None, typer.Option("--size", min=1, help="Side in pixels; default: the pipeline's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images computed at once.")] = 32,
    grid: Annotated[Path | None, typer.Option("--grid", help="Also one picture of them all.")] = None,
    device: Device = "",
    progress: Progress = True,
) -> None:
    """Images of classes or prompts from a trained generator. Those that exist are kept, so the same command continues."""
    from visionhybrid.diffusion.drawing import draw_files, draw_grid, open_pipeline
    from visionhybrid.diffusion.pipeline import ClassPipeline
    from visionhybrid.infer.progress import bar

    pipe = open_pipeline(pipeline).to(pick_device(device))
    of_classes = isinstance(pipe, ClassPipeline)
    if prompt and of_classes:
        raise UsageError("--prompt: this pipeline draws classes (--label)")
    if not of_classes and (label or not prompt):
        raise UsageError("this pipeline draws prompts: give --prompt, not --label")
    wanted: list[str | int] | None = list(prompt) if prompt else None
    if label:
        known = set(pipe.config.labels)
        wanted = [x if x in known or not x.isdecimal() else int(x) for x in label]
    count = each * max(1, len(wanted or range(pipe.num_classes if of_classes else 0)))
    paths: list[Path] = []
    with bar(progress, "drawing") as update:
        for part in draw_files(
            pipe,
            out,
            wanted,
            each=each,
            seed=seed,
            steps=steps,
            guidance=guidance,
            size=size,
            batch_size=batch_size,
        ):
            paths += part
            update(len(paths) / count)
    typer.echo(f"{len(paths)} images in {out}")
    if grid is not None:
        draw_grid(sorted(paths), each, grid)
        typer.echo(f"grid: {grid}")


@command(
    "  visionhybrid evaluate photos/ generated/ --model vh_nextvit_small.bd_in1k\n"
    "  visionhybrid evaluate photos/ generated/ --inception pt_inception-2015-12-05-6726825d.pth\n"
    "  visionhybrid evaluate teacher/ student/ --model runs/nextvit_digits --paired\n"
    "  visionhybrid evaluate photos/ generated/ --clip clip-vit-large-patch14/ --prompts prompts.txt"
)
def evaluate(
    real: Annotated[Path, typer.Argument(metavar="REAL", help="Folder of images, searched recursively.")],
    generated: Annotated[Path, typer.Argument(metavar="GENERATED", help="Likewise.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Classifier whose features are compared: file, run or name.")
    ] = "",
    inception: Annotated[
        Path | None, typer.Option("--inception", help="File of Inception's FID weights: the published FID.")
    ] = None,
    clip: Annotated[
        Path | None, typer.Option("--clip", help="Folder of a CLIP model: the CLIP score.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="With --clip: one prompt a line, in the order of files.")
    ] = None,
    paired: Annotated[
        bool, typer.Option("--paired", help="Also distances between files of the same name.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images computed at once.")] = 32,
    device: Device = "",
    progress: Progress = True,
    json: Json = False,
) -> None:
    """How far generated images are from real ones: Frechet distance, precision, recall; CLIP score; distances of pairs."""
    from visionhybrid.data.scan import select
    from visionhybrid.infer import evaluation

    if not (model or inception or clip):
        raise UsageError("evaluate: name what to compare by: --model, --inception or --clip")
    if clip and not prompts:
        raise UsageError("--clip needs --prompts")
    folders, where = {"real": real, "generated": generated}, pick_device(device)
    names = {key: select(folder, None) for key, folder in folders.items()}
    files = {key: [folders[key] / name for name in names[key]] for key in folders}
    found: dict[str, Any] = {}
    extractors: dict[str, Any] = {}
    if model:
        extractors[""] = evaluation.Backbone(open_model(model), where)
    if inception:
        extractors["inception_"] = evaluation.Inception(inception, where)
    for prefix, extractor in extractors.items():
        a, b = (
            evaluation.features(extractor, files[key], batch_size=batch_size, progress=progress)
            for key in folders
        )
        found |= {f"{prefix}{key}": value for key, value in asdict(evaluation.compare(a, b)).items()}
        if paired:
            seen = evaluation.pairs(names["real"], names["generated"], a, b)
            found |= {f"{prefix}{key}": value for key, value in seen.items()}
    if clip and prompts:
        lines = prompts.read_text(encoding="utf-8").splitlines()
        found["clip_score"] = evaluation.clip_score(files["generated"], lines, clip)
    if json:
        show.as_json(found)
    else:
        show.fields(
            (key, f"{value:.4f}" if isinstance(value, float) else value) for key, value in found.items()
        )
