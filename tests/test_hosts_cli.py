"""`visionhybrid describe` and `attach` on folders of pipelines."""

import json

import pytest
import tiny_pipelines
import tiny_transformers
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import visionhybrid
from visionhybrid.cli import app
from visionhybrid.diffusion import HybridDiT, HybridDiTPipeline
from visionhybrid.diffusion.denoisers import open_any
from visionhybrid.hosts import choices


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipes") / "sd15"
    tiny_pipelines.sd15().save_pretrained(path)
    return path


def test_describe_says_what_could_be_replaced_by_what(folder):
    done = call("describe", folder, "--size", "128x64")
    assert done.exit_code == 0, done.output
    assert "0 of 4 replaceable attention modules have a mixer" in done.output
    assert "4 x cross attention: its keys are the text's" in done.output
    found = json.loads(call("describe", folder, "--size", "128x64", "--json").stdout)
    assert [row["tokens"] for row in found["attention"] if not row["reason"]].count(128 * 64) == 3
    linear = next(choice for choice in found["choices"] if choice["mixer"] == "linear")
    # by hand: N N C 2 over N C (2 D + 1), three times at 128x64 with C 32, D 8, once at 64x32 with C 64, D 16
    full = 3 * 2 * 8192**2 * 32 + 2 * 2048**2 * 64
    spent = 3 * 8192 * 32 * (2 * 8 + 1) + 2048 * 64 * (2 * 16 + 1)
    assert linear["layers"] == 4
    assert linear["speedup"] == pytest.approx(full / spent)
    assert linear["crossover"] == 25  # 2 N > 33, N a square: of the wider heads


def test_choices_say_what_does_not_fit():
    found = {choice.mixer: choice for choice in choices(tiny_transformers.transformer("hunyuan_video"))}
    assert found["clear"].layers == 0
    assert "called with a mask of padded text, which clear cannot honour" in found["clear"].reason
    assert found["sla"].layers == 3
    assert (found["sla"].speedup, found["sla"].reason) == (None, "")
    assert "softmax" not in found


def test_choices_of_own_and_timm_models():
    import timm

    model = HybridDiT(sample_size=16, num_layers=1, num_attention_heads=2, attention_head_dim=8)
    found = choices(HybridDiTPipeline(model, None))
    assert {choice.mixer: choice.layers for choice in found}["window"] == 1
    vit = timm.create_model("vit_tiny_patch16_224")
    assert next(choice for choice in choices(vit) if choice.mixer == "clear").layers == 12


def test_attach_writes_a_pipeline_with_its_mixers(folder, tmp_path):
    from diffusers import DiffusionPipeline

    out = tmp_path / "mixed"
    words = ("attach", folder, "neighborhood", "--layers", "tokens > 64", "-o", "kernel_size=3", "--out", out)
    done = call(*words)
    assert done.exit_code == 0, done.output
    assert "3 of 4 replaceable attention modules have a mixer" in done.output
    loaded = DiffusionPipeline.from_pretrained(out)
    loaded.set_progress_bar_config(disable=True)
    pipe = tiny_pipelines.sd15()
    visionhybrid.attach(pipe, "neighborhood", layers="tokens > 64", kernel_size=3)
    torch.testing.assert_close(tiny_pipelines.draw(loaded), tiny_pipelines.draw(pipe), rtol=0, atol=2e-6)
    again = call(*words)
    assert again.exit_code == 2
    assert "exists" in again.output


def test_attach_reads_published_weights_and_halves_them(tmp_path):
    from golden import load_case
    from published import published

    (tmp_path / "weights").mkdir()
    unet = published(load_case("linfusion_unet_sd21tiny_24x12"), tmp_path / "weights")
    pipe = tiny_pipelines.sd15()
    pipe.unet = unet
    pipe.save_pretrained(tmp_path / "pipe")
    words = ("--weights", tmp_path / "weights", "--dtype", "bfloat16", "--out", tmp_path / "out")
    done = call("attach", tmp_path / "pipe", "linfusion", *words)
    assert done.exit_code == 0, done.output
    from visionhybrid.hosts.diffusers.models import UNet2DConditionModel

    halves = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in halves.values()} == {torch.bfloat16}
    state = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet").state_dict()
    visionhybrid.attach(unet, "linfusion", weights=tmp_path / "weights")
    for key, value in unet.state_dict().items():
        assert torch.equal(state[key], value.bfloat16().float()), key


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("describe", "nowhere"), 1, "nowhere: no diffusers pipeline can be read"),
        (("describe", "{folder}", "--size", "12"), 2, "--size takes HxW or TxHxW, got '12'"),
        (("attach", "{folder}", "linfsion", "--out", "{out}"), 1, "did you mean 'linfusion'"),
        (("attach", "{folder}", "sla", "--dtype", "int8", "--out", "{out}"), 2, "--dtype is float32"),
        (("attach", "{folder}", "sla", "-l", "down_blcks.0", "--out", "{out}"), 1, "did you mean"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(words, status, message, folder, tmp_path):
    out = tmp_path / "out"
    done = call(*(word.format(folder=folder, out=out) for word in words))
    assert done.exit_code == status, done.output
    assert message in done.output
    assert not out.exists()


@pytest.mark.parametrize(
    "index", ['{"_class_name": "NewerPipeline"}', "[" * 100_000, "[]", "{}", '{"_class_name": 3}']
)
def test_an_index_that_is_none_is_one_line(index, tmp_path):
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ValueError, match=r"no diffusers pipeline can be read: .") as error:
        open_any(str(tmp_path))
    assert "\n" not in str(error.value)
