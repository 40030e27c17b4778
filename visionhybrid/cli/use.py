"""`visionhybrid classify` and `restore`: trained models at use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from visionhybrid.cli import show
from visionhybrid.cli.app import (
    Device,
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
    pick_device,
)


@command(
    "  visionhybrid classify cat.jpg dog.png --model nextvit_small_in1k_224.pth\n"
    "  visionhybrid classify photos/ --model vh_nextvit_small.bd_in1k --topk 3\n"
    "  visionhybrid classify scans/ --model runs/mine --labels names.txt --json > answers.json"
)
def classify(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")],
    model: Model,
    weights: Weights = "",
    topk: Annotated[int, typer.Option("--topk", "-k", min=1, help="Classes shown for each image.")] = 5,
    labels: Annotated[
        Path | None, typer.Option("--labels", help="Class names, one a line, or a JSON list.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images computed at once.")] = 32,
    key: Key = "",
    option: Options = None,
    device: Device = "",
    progress: Progress = True,
    json: Json = False,
) -> int:
    """The most probable classes of images. A broken image is reported, skipped, and makes the exit status 1."""
    from visionhybrid.infer.classification import classify as run
    from visionhybrid.infer.classification import find_images, read_labels

    files = find_images(images)
    names = read_labels(labels) if labels else None
    where = pick_device(device)
    net = open_model(model, weights, key, option)
    found = run(net, files, topk, names, batch_size=batch_size, device=where, progress=progress)
    if json:
        show.as_json(found)
    else:
        for p in found:
            if not p.error:
                typer.echo(p.source)
                for guess in p.guesses:
                    typer.echo(f"  {100 * guess.probability:6.2f} %  {guess.label}")
    broken = [p for p in found if p.error]
    for p in broken:
        fail(f"error: {p.source}: {p.error}")
    return 1 if broken else 0


@command(
    "  visionhybrid restore photo.jpg photo_x4.png --model HAT_SRx4.pth\n"
    "  visionhybrid restore photos/ restored/ --model HAT_SRx4.pth --tile 256 --suffix _x4\n"
    "  visionhybrid restore photos/ restored/ --model vh_hat_small_x2 --weights HAT-S_SRx2.pth --recursive"
)
def restore(
    source: Annotated[str, typer.Argument(metavar="IN", help="An image file, or a folder of them.")],
    target: Annotated[
        str, typer.Argument(metavar="OUT", help="A file; a folder (ends in / if new) for several.")
    ],
    model: Model,
    weights: Weights = "",
    tile: Annotated[
        int, typer.Option("--tile", min=0, help="Side of the tiles in input pixels; 0: as memory allows.")
    ] = 0,
    overlap: Annotated[int | None, typer.Option("--overlap", min=0, help="Pixels that tiles share.")] = None,
    suffix: Annotated[
        str, typer.Option("--suffix", help="Put after the names of files in a folder, such as _x4.")
    ] = "",
    format: Annotated[
        str, typer.Option("--format", help="png, jpeg, webp or tiff; default: as the source.")
    ] = "",
    quality: Annotated[int | None, typer.Option("--quality", help="Of JPEG and WebP, 1 to 100.")] = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Also the folders below IN.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="Mean over eight flips and turns: 8 times the work.")
    ] = False,
    half: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    key: Key = "",
    option: Options = None,
    device: Device = "",
    progress: Progress = True,
) -> int:
    """Restore (enlarge, denoise, ...) an image or a folder. Alpha, 16 bits, EXIF and ICC profiles are kept.

    A broken file is reported, skipped, and makes the exit status 1.
    """
    import torch

    from visionhybrid.infer.restoration import restore_path

    where = pick_device(device)
    net = open_model(model, weights, key, option)
    if not hasattr(net, "scale"):
        raise UsageError(
            f"--model {model} is a {type(net).__name__}, not a restorer; see `visionhybrid list --task restoration`"
        )
    report = restore_path(
        net,
        source,
        target,
        tile=tile or None,
        overlap=overlap,
        suffix=suffix,
        format=format or None,
        quality=quality,
        recursive=recursive,
        overwrite=overwrite,
        self_ensemble=ensemble,
        device=where,
        dtype=torch.bfloat16 if half else None,
        progress=progress,
    )
    for done in report.done:
        notes = f"  ({'; '.join(done.notes)})" if done.notes else ""
        typer.echo(f"{done.target}  {done.size[0]} x {done.size[1]}  {done.seconds:.1f} s{notes}")
    for path, reason in report.skipped:
        fail(f"skipped: {path}: {reason}")
    for path, reason in report.failed:
        fail(f"error: {path}: {reason}")
    return 0 if report.ok else 1
