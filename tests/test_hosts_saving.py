"""Models and pipelines with mixers, saved and loaded: nothing is lost, and nothing is lost unnoticed."""

import copy
import json

import pytest
import tiny_pipelines as tiny
import torch
from golden import load_case
from published import published
from safetensors.torch import load as parse
from safetensors.torch import save_file
from test_hosts_diffusers import DOWN, MID, PIPELINES, denoiser, output

import visionhybrid
from visionhybrid.hosts.diffusers import models

pytestmark = pytest.mark.filterwarnings(
    # diffusers' schedulers on numpy 2
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_with_mixers_is_saved_and_loaded(name, tmp_path):
    pipe = getattr(tiny, name)()
    visionhybrid.attach(pipe, "linfusion", zero_init=False)
    loaded = tiny.saved_and_loaded(pipe, tmp_path)
    state, again = denoiser(pipe).state_dict(), denoiser(loaded).state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())
    assert str(visionhybrid.describe(loaded)) == str(visionhybrid.describe(pipe))
    torch.testing.assert_close(tiny.draw(loaded), tiny.draw(pipe), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "saved", [dict(), dict(variant="fp16"), dict(max_shard_size="50KB"), dict(safe_serialization=False)]
)
@pytest.mark.parametrize("low_memory", [True, False])
def test_a_model_with_mixers_is_saved_and_loaded(saved, low_memory, tmp_path):
    unet = tiny.unet()
    visionhybrid.attach(unet, "linfusion", layers=["mid_block", "down_blocks"], zero_init=False)
    unet.save_pretrained(tmp_path, **saved)
    loading = dict(low_cpu_mem_usage=low_memory, variant=saved.get("variant"))
    loaded = models.UNet2DConditionModel.from_pretrained(tmp_path, **loading)
    assert type(loaded) is type(unet)
    assert torch.equal(output(loaded), output(unet))
    visionhybrid.detach(loaded)
    visionhybrid.detach(unet)
    assert torch.equal(output(loaded), output(unet))
    half = models.UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, **loading)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_diffusers_own_class_cannot_lose_the_mixers(tmp_path):
    from diffusers import AutoModel, StableDiffusionPipeline, UNet2DConditionModel

    pipe = tiny.sd15()
    visionhybrid.attach(pipe.unet, "linfusion")  # the pipeline is not told
    pipe.save_pretrained(tmp_path)
    loads = [
        lambda: UNet2DConditionModel.from_pretrained(tmp_path / "unet"),
        lambda: UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet"),
        lambda: AutoModel.from_pretrained(tmp_path / "unet"),
        lambda: StableDiffusionPipeline.from_pretrained(tmp_path),
    ]
    for load in loads:
        with pytest.raises(
            ValueError, match=r"visionhybrid: this folder has mixers.*visionhybrid.hosts.diffusers.models"
        ):
            load()
    # the remedy that the message names
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["unet"][0] = "visionhybrid.hosts.diffusers.models"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(output(loaded.unet), output(pipe.unet))


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    unet = tiny.unet()
    visionhybrid.attach(unet, "linfusion")
    unet.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = parse(file.read_bytes())  # not load_file: its tensors would lie in the file that is written over
    lost = f"{MID}.mixer.to_q_.0.weight"
    save_file({k: v for k, v in state.items() if k != lost}, file)
    with pytest.raises(ValueError, match=f"the checkpoint lacks weights of mixers: {lost}"):
        models.UNet2DConditionModel.from_pretrained(tmp_path)
    save_file({**state, f"{MID}.mixer.gate": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="has unknown weights of mixers"):
        models.UNet2DConditionModel.from_pretrained(tmp_path)


def test_distilled_projections_cannot_be_given_back_from_a_checkpoint(tmp_path):
    case = load_case("linfusion_unet_sd21tiny_24x12")
    (tmp_path / "weights").mkdir()
    unet = published(case, tmp_path / "weights")
    visionhybrid.attach(unet, "linfusion", weights=tmp_path / "weights")
    unet.save_pretrained(tmp_path / "unet")
    loaded = models.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    case.check("sample", output(loaded, **{key: case.input(key) for key in case.facts["inputs"]}))
    with pytest.raises(ValueError, match="its own ones are not in this checkpoint"):
        visionhybrid.detach(loaded)
    assert len(visionhybrid.describe(loaded).mixed) == 4


def test_a_detached_model_is_saved_as_diffusers_saves_it(tmp_path):
    from diffusers import StableDiffusionPipeline

    pipe = tiny.sd15()
    pipe.save_pretrained(tmp_path / "before")
    visionhybrid.attach(pipe, "linfusion")
    visionhybrid.detach(pipe)
    pipe.save_pretrained(tmp_path / "after")
    for file in ("model_index.json", "unet/config.json"):
        assert (tmp_path / "after" / file).read_text() == (tmp_path / "before" / file).read_text()
    assert torch.equal(
        tiny.draw(StableDiffusionPipeline.from_pretrained(tmp_path / "after")), tiny.draw(pipe)
    )


def test_copies_are_independent():
    unet = tiny.unet()
    before = output(unet)
    visionhybrid.attach(unet, "linfusion")
    mixed = output(unet)
    other = copy.deepcopy(unet)
    assert torch.equal(output(other), mixed)
    visionhybrid.detach(other)
    assert torch.equal(output(other), before)
    assert torch.equal(output(unet), mixed)
    assert len(visionhybrid.describe(unet).mixed) == 4
    twin = type(unet).from_config(unet.config)
    twin.load_state_dict(unet.state_dict(), strict=True)
    assert torch.equal(output(twin.eval()), mixed)


def test_published_weights_for_some_layers(tmp_path):
    case = load_case("linfusion_unet_sd21tiny_24x12")
    unet = published(case, tmp_path)
    inputs = {key: case.input(key) for key in case.facts["inputs"]}
    before = output(unet, **inputs)
    report = visionhybrid.attach(unet, "linfusion", weights=tmp_path, layers=["mid_block", "down_blocks"])
    assert [row.name for row in report.mixed] == [DOWN, MID]
    assert {row.weights for row in report.mixed} == {str(tmp_path)}
    with pytest.raises(
        ValueError, match=r"does not fit this model: .*it has a mixer, linfusion; detach it first"
    ):
        visionhybrid.attach(unet, "linfusion", weights=tmp_path)
    visionhybrid.detach(unet, layers="mid_block")
    visionhybrid.attach(unet, "softmax", layers="mid_block")
    visionhybrid.detach(unet)
    assert torch.equal(output(unet, **inputs), before)
