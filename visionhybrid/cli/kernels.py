"""`visionhybrid kernels`: which backend of each operator would run here, and why not another."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visionhybrid.cli import show
from visionhybrid.cli.app import Device, Json, UsageError, command, parse_option, pick_device

if TYPE_CHECKING:
    import torch

DTYPES = ("float16", "bfloat16", "float32", "float64")
# `dispatch.explain`'s words where there is no reason -> ours.
WORDS = {"chosen": "runs", "can run": "on request"}


def _alike(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys("qkv", shape)


def _scan(shape: tuple[int, ...], states: int = 16) -> dict[str, tuple[int, ...]]:
    batch, channels, length = shape
    return dict(u=shape, delta=shape, A=(channels, states)) | dict.fromkeys("BC", (batch, states, length))


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of an operator as models make it: the shape of its first tensor, which `tensors` turns into all of them."""

    axes: str
    shape: tuple[int, ...]
    tensors: Callable[[tuple[int, ...]], dict[str, tuple[int, ...]]] = _alike
    options: dict[str, Any] = field(default_factory=dict)


CALLS = {
    "linear_attention": Call(axes="B,heads,N,D", shape=(1, 8, 4096, 40)),
    "neighborhood_attention": Call(
        axes="B,heads,H,W,D", shape=(1, 2, 56, 56, 24), options={"kernel_size": 7}
    ),
    "selective_scan": Call(
        axes="B,channels,length", shape=(1, 96, 3136), tensors=_scan, options={"delta_softplus": True}
    ),
    "sparse_linear_attention": Call(axes="B,heads,N,D", shape=(1, 8, 4096, 64)),
    "window_attention": Call(axes="B,H,W,heads,D", shape=(1, 64, 64, 6, 30), options={"window_size": 16}),
}


@command(
    "  visionhybrid kernels\n"
    "  visionhybrid kernels linear_attention --shape 2,16,65536,128 --dtype bfloat16\n"
    "  visionhybrid kernels neighborhood_attention --shape 8,2,56,56,24 -o kernel_size=11 -o dilation=2\n"
    "  VISIONHYBRID_BACKEND=eager visionhybrid kernels --json"
)
def kernels_(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="One operator; default: a typical call of each.")
    ] = "",
    shape: Annotated[
        str,
        typer.Option(
            "--shape",
            metavar="SIZES",
            help="Of NAME's first tensor, such as 1,8,4096,64 for B,heads,N,D. Tensors of that size are allocated.",
        ),
    ] = "",
    dtype: Annotated[
        str, typer.Option("--dtype", help=f"{', '.join(DTYPES)}; default: float32 and bfloat16.")
    ] = "",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="NAME=VALUE",
            help="Keyword of NAME, such as kernel_size=11; repeatable.",
        ),
    ] = None,
    device: Device = "",
    json: Json = False,
) -> None:
    """What runs each operator on this machine, and why another backend would not.

    "runs": taken when nothing is named. "on request": taken with backend="..." only, as the float64 definition
    ("reference") always is. "no": cannot run the call, for the reason beside it.
    """
    from visionhybrid import kernels

    if name and name not in kernels.OPERATORS:
        raise UsageError(f"no operator {name!r}; have {', '.join(kernels.OPERATORS)}")
    if not name and (shape or option):
        raise UsageError("--shape and --option belong to one operator: name it")
    if dtype and dtype not in DTYPES:
        raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    where = pick_device(device)
    given = dict(parse_option(word) for word in option or ())
    found = []
    for op in [name] if name else kernels.OPERATORS:
        call = CALLS[op]
        sizes = _sizes(op, call, shape) if shape else call.shape
        options = {**call.options, **given}
        _check(op, call, options)
        reasons = {
            kind: kernels.why(op, **_tensors(call.tensors(sizes), kind, where), **options)
            for kind in ([dtype] if dtype else ["float32", "bfloat16"])
        }
        found.append({"operator": op, "shape": sizes, "options": options, "backends": reasons})
    if json:
        show.as_json({"machine": _machine(where), "calls": found})
    else:
        _print(found, where)


def _sizes(op: str, call: Call, text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(word) for word in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != len(call.shape) or min(sizes) < 1:
        example = ",".join(map(str, call.shape))
        raise UsageError(f"--shape of {op} is {call.axes}, such as {example}; got {text!r}")
    return sizes


def _check(op: str, call: Call, options: dict[str, Any]) -> None:
    """Words of the command line that are no keyword of the operator, or that it wants a tensor for."""
    from visionhybrid import kernels

    tensors = call.tensors(call.shape)
    known = [
        key
        for key, parameter in inspect.signature(kernels.operator(op)).parameters.items()
        if key not in (*tensors, "backend", "group") and "Tensor" not in str(parameter.annotation)
    ]
    for key in options:
        if key not in known:
            raise UsageError(f"{op} has no option {key!r} for this command; have {', '.join(known)}")


def _tensors(shapes: dict[str, tuple[int, ...]], kind: str, device: str) -> dict[str, torch.Tensor]:
    import torch

    return {key: torch.zeros(size, dtype=getattr(torch, kind), device=device) for key, size in shapes.items()}


def _machine(device: str) -> dict[str, str]:
    from importlib import metadata

    import torch

    from visionhybrid.kernels import dispatch

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "not installed"
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton,
        "VISIONHYBRID_BACKEND": dispatch.PREFERRED,
    }


def _print(found: list[dict[str, Any]], device: str) -> None:
    typer.echo(", ".join(f"{key} {value}" for key, value in _machine(device).items()))
    for call in found:
        kinds = list(call["backends"])
        options = "".join(f", {key}={value}" for key, value in call["options"].items())
        typer.echo(
            f"\n{call['operator']}  {show.size(call['shape'])} ({CALLS[call['operator']].axes}){options}"
        )
        rows = []
        for backend in reversed(call["backends"][kinds[0]]):
            said = [call["backends"][kind][backend] for kind in kinds]
            rows.append((backend, *(WORDS.get(word, "no") for word in said), _reasons(kinds, said)))
        show.table(("  backend", *kinds, "why not"), [("  " + row[0], *row[1:]) for row in rows])


def _reasons(kinds: list[str], said: list[str]) -> str:
    """Why not, once if it is the same for all types."""
    reasons = {kind: word for kind, word in zip(kinds, said, strict=True) if word not in WORDS}
    if len(set(reasons.values())) == 1 and len(reasons) == len(kinds):
        return said[0]
    return "; ".join(f"{kind}: {word}" for kind, word in reasons.items())
