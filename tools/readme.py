"""Write the tables of README.md and docs/ from the registries: `python tools/readme.py`; `--check` fails if they are out of date.

What stands between `<!-- NAME -->` and `<!-- /NAME -->` is generated: do not edit it by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib import import_module
from pathlib import Path

import visionhybrid  # noqa: F401 - registers the models
from visionhybrid import mixers
from visionhybrid.kernels import OPERATORS
from visionhybrid.models.facts import facts
from visionhybrid.models.registry import SYSTEMS, list_models

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "mixers.md")


def models() -> str:
    """Every registered name, with its size and what it was made from."""
    rows = [
        "| model | task | parameters | multiply-adds | at | tags of weights |",
        "|---|---|---|---|---|---|",
    ]
    for name in list_models():
        f = facts(name)
        side = "x".join(map(str, f.input_size[1:]))
        task = f"{f.task}, x{f.scale}" if f.scale else f.task
        tags = ", ".join(f"`{tag}`" for tag in f.weights) or "-"
        rows.append(
            f"| `{name}` | {task} | {f.parameters / 1e6:.1f} M | {f.macs / 1e9:.1f} G | {side} | {tags} |"
        )
    return "\n".join(rows)


def systems() -> str:
    """The published systems that `visionhybrid.load` recognises."""
    rows = ["| system | task | paper | code we match | its licence |", "|---|---|---|---|---|"]
    for name, s in sorted(SYSTEMS.items()):
        rows.append(f"| {name} | {s.task} | {s.paper} | {s.source} | {s.license} |")
    return "\n".join(rows)


def kernels() -> str:
    """Operators and the backends they have."""
    rows = ["| operator | backends |", "|---|---|"]
    for name in OPERATORS:
        module = import_module(f"visionhybrid.kernels.{name}")
        rows.append(f"| `{name}` | {', '.join(module.BACKENDS)} |")
    return "\n".join(rows)


def mixer_needs() -> str:
    """What each mixer is for, and what it needs of its host."""
    columns = (
        "mixer",
        "what it does",
        "grid",
        "text",
        "key masks",
        "parameters",
        "training",
        "paper",
        "code we match",
    )
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for about in map(mixers.about, mixers.list_mixers()):
        cells = (
            f"`{about.name}`",
            about.purpose,
            ", ".join(f"{n}-D" for n in about.grids) or "any",
            "yes" if about.text else "no",
            "yes" if about.masks else "no",
            "yes" if about.parameters else "-",
            "none" if about.training_free else "needed",
            about.paper,
            f"{about.source} ({about.license})" if about.source else "-",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def mixer_costs() -> str:
    """Multiplications of softmax attention over those of each mixer with its default options, at four sizes."""
    sides = (32, 64, 128, 256)
    shape = dict(dim=1536, heads=12, head_dim=128)
    heading = " | ".join(f"{side}x{side}" for side in sides)
    rows = [f"| mixer | {heading} | fewer from |", "|---" * (len(sides) + 2) + "|"]
    full = mixers.create("softmax", **shape)
    for name in mixers.list_mixers():
        if name == "softmax":
            continue
        mixer = mixers.create(name, **shape)
        gains = [full.cost(grid=(n, n)).macs / mixer.cost(grid=(n, n)).macs for n in sides]
        start = mixers.crossover(mixer)
        rows.append(f"| `{name}` | {' | '.join(f'{g:.1f}' for g in gains)} | {start:,} tokens |")
    return "\n".join(rows)


TABLES = {
    "models": models,
    "systems": systems,
    "kernels": kernels,
    "mixers": mixer_needs,
    "mixer costs": mixer_costs,
}


def render(text: str) -> str:
    """`text` with every marked part made anew."""
    for name, table in TABLES.items():
        part = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if part.search(text):
            made = table()
            text = part.sub(lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if a page is out of date"
    )
    check = parser.parse_args().check
    stale = [page for page in PAGES if render(text := page.read_text(encoding="utf-8")) != text]
    if check:
        return int(bool(stale))
    for page in stale:
        aside = page.with_suffix(".tmp")
        aside.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
        aside.replace(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
