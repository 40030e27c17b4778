"""A page to try a checkpoint on one's own images: restore with a before/after slider, and classify.

    python -m visionhybrid.app HAT_SRx4.pth        # needs the extra: pip install "visionhybrid[app]"

Everything stays on this machine: gradio's analytics are off, its page loads no font from elsewhere, and it listens on
127.0.0.1 unless told otherwise. Files go through `data.images`, so that 16 bits, alpha and metadata survive into the download.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

from visionhybrid.data.images import SUFFIXES, Picture, misfit, read_image, write_image
from visionhybrid.infer.classification import classify
from visionhybrid.infer.engine import Engine
from visionhybrid.models.checkpoint import load

if TYPE_CHECKING:
    import gradio

_ADVICE = (
    "The model sees the image whole where memory allows, else in blended tiles. 0: choose automatically."
)


def build(model: nn.Module | str | Path | None = None) -> gradio.Blocks:
    """The page. `model`: a restorer or classifier, or the path of its checkpoint; None: the page asks for a path.

    Raises: ValueError: gradio is not installed, or `model` is no checkpoint.
    """
    gr = _gradio()
    given = load(model) if isinstance(model, str | Path) else model
    can_restore = given is None or _restores(given)

    def restore(checkpoint: str, path: str | None, tile: float, progress=gr.Progress()):  # noqa: B008 - gradio's way
        with _shown_errors(gr):
            return restore_file(given or _load(checkpoint), path, int(tile or 0), progress)

    def classes(checkpoint: str, path: str | None):
        with _shown_errors(gr):
            return classify_file(given or _load(checkpoint), path)

    with gr.Blocks(title="visionhybrid", analytics_enabled=False) as page:
        gr.Markdown("## visionhybrid")
        checkpoint = gr.Textbox(
            label="Checkpoint",
            placeholder="path of a .safetensors or .pth file, or of a run's folder",
            visible=given is None,
        )
        with gr.Tab("Restore", visible=can_restore):
            with gr.Row():
                with gr.Column(scale=1):
                    source = gr.Image(
                        label="Image", type="filepath", image_mode=None, sources=["upload", "clipboard"]
                    )
                    tile = gr.Number(label="Tile (pixels)", value=0, minimum=0, precision=0, info=_ADVICE)
                    start = gr.Button("Restore", variant="primary")
                with gr.Column(scale=2):
                    slider = gr.ImageSlider(label="Bicubic | restored", format="png", interactive=False)
                    result = gr.DownloadButton("Download the full result", interactive=False)
            start.click(restore, [checkpoint, source, tile], [slider, result], concurrency_limit=1)
        with gr.Tab("Classify", visible=given is None or not can_restore):
            with gr.Row():
                photo = gr.Image(
                    label="Image", type="filepath", image_mode=None, sources=["upload", "clipboard"]
                )
                label = gr.Label(label="Most probable classes", num_top_classes=5)
            ask = gr.Button("Classify", variant="primary")
            ask.click(classes, [checkpoint, photo], label, concurrency_limit=1)
    return page


def launch(
    model: nn.Module | str | Path | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    **options: Any,
):
    """Build the page and serve it. options: for gradio's `Blocks.launch`; never `share=True` unless you mean it."""
    gr = _gradio()
    # gradio's own themes fetch their fonts from Google.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page = build(model)
    return page.queue().launch(server_name=host, server_port=port, theme=theme, **options)


def restore_file(
    model: nn.Module, path: str | None, tile: int = 0, progress=None
) -> tuple[tuple[Image.Image, Image.Image], Any]:
    """((bicubic, restored), download) of the image file `path`: two PIL images of one size, and the button with the file.

    Raises: ValueError: no file, an unreadable one, a model that is no restorer, or an impossible tile.
    """
    gr = _gradio()
    if path is None:
        raise ValueError("choose an image first")
    picture = read_image(path)
    done = Engine(model, tile=tile or None).picture(picture, progress or (lambda fraction: None))
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES or misfit(SUFFIXES[suffix], done.size, done.alpha is not None):
        suffix = ".png"
    target = Path(tempfile.mkdtemp(prefix="visionhybrid_")) / f"{Path(path).stem}_restored{suffix}"
    write_image(target, done)
    after = _shown(done)
    before = _shown(picture).resize(after.size, Image.Resampling.BICUBIC)
    return (before, after), gr.DownloadButton(value=str(target), interactive=True)


def classify_file(model: nn.Module, path: str | None) -> dict[str, float]:
    """Name and probability of the five most probable classes of the image file `path`. Raises: ValueError."""
    if path is None:
        raise ValueError("choose an image first")
    (prediction,) = classify(model, [path], topk=5, progress=False)
    if prediction.error:
        raise ValueError(prediction.error)
    return {f"{guess.label}": guess.probability for guess in prediction.guesses}


def _restores(model: nn.Module) -> bool:
    return hasattr(model, "scale") and hasattr(model, "multiple_of")


def _load(checkpoint: str) -> nn.Module:
    if not checkpoint.strip():
        raise ValueError("give the path of a checkpoint first")
    path = Path(checkpoint.strip()).expanduser()
    return _loaded(str(path), path.stat().st_mtime_ns if path.exists() else 0)


@lru_cache(maxsize=1)
def _loaded(path: str, changed: int) -> nn.Module:
    return load(path)


def _shown(picture: Picture) -> Image.Image:
    """The picture as a screen shows it: 8 bits, RGB or RGBA."""
    planes = picture.pixels.expand(3, -1, -1)
    if picture.alpha is not None:
        planes = torch.cat([planes, picture.alpha])
    return Image.fromarray(planes.mul(255).round().byte().permute(1, 2, 0).contiguous().numpy())


@contextmanager
def _shown_errors(gr: Any) -> Iterator[None]:
    """What the user did wrong appears on the page in one line, and not as a traceback in the log."""
    try:
        yield
    except (ValueError, MemoryError) as error:
        raise gr.Error(str(error) or "out of memory", print_exception=False) from None


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise ValueError('the app needs gradio: pip install "visionhybrid[app]"') from error
    return gradio


def main(words: Sequence[str] | None = None) -> None:
    """`python -m visionhybrid.app [CHECKPOINT] [--host ...] [--port ...]`; what is wrong leaves as one line."""
    parser = argparse.ArgumentParser(
        prog="python -m visionhybrid.app", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "checkpoint", nargs="?", help="a file or run directory; without one the page asks for it"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; this machine only by default"
    )
    parser.add_argument("--port", type=int, help="a free one by default")
    given = parser.parse_args(words)
    try:
        launch(given.checkpoint, host=given.host, port=given.port)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
