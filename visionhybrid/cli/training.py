"""`visionhybrid demo`, `train` and `validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from visionhybrid.cli import show
from visionhybrid.cli.app import (
    Json,
    Key,
    Model,
    Options,
    Progress,
    UsageError,
    Weights,
    command,
    fail,
    open_model,
)

Changes = Annotated[
    list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="Changes to the recipe.")
]


@command("  visionhybrid demo\n  visionhybrid demo --part generation --out /tmp/demo")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the report and the runs.")] = Path("demo"),
    part: Annotated[
        list[str] | None,
        typer.Option(
            "--part", help="digits, photographs or generation; several times for several; without: all."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Another one trains from other weights.")] = 0,
) -> None:
    """Train a classifier, a super-resolver and a generator on real images, here and now, and write a report of what was measured."""
    from visionhybrid.demo import run

    typer.echo(f"report: {run(out, parts=part or (), seed=seed)}")


@command(
    "  visionhybrid train --list\n"
    "  visionhybrid train nextvit_digits\n"
    "  visionhybrid train nextvit_small_in1k data.root=/data/imagenet optim.lr=3e-4 --dry-run\n"
    "  visionhybrid train my_recipes.py:tiny --out runs/tiny      (run it again to continue)\n"
    "  accelerate launch -m visionhybrid.train nextvit_small_in1k data.root=/data/imagenet"
)
def train(
    recipe: Annotated[
        str, typer.Argument(metavar="[RECIPE]", help="A name, file.py:function, or a saved config.json.")
    ] = "",
    changes: Changes = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run directory; default runs/RECIPE. A run there goes on.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="One step of every phase, a memory estimate, nothing kept.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Refuse to continue a run.")] = False,
    names: Annotated[bool, typer.Option("--list", help="Show the recipes and exit.")] = False,
    progress: Progress = True,
) -> None:
    """Train by a recipe. Stopped or killed, the same command continues bit for bit."""
    if names:
        _list()
        return
    if not recipe:
        raise UsageError("train: a recipe is needed; `visionhybrid train --list` shows them")
    config = _config(recipe, changes)
    from visionhybrid.train import run

    result = run(
        config, out or Path("runs") / config.name, dry_run=dry_run, resume=not fresh, progress=progress
    )
    _metrics(result.get("metrics", {}))
    if "weights" in result:
        typer.echo(f"weights: {result['weights']}")


@command(
    "  visionhybrid validate nextvit_small_in1k data.root=/data/imagenet --model nextvit_small_in1k_224.pth\n"
    "  visionhybrid validate hat_small_x2 --model runs/hat_small_x2 --limit 10\n"
    "  visionhybrid validate hybrid_dit_digits --model runs/hybrid_dit_digits"
)
def validate(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="Whose held-out data: a name, file.py:function, config.json."),
    ],
    model: Model,
    changes: Changes = None,
    weights: Weights = "",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="So many batches or pictures only.")
    ] = None,
    key: Key = "",
    option: Options = None,
    progress: Progress = True,
    json: Json = False,
) -> None:
    """Measure a model on the held-out data of a recipe."""
    config = _config(recipe, changes)
    from visionhybrid.train import validate as run
    from visionhybrid.train.config import Generation

    if isinstance(config, Generation):  # its own task opens a run directory or a diffusers folder
        if weights or key or option:
            raise UsageError(
                "validate: a generator is a folder; --weights, --key and --option are not for it"
            )
        metrics = run(model, config, limit=limit, progress=progress)
    else:
        metrics = run(open_model(model, weights, key, option), config, limit=limit, progress=progress)
    if json:
        show.as_json(metrics)
    else:
        _metrics(metrics)


def _config(recipe: str, changes: list[str] | None) -> Any:
    from visionhybrid.train.config import ConfigError, diff, override
    from visionhybrid.train.recipes import find

    try:
        base = find(recipe)
        config = override(base, changes or [])
    except ConfigError as error:
        raise UsageError(str(error)) from error
    for line in diff(config, base):
        fail(f"  {line}")
    return config


def _list() -> None:
    from visionhybrid.train.recipes import names

    rows = [(name, (recipe.__doc__ or "").strip().partition("\n")[0]) for name, recipe in names().items()]
    show.table(("recipe", "about"), rows)


def _metrics(metrics: dict[str, float]) -> None:
    if metrics:
        show.table(
            ("metric", "value"), [(name, f"{value:.4g}") for name, value in metrics.items()], right=("value",)
        )
