"""What the tests of the command share: running it, and the files it is given."""

from __future__ import annotations

import numpy as np
import timm
import torch
from golden import load_case
from PIL import Image
from toy import randomised
from typer.testing import CliRunner

from visionhybrid.cli import app
from visionhybrid.configs.nextvit import nextvit_digits
from visionhybrid.models.checkpoint import save

RUNNER = CliRunner()
# A Next-ViT of 0.3 M parameters; strides and sr_ratios show in no shape.
TINY = nextvit_digits().model.options


def run(*words, status=0):
    result = RUNNER.invoke(app, [str(word) for word in words])
    assert result.exit_code == status, result.output
    if status in (1, 2) and "Usage:" not in result.stderr and "Traceback" not in result.stderr:
        assert all(len(line) < 400 for line in result.stderr.splitlines())
    return result


def error(*words, status=1):
    """The one line that a failing command leaves on the error stream."""
    lines = run(*words, status=status).stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def hat_file(folder):
    """A HAT x2 with random weights in the authors' container."""
    path = folder / "tiny_x2.pth"
    torch.save({"params": {}, "params_ema": load_case("hat_tiny_x2_pad_29x21").state_dict()}, path)
    return path


def nextvit_file(folder):
    """A classifier of three named classes, as the trainer saves one."""
    torch.manual_seed(0)
    model = randomised(timm.create_model("vh_nextvit_small", num_classes=3, **TINY))
    with torch.no_grad():  # so that different images get different answers, and no answer is certain
        logits = model(torch.randn(16, 3, 32, 32))
        model.head.fc.weight /= logits.std(0)[:, None]
        model.head.fc.bias -= model(torch.randn(16, 3, 32, 32)).mean(0)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32), "crop_pct": 1.0}
    return save(model, folder / "tiny.safetensors", classes=["ant", "bee", "cow"])


def photos_folder(tmp_path):
    """A folder with two images, a broken one and a text."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate(((17, 12), (30, 41))):
        noise = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes((folder / "1.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("no image")
    return folder
