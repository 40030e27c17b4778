"""Pipelines trained on images with captions."""

import json
import shutil

import pytest
import tiny_pipelines
import tiny_transformers
import torch
from diffusers import DiffusionPipeline
from pictures import numbered_pictures
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from train_case import outcome

import visionhybrid
from visionhybrid.diffusion.denoisers import StableDiffusion
from visionhybrid.train import find, override, run, validate
from visionhybrid.train.config import (
    Cache,
    ConfigError,
    Diffusion,
    Generation,
    Generator,
    Images,
    Loop,
    Sampling,
    Text,
)
from visionhybrid.train.generate import Generate

pytestmark = pytest.mark.filterwarnings(
    # diffusers' Euler scheduler with numpy 2
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = numbered_pictures(tmp_path_factory.mktemp("data"), 8)
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"picture {number}")
    return folder


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """With mixers attached beforehand."""
    pipe = tiny_pipelines.sd15()
    visionhybrid.attach(pipe, "linfusion")
    folder = tmp_path_factory.mktemp("pipe")
    pipe.save_pretrained(folder)
    return folder


def tuned(pipeline, data, cache, *words):
    config = Generation(
        name="tuned",
        model=Generator(pipeline=str(pipeline)),
        data=Images(dataset="captions", root=str(data), num_classes=0, image_size=16),
        diffusion=Diffusion(predict="pipeline", drop_label=0.3),
        text=Text(hold_out=4),
        cache=Cache(folder=str(cache)),
        sampling=Sampling(steps=1, guidance=3.0, each=1, classes=1),
        loop=Loop(batch_size=4, steps=2, workers=0, log_every=1, tensorboard=False, checkpoint_every=1),
    )
    return override(config, words)


def test_a_pipeline_with_mixers_is_trained_killed_and_continued(sd15, data, tmp_path):
    config = tuned(sd15, data, tmp_path / "cache", "optim.lr=1e-2", "loop.ema_decay=0.5")
    whole = run(config, tmp_path / "whole", progress=False)
    run(config, tmp_path / "stopped", progress=False)
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step_00000002")
    run(config, tmp_path / "stopped", progress=False)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    with Image.open(tmp_path / "whole" / "samples" / "step_00000002" / "samples.png") as sheet:
        assert sheet.size == (64 + 66, 66)
    pipe = DiffusionPipeline.from_pretrained(whole["weights"])
    pipe.set_progress_bar_config(disable=True)
    report = (tmp_path / "whole" / "report.md").read_text()
    assert 'diffusers.StableDiffusionPipeline.from_pretrained("pipeline")' in report
    mixers = [row.mixer for row in visionhybrid.describe(pipe.unet).rows]
    assert mixers.count("linfusion") == 4
    before, after = (
        load_file(next((f / "unet").glob("*.safetensors"))) for f in (sd15, tmp_path / "whole" / "pipeline")
    )
    assert before.keys() == after.keys()
    assert any(".mixer." in name and not torch.equal(before[name], after[name]) for name in before)
    assert tiny_pipelines.draw(pipe, size=(16, 16)).isfinite().all()
    assert validate(tmp_path / "whole", config) == pytest.approx(whole["metrics"], rel=1e-5)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("sd15_captions", "sd15"),
        ("sdxl_captions", "sdxl"),
        ("sdxl_captions_lora", "sdxl"),
        ("flow_captions_lora", "flux"),
        ("flow_captions_lora", "sd3"),
    ],
)
def test_recipes_train_and_save_pipelines(recipe, name, data, tmp_path):
    build = getattr(tiny_pipelines, name, None) or getattr(tiny_transformers, name)
    build().save_pretrained(tmp_path / "pipe")
    words = [f"model.pipeline={tmp_path / 'pipe'}", f"data.root={data}", f"cache.folder={tmp_path / 'cache'}"]
    words += [
        "data.image_size=16",
        "sampling.classes=0",
        "loop.workers=0",
        "loop.tensorboard=false",
        "loop.epochs=none",
    ]
    config = override(find(recipe), [*words, "loop.steps=1", "loop.precision=no", "loop.log_every=1"])
    done = run(config, tmp_path / "run", progress=False)
    assert 0 < done["metrics"]["loss"] < 10
    folder = tmp_path / "run" / "pipeline"
    found, given = (json.loads((f / "model_index.json").read_text()) for f in (folder, tmp_path / "pipe"))
    assert found == given | {"_name_or_path": found.get("_name_or_path", "")}
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").is_file() == ("lora" in recipe)


