"""The parser, the last door for errors, and the options that several subcommands share."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from visionhybrid._version import __version__

if TYPE_CHECKING:
    from torch import nn


class UsageError(ValueError):
    """Words of the command line that cannot be meant: exit status 2."""


class _State:
    """What the words before the subcommand said; each invocation sets it anew."""

    debug = False


_state = _State()


class Group(TyperGroup):
    """`--debug` counts wherever it stands; the first argument that is `--` ends that."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(word for word in args[:end] if word != "--debug"), *args[end:]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="\b\nExamples:\n"
    "  visionhybrid demo\n"
    "  visionhybrid list --task restoration\n"
    "  visionhybrid inspect HAT_SRx4.pth\n"
    "  visionhybrid restore photos/ restored/ --model HAT_SRx4.pth\n"
    "  visionhybrid train nextvit_digits optim.lr=3e-4\n"
    "  visionhybrid kernels\n"
    "\n`visionhybrid COMMAND --help` has more of each. Exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"visionhybrid {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (also after the command).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Hybrid attention for vision: inspect, run and train classifiers, image restorers and generators."""
    _state.debug = debug


def command(epilog: str) -> Callable[[Callable[..., int | None]], Callable[..., None]]:
    """Register a subcommand whose errors leave as one line. It returns its exit status (None: 0)."""

    def register(function: Callable[..., int | None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            raise typer.Exit(_guarded(lambda: function(*args, **kwargs)))

        app.command(
            function.__name__.removesuffix("_"), epilog="\b\nExamples:\n" + epilog, no_args_is_help=False
        )(run)
        return run

    return register


def _guarded(work: Callable[[], int | None]) -> int:
    debug = _state.debug
    try:
        return work() or 0
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt as stop:
        status, message = 130, str(stop) or "stopped"
    except BrokenPipeError:  # the reader, such as `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UsageError as error:
        if debug:
            raise
        status, message = 2, f"error: {_line(error)}"
    except (ValueError, OSError, MemoryError) as error:
        if debug:
            raise
        status, message = 1, f"error: {_line(error)}"
    except Exception as error:
        if debug:
            raise
        status, message = 1, f"error: {type(error).__name__}: {_line(error)} (--debug shows where)"
    typer.echo(message, err=True)
    return status


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="visionhybrid")


# ---- shared by subcommands

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="MODEL", help="A checkpoint file or run directory, or a registered name."
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        "--weights", "-w", metavar="FILE", help="With a name as --model: the checkpoint to load into it."
    ),
]
Key = Annotated[
    str, typer.Option("--key", help="Which weights of a file that holds several, such as 'params'.")
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="NAME=VALUE",
        help="What no shape shows, such as conv_scale=0.01; repeatable.",
    ),
]
Device = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:1, mps; default: a GPU where there is one.")
]
Progress = Annotated[bool, typer.Option("--progress/--no-progress", help="Show a bar on a terminal.")]


def open_model(model: str, weights: str = "", key: str = "", options: list[str] | None = None) -> nn.Module:
    """The model that `--model` (and `--weights`, `--key`, `--option`) name, ready for use."""
    given = dict(parse_option(word) for word in options or ())
    import visionhybrid
    from visionhybrid.models import registry

    if Path(model).expanduser().exists():
        if weights:
            raise UsageError(f"--model {model} has its weights; --weights goes with a registered name")
        return visionhybrid.load(model, key=key or None, **given)
    name = model.partition(".")[0]
    if name not in registry.SYSTEM_OF and (
        "/" in model or Path(model).suffix in (".pth", ".pt", ".ckpt", ".safetensors", ".bin")
    ):
        raise ValueError(f"{model}: no such file")
    registry.require(model)
    from visionhybrid.models import checkpoint

    if not weights:
        from visionhybrid.models.checkpoint import pretrained

        tag = model.partition(".")[2] or registry.default_cfg(name).get("tag")
        weights = str(pretrained.locate(name, tag))
    return checkpoint.load_as(model, weights, key=key or None, **given)


def parse_option(word: str) -> tuple[str, Any]:
    """NAME=VALUE; the value as JSON where it is that."""
    name, equals, text = word.partition("=")
    if not equals or not name:
        raise UsageError(f"--option takes NAME=VALUE, got {word!r}")
    try:
        return name, json.loads(text)
    except ValueError:
        return name, text


def pick_device(device: str) -> str:
    """`device` if given and usable, else the GPU, else the CPU."""
    import torch

    if not device:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {_line(error).partition('. ')[0]}") from error
    return device


def fail(text: str) -> None:
    """One line on the error stream."""
    typer.echo(text, err=True)


def is_terminal() -> bool:
    return sys.stdout.isatty()
