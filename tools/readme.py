"""Write the tables of README.md from the registry: `python tools/readme.py`; `--check` fails if they are out of date.

What stands between `<!-- NAME -->` and `<!-- /NAME -->` is generated: do not edit it by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib import import_module
from pathlib import Path

import visionhybrid  # noqa: F401 - registers the models
from visionhybrid.kernels import OPERATORS
from visionhybrid.models.facts import facts
from visionhybrid.models.registry import SYSTEMS, list_models

README = Path(__file__).resolve().parent.parent / "README.md"


def models() -> str:
    """Every registered name, with its size and what it was made from."""
    rows = ["| model | task | parameters | multiply-adds | at | weights |", "|---|---|---|---|---|---|"]
    for name in list_models():
        f = facts(name)
        side = "x".join(map(str, f.input_size[1:]))
        task = f"{f.task}, x{f.scale}" if f.scale else f.task
        tags = ", ".join(f"`{tag}`" for tag in f.weights) or "train your own"
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


TABLES = {"models": models, "systems": systems, "kernels": kernels}


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
        "--check", action="store_true", help="change nothing; exit 1 if README.md is out of date"
    )
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    made = render(text)
    if check:
        return int(made != text)
    aside = README.with_suffix(".tmp")
    aside.write_text(made, encoding="utf-8")
    aside.replace(README)
    return 0


if __name__ == "__main__":
    sys.exit(main())
