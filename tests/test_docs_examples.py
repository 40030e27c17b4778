"""The Python examples of README and docs run, page by page, on small stand-ins for the files and pipelines that they name."""

import re
from pathlib import Path

import pytest
import timm
import tiny_pipelines as tiny
import torch
from PIL import Image

import visionhybrid  # noqa: F401  (registers vh_*)

ROOT = Path(__file__).resolve().parent.parent
TINY_HAT = dict(
    dim=16, depths=[1], num_heads=[2], window_size=8, key_window_size=12, conv_dim=4, gate_dim=2, mlp_dim=16
)
# What makes an example small enough for a test: (text, what stands there instead). Each text must be in the page.
SMALLER = {
    "README.md": [
        ("height=1024, width=2048", "height=32, width=64, num_inference_steps=2"),
        (', weights="Yuanshi/LinFusion-1-5"', ""),
    ],
    "backbones.md": [],
    "checkpoints.md": [],
    "diagnosis.md": [
        ("(1, 3, 224, 224)", "(1, 3, 32, 32)"),
        ('"convnext_tiny", pretrained=True', '"vh_mala_tiny"'),
        ("size=512", "size=64"),
    ],
    "generation.md": [("num_inference_steps=25", "num_inference_steps=2")],
    "highres.md": [
        (', weights="Yuanshi/LinFusion-1-5"', ""),
        ("height=2048, width=1024", "height=128, width=64, num_inference_steps=4"),
        ("plan(4096, 2048)", "plan(128, 64)"),
        ("height=4096, width=2048,", "height=128, width=64, num_inference_steps=4,"),
        ("height=4096, width=4096", "height=128, width=128, num_inference_steps=4"),
    ],
    "hosts.md": [
        (', weights="Yuanshi/LinFusion-1-5"', ""),
        ("height=1024, width=2048", "height=32, width=64, num_inference_steps=2"),
        ("tokens > 1024", "tokens > 64"),
        ("tokens >= 4096", "tokens >= 256"),
        ("layer.heads == 8", "layer.heads == 4"),
        ("sample_size=128", "sample_size=32"),
    ],
    "kernels.md": [],
    "mixers.md": [
        ("dim=3072, heads=24, head_dim=128", "dim=16, heads=2, head_dim=8"),
        ("(1, 24, 512 + 64 * 64, 128)", "(1, 2, 512 + 64 * 64, 8)"),
    ],
    "restoration.md": [
        ("torch.rand(3, 64, 64)", "torch.rand(3, 12, 12)"),
        ("row=128, column=128", "row=16, column=16"),
    ],
    "training.md": [],
}
# By what stands in them: examples that need the network, a second process or gigabytes, and those that test_docs.py runs.
LEFT_OUT = (
    "encode_clips(",
    "init_process_group(",
    "TurboWan",
    "class System:",
    "61 batch norms",
    "photo_x4.png",
)


def blocks(name):
    page = ROOT / name if name == "README.md" else ROOT / "docs" / name
    text = page.read_text(encoding="utf-8")
    for old, new in SMALLER[name]:
        assert old in text, f"{name} no longer has {old!r}"
        text = text.replace(old, new)
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return [block for block in found if not any(word in block for word in LEFT_OUT)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that examples name."""
    folder = tmp_path_factory.mktemp("docs")
    hat = {"params_ema": timm.create_model("vh_hat_x4", **TINY_HAT).state_dict()}
    for name in ("HAT-S_SRx4.pth", "HAT_SRx4.pth", "anything.pth"):
        torch.save(hat, folder / name)
    torch.save(timm.create_model("vh_mala_tiny").state_dict(), folder / "nextvit_small_in1k_224.pth")
    for name in ("photo.png", "photo.jpg", "cat.jpg", "dog.png"):
        Image.effect_noise((20, 12), 64).convert("RGB").save(folder / name)
    return folder


@pytest.fixture
def stand_ins(folder, monkeypatch):
    """The folder of those files, and tiny pipelines for those of the hub."""
    import diffusers

    from visionhybrid.diffusion import HybridDiT, HybridDiTPipeline

    def digits(*args, **kwargs):
        model = HybridDiT(
            sample_size=8,
            patch_size=2,
            in_channels=1,
            num_classes=10,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
        )
        return HybridDiTPipeline(model, diffusers.FlowMatchEulerDiscreteScheduler())

    monkeypatch.chdir(folder)
    for cls in (diffusers.DiffusionPipeline, diffusers.StableDiffusionPipeline):
        monkeypatch.setattr(cls, "from_pretrained", staticmethod(lambda *args, **kwargs: tiny.sd15()))
    monkeypatch.setattr(HybridDiTPipeline, "from_pretrained", staticmethod(digits))


@pytest.mark.parametrize("name", SMALLER)
@pytest.mark.usefixtures("stand_ins")
def test_examples_run(name):
    known = {}  # what an example may use: only what those before it on the page have made
    for block in blocks(name):
        exec(compile(block, name, "exec"), known)
