"""What the parts of the demo share: a recipe is trained afresh in a folder of its own, and its log kept as series.

Nothing here knows a result in advance: a run's numbers are read from its own log.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from visionhybrid.train import find, override, run
from visionhybrid.train.config import Config

Series = list[tuple[float, float]]  # (step, value)

# Seconds instead of minutes: does everything run? What it learns then is nothing.
QUICK = (
    "loop.epochs=none",
    "loop.steps=4",
    "loop.log_every=1",
    "loop.validate_every=0",
    "loop.checkpoint_every=0",
)


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run: what was trained, and its log."""

    recipe: str
    command: str
    config: dict[str, Any]
    parameters: int
    steps: int
    seconds: float
    loss: Series
    held_out: dict[str, Series]  # metric -> series


def train(
    recipe: str, out: Path, *, seed: int, quick: bool, progress: bool, changes: Iterable[str] = ()
) -> tuple[Config, dict[str, Any]]:
    """Run `recipe` in `out`, where an earlier demo's run of it is replaced. Returns the config and what `train.run` returns."""
    config = override(find(recipe), [f"loop.seed={seed}", *changes, *(QUICK if quick else ())])
    clear(out, recipe)
    return config, run(config, out, progress=progress)


def clear(out: Path, recipe: str) -> None:
    """Remove an earlier run of the demo: a demo that continued a finished run would show old numbers as its own.

    Raises: ValueError: `out` is something else.
    """
    if not out.exists():
        return
    saved = [path for path in (out / "config.json", out / "alone" / "config.json") if path.is_file()]
    # the phases of a graft are runs of their own
    names = {json.loads(path.read_text(encoding="utf-8")).get("name") for path in saved}
    if not names & {recipe, f"{recipe}_alone"}:
        raise ValueError(f"demo: {out} exists and is no earlier run of {recipe}; choose another --out")
    shutil.rmtree(out)


def series(history: Iterable[Mapping[str, Any]], kind: str) -> dict[str, Series]:
    """The numbers in the lines of one kind ("train" or "validation") of a run's log, by name."""
    found: dict[str, Series] = {}
    for line in history:
        if line["kind"] == kind:
            for name, value in line.items():
                if isinstance(value, float):
                    found.setdefault(name, []).append((line["step"], value))
    return found


def record(config: Config, model: torch.nn.Module, result: Mapping[str, Any], command: str = "") -> Training:
    """`result` as `train.run` returns it; `command` that trains the same again, if it is not `visionhybrid train RECIPE`."""
    saved = Path(result["out"]) / "config.json"
    return Training(
        recipe=config.name,
        command=command or f"visionhybrid train {config.name}",
        config=json.loads(saved.read_text(encoding="utf-8")),
        parameters=sum(p.numel() for p in model.parameters()),
        steps=result["steps"],
        seconds=result["seconds"],
        loss=series(result["history"], "train")["loss"],
        held_out=series(result["history"], "validation"),
    )
