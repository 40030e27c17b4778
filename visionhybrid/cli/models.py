"""`visionhybrid list`, `info`, `inspect`: what there is, and what a file holds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from visionhybrid.cli import show
from visionhybrid.cli.app import Json, Key, command, fail


@command(
    "  visionhybrid list\n"
    "  visionhybrid list --task restoration --filter '*_x4'\n"
    "  visionhybrid list --json | python -m json.tool"
)
def list_(
    task: Annotated[str, typer.Option("--task", help="classification or restoration.")] = "",
    filter: Annotated[str, typer.Option("--filter", help="A shell pattern.")] = "vh_*",
    json: Json = False,
) -> int:
    """The registered models: `timm.create_model` and every MODEL here take these names."""
    import timm

    import visionhybrid
    from visionhybrid.infer.progress import bar
    from visionhybrid.models import facts, registry

    names = visionhybrid.list_models(filter, task=task or None)
    rows: list[dict[str, Any]] = []
    with bar(not json, "counting") as update:
        for name in names:
            update(len(rows) / len(names), f"counting {name}")
            system = registry.SYSTEMS[registry.SYSTEM_OF[name]]
            model = timm.create_model(name, device="meta")
            rows.append(
                {
                    "name": name,
                    "task": system.task,
                    "system": system.name,
                    "scale": getattr(model, "scale", None) if system.task == "restoration" else None,
                    "parameters": facts.parameters(model),
                    "weights": [key for key in registry.WEIGHTS if key.partition(".")[0] == name],
                }
            )
    if json:
        show.as_json(rows)
    elif not rows:
        fail(f"no model matches {filter!r}")
    else:
        cells = [
            (
                r["name"],
                r["task"],
                f"x{r['scale']}" if r["scale"] else "",
                show.short(r["parameters"]),
                len(r["weights"]),
            )
            for r in rows
        ]
        show.table(
            ("name", "task", "scale", "parameters", "weights"),
            cells,
            right=("scale", "parameters", "weights"),
        )
    return 0 if rows else 1


@command("  visionhybrid info vh_nextvit_small\n  visionhybrid info vh_nextvit_small.bd_in1k_384 --json")
def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A registered name, perhaps with a tag.")],
    json: Json = False,
) -> None:
    """All we know of one model: source, size, cost, features, weights and what they are for."""
    from visionhybrid.models.facts import facts

    f = facts(model)
    if json:
        show.as_json(f)
        return
    show.fields(
        [
            ("model", f.name),
            ("purpose", f.purpose),
            ("task", f.task + (f", x{f.scale}" if f.scale else "")),
            ("system", f.system),
            ("paper", f.paper),
            ("source", f"{f.source} ({f.license})"),
            ("parameters", show.number(f.parameters)),
            ("multiply-adds", f"{show.short(f.macs)} at {show.size(f.input_size)}"),
            ("input", show.size(f.input_size)),
            ("output", show.size(f.output_size)),
            (
                "features",
                [f"{t['num_chs']} channels at 1/{t['reduction']}  ({t['module']})" for t in f.features],
            ),
            ("options", show.options(f.options)),
            ("tags", ", ".join(f.tags)),
            ("example", f.example),
        ]
    )
    for tag, weights in f.weights.items():
        typer.echo()
        published = ", ".join(f"{name} {value}" for name, value in weights["published"].items())
        where = [weights[place] for place in ("hub", "url") if place in weights]
        show.fields(
            [
                ("weights", tag),
                ("  for", weights["purpose"]),
                ("  licence", weights["license"]),
                ("  file", weights["file"]),
                ("  from", where),
                ("  published", published),
            ]
        )


@command(
    "  visionhybrid inspect HAT_SRx4.pth\n"
    "  visionhybrid inspect HAT_SRx4.pth --key params\n"
    "  visionhybrid inspect runs/nextvit_digits --json"
)
def inspect(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A file, run directory or timm hub folder.")
    ],
    key: Key = "",
    json: Json = False,
) -> int:
    """What a checkpoint holds: container, architecture, options, tensors. Exit status 1 if it cannot be loaded."""
    import visionhybrid

    found = visionhybrid.inspect(checkpoint, key=key or None)
    if json:
        show.as_json(found)
        return 1 if found.problem else 0
    show.fields(
        [
            ("file", f"{found.path} ({found.kind})"),
            ("container", found.container or "none, a bare state dict"),
            ("also there", [f"{name} (--key {name})" for name in found.alternatives]),
            ("not weights", ", ".join(found.other)),
            ("prefix", f"{found.prefix!r}, removed" if found.prefix else ""),
            ("system", found.system or "unknown"),
            ("task", f"{found.task}, x{found.scale}" if found.scale else found.task),
            ("names", ", ".join(found.names)),
            ("deployed", "yes, norms are folded" if found.deployed else ""),
            ("options", show.options(found.options)),
            ("tensors", f"{found.tensors}, {show.number(found.values)} numbers"),
            ("parameters", show.number(found.parameters) if found.parameters else ""),
            ("dtypes", ", ".join(f"{count} {name}" for name, count in found.dtypes.items())),
            ("NaN or infinity", [f"{count} in {name}" for name, count in list(found.nonfinite.items())[:8]]),
            ("keys", found.keys),
            (
                "metadata",
                [f"{name}: {_cut(value)}" for name, value in found.metadata.items() if name != "format"],
            ),
        ]
    )
    if found.problem:
        fail(f"error: {found.path}: {found.problem}")
    return 1 if found.problem else 0


def _cut(text: str, length: int = 100) -> str:
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"
