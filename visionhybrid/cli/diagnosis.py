"""`visionhybrid erf` and `profile`: what a network looks at, and where its time goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visionhybrid.cli import show
from visionhybrid.cli.app import (
    Device,
    Json,
    Key,
    Options,
    Progress,
    UsageError,
    Weights,
    command,
    open_model,
    parse_option,
    pick_device,
)

if TYPE_CHECKING:
    from torch import nn

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A checkpoint file or run directory, or a registered name.")
]


@command(
    "  visionhybrid erf vh_nextvit_small.bd_in1k val/n01440764 --limit 50\n"
    "  visionhybrid erf runs/mine photos/ --size 512 --out mine_erf.png\n"
    "  visionhybrid erf vh_ravlt_tiny photos/ --untrained --size 448"
)
def erf(
    model: ModelArgument,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The figure, a PNG file.")] = Path("erf.png"),
    size: Annotated[
        int,
        typer.Option("--size", min=32, help="Side to which images are stretched; papers take 1024."),
    ] = 1024,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Images taken at most.")] = 50,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Random weights: what the architecture alone can see.")
    ] = False,
    weights: Weights = "",
    key: Key = "",
    option: Options = None,
    device: Device = "",
    progress: Progress = True,
    json: Json = False,
) -> None:
    """The effective receptive field: which pixels the centre of the last feature map depends on, and how strongly.

    As in RepLKNet and A2Mamba: positive gradients, mean over images, log scale; and the side of the centred square that
    holds 20, 30, 50 and 99 % of it. At 1024 a small network takes several GiB and seconds an image on a CPU.
    """
    from visionhybrid.infer import figures
    from visionhybrid.infer.classification import find_images
    from visionhybrid.infer.receptive_field import receptive_field

    figures.require()
    files = find_images(images)[:limit]
    where = pick_device(device)
    net = _untrained(model, option) if untrained else open_model(model, weights, key, option)
    field = receptive_field(net, files, size=size, device=where, progress=progress)
    noun = "image" if field.images == 1 else "images"
    state = ", untrained" if untrained else ""
    figures.draw_receptive_field(
        field, out, title=f"{model}{state}, {field.images} {noun} of {size} x {size}"
    )
    if json:
        show.as_json(
            {
                "model": model,
                "untrained": untrained,
                "size": size,
                "images": field.images,
                "skipped": field.skipped,
                "sides": field.sides,
                "ratios": field.ratios,
                "figure": str(out),
            }
        )
        return
    rows = [(f"{t:.0%}", side, f"{100 * field.ratios[t]:.2f} %") for t, side in field.sides.items()]
    show.table(("contribution", "side", "area"), rows, right=("contribution", "side", "area"))
    if field.skipped:
        typer.echo(f"{field.skipped} of {len(files)} images left out: the gradient is not finite")
    typer.echo(f"figure: {out}")


@command(
    "  visionhybrid profile vh_ravlt_tiny --size 224\n"
    "  visionhybrid profile vh_nextvit_small --deploy --batch 8 --out nextvit.png\n"
    "  visionhybrid profile vh_a2mamba_tiny --size 512 --bf16 --json > profile.json"
)
def profile(
    model: ModelArgument,
    size: Annotated[
        int, typer.Option("--size", min=0, help="Side of the input; 0: the model's own, or 64.")
    ] = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at once.")] = 1,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed forward passes.")] = 5,
    deploy: Annotated[bool, typer.Option("--deploy", help="Fold norms first, as for inference.")] = False,
    half: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also draw a figure, a PNG file.", show_default=False)
    ] = None,
    key: Key = "",
    option: Options = None,
    device: Device = "",
    json: Json = False,
) -> None:
    """Parameters, multiply-adds, time and memory by block and by kind of operation, of one forward pass.

    A name is built with random weights; time does not depend on them. Memory: of a block the most that its tensors hold at
    once, of a kind all that its operators write.
    """
    import torch

    from visionhybrid.infer import figures, profiling

    if out is not None:
        figures.require()
    where = pick_device(device)
    net = (
        open_model(model, "", key, option) if Path(model).expanduser().exists() else _untrained(model, option)
    )
    if deploy:
        if not hasattr(net, "deploy"):
            raise UsageError(f"--deploy: {type(net).__name__} has nothing to fold")
        net.deploy()
    net = net.to(where, torch.bfloat16 if half else torch.float32)
    cfg: dict[str, Any] = getattr(net, "pretrained_cfg", None) or {}
    own = 64 if hasattr(net, "scale") else tuple(cfg.get("input_size", (3, 224, 224)))[1]
    shape = (batch, int(getattr(net, "in_chans", 3)), size or own, size or own)
    found = profiling.profile(net, shape, name=model + (", deployed" if deploy else ""), repeats=repeats)
    if out is not None:
        figures.draw_profile(found, out)
    if json:
        show.as_json(found)
        return
    typer.echo(
        f"{found.title}, {show.short(found.parameters)} parameters, {_mib(found.memory)} MiB at the peak"
    )
    for heading, rows, memory in (("block", found.blocks, "peak MiB"), ("kind", found.kinds, "written MiB")):
        typer.echo()
        columns = (heading, "parameters", "multiply-adds", "ms", "%", memory)
        show.table(columns, [_cells(row, found.seconds) for row in rows], right=columns[1:])
    if out is not None:
        typer.echo(f"\nfigure: {out}")


def _cells(row: Any, seconds: float) -> tuple[str, ...]:
    return (
        row.name,
        show.short(row.parameters) if row.parameters else "",
        show.short(row.macs) if row.macs else "",
        f"{1e3 * row.seconds:.2f}",
        f"{100 * row.seconds / seconds:.1f}",
        _mib(row.memory),
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


def _untrained(name: str, option: list[str] | None) -> nn.Module:
    """The registered model `name` with random weights, the same ones each time."""
    import timm
    import torch

    from visionhybrid.models import registry

    registry.require(name)
    torch.manual_seed(0)
    return timm.create_model(name, **dict(parse_option(word) for word in option or ())).eval()