def test_low_rank_updates_are_trained_and_added_up(data, tmp_path):
    pipe = tiny_pipelines.sd15()
    pipe.save_pretrained(tmp_path / "pipe")
    config = tuned(
        tmp_path / "pipe", data, tmp_path / "cache", "model.lora=2", "optim.lr=0.1", "loop.steps=1"
    )
    run(config, tmp_path / "run", progress=False)
    folder = tmp_path / "run" / "pipeline"
    before, after = (load_file(next((f / "unet").glob("*.safetensors"))) for f in (tmp_path / "pipe", folder))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        name
        for name in before
        if name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))
    }
    difference = after["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    difference = difference - before["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    assert torch.linalg.matrix_rank(difference, rtol=1e-3) == 2
    # the file of updates makes of the old pipeline what the new one is
    whole = DiffusionPipeline.from_pretrained(folder)
    # named because diffusers before 0.40 does not look for it where it is offline
    pipe.load_lora_weights(folder / "lora", weight_name="pytorch_lora_weights.safetensors")
    whole.set_progress_bar_config(disable=True)
    assert_close(
        tiny_pipelines.draw(pipe, size=(16, 16)), tiny_pipelines.draw(whole, size=(16, 16)), rtol=0, atol=1e-3
    )
    original = tiny_pipelines.draw(tiny_pipelines.sd15(), size=(16, 16))
    assert (tiny_pipelines.draw(whole, size=(16, 16)) - original).abs().max() > 1e-2


def test_a_step_is_told_its_caption_or_nothing(sd15, data, tmp_path):
    task = Generate(tuned(sd15, data, tmp_path / "cache"))
    family = task.generator.family
    known, nothing = family.encode([f"picture {i}" for i in range(8)])["text"], family.nothing()["text"]
    dropped = 0
    assert len(task.train_set) == 6  # images 0 and 4 are held out
    for seed in range(40):
        sample = task.train_set.sample(seed % 6, seed)
        image = [1, 2, 3, 5, 6, 7][seed % 6]
        told = nothing[0] if int(sample["label"]) < 0 else known[image]
        dropped += int(sample["label"]) < 0
        assert_close(sample["text"], told, rtol=1e-4, atol=1e-5)
        assert sample["size"].tolist() == [20 + image, 24]
    assert 5 < dropped < 20
    asked = task.exercise({name: value[None] for name, value in sample.items()})
    out = family.model(*asked.args, **asked.kwargs)[0]
    assert_close(asked.loss(out), (out - sample["noise"]).square().mean(), rtol=1e-5, atol=0)


def test_captions_are_encoded_once(sd15, data, tmp_path, monkeypatch):
    config = tuned(sd15, data, tmp_path / "cache", "cache.precision=float16")
    first = Generate(config)
    monkeypatch.setattr(StableDiffusion, "encode", lambda *_: pytest.fail("encoded again"))
    again = Generate(config)
    for a, b in zip(first.train_set.texts[0].values(), again.train_set.texts[0].values(), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.float32


def test_what_half_precision_cannot_hold_is_not_kept(sd15, data, tmp_path, monkeypatch):
    encode = StableDiffusion.encode
    monkeypatch.setattr(StableDiffusion, "encode", lambda *args: {"text": 1e6 * encode(*args)["text"]})
    with pytest.raises(ValueError, match=r"cache\.precision: text of an encoder is not finite in float16"):
        Generate(tuned(sd15, data, tmp_path / "cache", "cache.precision=float16"))
    assert not list((tmp_path / "cache").glob("captions-*/*.safetensors"))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.pipeline=/nowhere", r"model\.pipeline: /nowhere: no diffusers pipeline"),
        ("diffusion.predict=epsilon", r"diffusion\.predict: 'pipeline' is for model\.pipeline"),
        ("data.dataset=digits", "is what model.pipeline is trained on"),
        ("data.num_classes=10", r"data\.num_classes: captions are no classes"),
        ("data.image_size=20", r"data\.image_size: the model takes multiples of 8, got 20"),
        ("latent.vae=somewhere", "a pipeline brings its own"),
        ("sampling.judge=somewhere", r"sampling\.judge: judges images of classes"),
        ("text.max_length=5", "texts of one length"),
        ("text.hold_out=1", r"text\.hold_out"),
        ("cache.batch=0", r"cache\.batch: expected more than 0, got 0"),
        ("text.hold_out=-1", r"text\.hold_out: expected 0 or more, got -1"),
        ("model.start_strict=false", r"model\.start_strict"),
        ("model.start=/nowhere", "/nowhere: no pipeline"),
    ],
)
def test_what_cannot_be_trained(word, message, sd15, data, tmp_path):
    with pytest.raises((ConfigError, ValueError), match=message):
        run(tuned(sd15, data, tmp_path / "cache", word), tmp_path / "run", progress=False)


def test_a_denoiser_for_other_latents(data, tmp_path):
    pipe = tiny_pipelines.sd15(in_channels=9)
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="takes 9 channels, latents have 4; pipelines for inpainting"):
        Generate(tuned(tmp_path / "pipe", data, tmp_path / "cache"))
