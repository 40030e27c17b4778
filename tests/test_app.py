"""The page: it builds, its functions do what the buttons say, and nothing calls home."""

from __future__ import annotations

import gc
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from visionhybrid.data.images import Picture, read_image, write_image

gradio = pytest.importorskip("gradio", reason="the extra `app` is not installed")
# gradio 6 leaves an event loop unclosed for each page that is built and not launched.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:gradio",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)

from visionhybrid import app  # noqa: E402


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()  # while the marks above hold


class Enlarge(nn.Module):
    scale, in_chans, multiple_of = 2, 3, 1

    def forward(self, x):
        return F.interpolate(x, scale_factor=2, mode="nearest")


class Shades(nn.Module):
    """Two classes: dark and bright."""

    num_classes, in_chans = 2, 3
    pretrained_cfg: ClassVar = {
        "input_size": (3, 16, 16),
        "label_names": ["dark", "bright"],
        "mean": (0, 0, 0),
        "std": (1, 1, 1),
    }

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(9.0))

    def forward(self, x):
        light = self.gain * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([-light, light], 1)


def tabs(page) -> dict[str, bool]:
    return {b.label: b.visible for b in page.blocks.values() if isinstance(b, gradio.Tab)}


def test_the_page_offers_what_the_model_can_do():
    assert tabs(app.build()) == {"Restore": True, "Classify": True}
    assert tabs(app.build(Enlarge())) == {"Restore": True, "Classify": False}
    page = app.build(Shades())
    assert tabs(page) == {"Restore": False, "Classify": True}
    assert page.analytics_enabled is False
    assert len(page.fns) == 2


def test_restoring_keeps_sixteen_bits_in_the_download(tmp_path):
    write_image(tmp_path / "x.png", Picture(pixels=torch.rand(3, 9, 7), alpha=torch.rand(1, 9, 7), bits=16))
    fractions = []
    (before, after), button = app.restore_file(Enlarge(), str(tmp_path / "x.png"), 4, fractions.append)
    assert before.size == after.size == (14, 18)
    assert (before.mode, after.mode) == ("RGBA", "RGBA")
    assert fractions[-1] == pytest.approx(1)
    saved = read_image(button.value["path"] if isinstance(button.value, dict) else button.value)
    assert (saved.bits, saved.size, saved.alpha is not None) == (16, (14, 18), True)
    np.testing.assert_array_equal(np.asarray(after)[::2, ::2, :3], np.asarray(after)[1::2, 1::2, :3])


def test_classifying_names_the_classes(tmp_path):
    Image.new("RGB", (20, 20), (250, 250, 250)).save(tmp_path / "x.png")
    found = app.classify_file(Shades(), str(tmp_path / "x.png"))
    assert max(found, key=found.get) == "bright"
    assert sum(found.values()) == pytest.approx(1)


def call(page, name, *inputs):
    """The function behind a button, as the page calls it."""
    return next(fn.fn for fn in page.fns.values() if fn.name == name)(*inputs)


def test_mistakes_are_told_on_the_page(tmp_path):
    (tmp_path / "x.png").write_text("no image")
    page = app.build(Enlarge())
    with pytest.raises(gradio.Error, match="choose an image first"):
        call(page, "restore", "", None, 0)
    with pytest.raises(gradio.Error, match="not an image"):
        call(page, "restore", "", str(tmp_path / "x.png"), 0)
    with pytest.raises(gradio.Error, match="checkpoint"):
        call(app.build(), "classes", " ", str(tmp_path / "x.png"))
    with pytest.raises(gradio.Error, match="none"):
        call(app.build(), "restore", str(tmp_path / "none.pth"), str(tmp_path / "x.png"), 0)
