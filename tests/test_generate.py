"""Training of generators: what is predicted, the task, and its failures."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from train_case import outcome

import visionhybrid
from visionhybrid.diffusion import HybridDiTPipeline
from visionhybrid.diffusion.new import MODELS
from visionhybrid.train import find, override, run, validate
from visionhybrid.train.config import ConfigError, Diffusion
from visionhybrid.train.generate import Generate
from visionhybrid.train.noising import noising, squared_error

KINDS = [
    Diffusion(),
    Diffusion(times="logit_normal", shift=3.0),
    Diffusion(predict="epsilon", min_snr=5.0),
    Diffusion(predict="v", betas="squaredcos_cap_v2"),
]


@pytest.mark.parametrize("config", KINDS, ids=lambda c: f"{c.predict}-{c.times}")
def test_a_perfect_predictor_is_sampled_back_to_the_image(config):
    process = noising(config)
    x, noise = torch.randn(2, 1, 3, 4, 4).unbind(0)
    scheduler = process.scheduler()
    scheduler.set_timesteps(200)
    at = noise.clone()
    for time in scheduler.timesteps:
        times = torch.as_tensor([float(time)])
        # the noise that leads from x to where the sampler stands
        zero, one = process.noised(x, 0 * x, times), process.noised(0 * x, 0 * x + 1, times)
        now = (at - zero) / one.clamp_min(1e-6)
        at = scheduler.step(process.target(x, now, times), time, at).prev_sample
    assert torch.allclose(at, x, atol=0.05)


@pytest.mark.parametrize("config", KINDS, ids=lambda c: f"{c.predict}-{c.times}")
def test_times_and_weights(config):
    generator = torch.Generator().manual_seed(0)
    process = noising(config)
    for times in (process.draw(4000, generator), process.spread(11)):
        assert times.min() >= 0
        assert times.max() <= 1000
        assert (process.weight(times) > 0).all()
        assert (process.weight(times) <= 1).all()
    assert process.draw(4000, generator).std() > 100
    if config.shift == 3:
        assert process.draw(4000, generator).mean() > 650  # more noise


def test_min_snr_weights():
    process = noising(Diffusion(predict="epsilon", min_snr=5.0))
    kept = process.ddim.alphas_cumprod
    snr = kept / (1 - kept)
    times = torch.tensor([0.0, 900.0])
    assert torch.allclose(process.weight(times), torch.stack([5 / snr[0], torch.tensor(1.0)]))


def test_squared_error_weighs_images():
    prediction, target = torch.tensor([[2.0], [4.0]]), torch.tensor([[1.0], [1.0]])
    assert squared_error(prediction, target, torch.tensor([1.0, 0.5])) == (1 + 9 / 2) / 2


@pytest.mark.parametrize(
    "config", [Diffusion(min_snr=5.0), Diffusion(predict="v", shift=2.0), Diffusion(shift=0.0)]
)
def test_settings_that_contradict_each_other(config):
    with pytest.raises(ConfigError, match="diffusion"):
        noising(config)


WORDS = (
    "model.options.num_layers=2",
    "model.options.attention_head_dim=8",
    "loop.steps=4",
    "loop.batch_size=8",
    "loop.validate_every=2",
    "loop.tensorboard=false",
    "loop.log_every=1",
    "sampling.steps=2",
    "sampling.each=2",
    "eval_batch=200",
)


def tiny(*words):
    return override(find("hybrid_dit_digits"), [*WORDS, *words])


def test_a_run_releases_a_pipeline(tmp_path):
    whole = run(tiny(), tmp_path / "whole", progress=False)
    assert {"loss"} == set(whole["metrics"])
    pipe = HybridDiTPipeline.from_pretrained(whole["weights"])
    pipe.set_progress_bar_config(disable=True)
    (image,) = pipe([7], num_inference_steps=2).images
    assert image.size == (8, 8)
    assert pipe.config.labels == list("0123456789")
    report = (tmp_path / "whole" / "report.md").read_text()
    assert 'visionhybrid.diffusion.HybridDiTPipeline.from_pretrained("pipeline")' in report
    assert (tmp_path / "whole" / "samples" / "step_00000004" / "samples.png").is_file()
    # the released weights, opened again, score what the run said
    assert validate(tmp_path / "whole", tiny()) == pytest.approx(whole["metrics"], rel=1e-5)


def test_interrupted_and_continued_it_ends_with_the_same_weights(tmp_path):
    for name in ("whole", "stopped"):
        run(tiny(), tmp_path / name, progress=False)
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step_00000004")
    run(tiny(), tmp_path / "stopped", progress=False)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_unconditional_images_of_a_folder_with_a_broken_one(tmp_path):
    for split in ("train", "validation"):
        folder = tmp_path / "data" / split / "all"
        folder.mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (20, 12 + i), (40 * i, 0, 99)).save(folder / f"{i}.png")
        (folder / "broken.png").write_bytes(b"\x89PNG no more")
    config = tiny(
        "data.dataset=",
        f"data.root={tmp_path / 'data'}",
        "data.num_classes=0",
        "channels=3",
        "flip=0.5",
        "loop.batch_size=4",
    )
    done = run(config, tmp_path / "run", progress=False)
    assert any(line.get("corrupt") for line in done["history"])
    pipe = HybridDiTPipeline.from_pretrained(done["weights"])
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(num_images=3, num_inference_steps=1).images) == 3


def test_a_judge_says_what_it_sees(tmp_path, told):
    judge = visionhybrid.train.find("nextvit_digits")
    judge = replace(judge, loop=replace(judge.loop, epochs=None, steps=1, tensorboard=False))
    run(judge, tmp_path / "judge", progress=False)
    config = tiny(f"sampling.judge={tmp_path / 'judge'}", "sampling.judged=1", "loop.validate_every=0")
    done = run(config, tmp_path / "run", progress=False)
    assert 0 <= done["metrics"]["recognised"] <= 100
    assert validate(tmp_path / "run", config) == pytest.approx(done["metrics"], rel=1e-5)
    assert (told[0], told) == (0, sorted(told))
    assert 0 < told[-1] < 1


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.name=resnet18", "hybrid_dit"),
        ("model.options.depth=3", "model.options"),
        ("model.options.out_channels=2", "variance=learned doubles"),
        ("data.num_classes=7", "there are 10 classes"),
        ("model.start=/nowhere", "no HybridDiT"),
    ],
)
def test_what_cannot_be_trained(word, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run(tiny(word), tmp_path / "run", progress=False)


def test_classes_without_images(tmp_path):
    for name in "abc":
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
    for name in "ac":
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / "train" / name / "x.png")
    (tmp_path / "map.txt").write_text("a\nb\nc\n")
    words = ["data.dataset=", f"data.root={tmp_path / 'data'}", "data.held_out=train", "channels=3"]
    with pytest.raises(ConfigError, match=r"num_classes is 3, but there are 2 classes .*; no image in b"):
        Generate(tiny(*words, "data.num_classes=3"))
    with pytest.raises(ConfigError, match="1 of 3 classes have no image to train on, first b"):
        Generate(tiny(*words, "data.num_classes=3", f"data.class_map={tmp_path / 'map.txt'}"))
    assert Generate(tiny(*words, "data.num_classes=2")).notes == [
        "1 folders of classes are left out: no image in b"
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["model.name=unet", "data.num_classes=0", "model.options.num_class_embeds=null"],
        ["model.name=unet", "diffusion.predict=epsilon"],
        ["model.name=dit", "diffusion.predict=v"],
    ],
)
def test_generators_of_diffusers_from_scratch(words, tmp_path):
    shape = {"dit": dict(num_layers=1, num_attention_heads=2, attention_head_dim=8, patch_size=2)}
    block = dict(block_out_channels=[8, 8], norm_num_groups=4, layers_per_block=1, attention_head_dim=4)
    block |= dict(
        down_block_types=["DownBlock2D", "AttnDownBlock2D"], up_block_types=["AttnUpBlock2D", "UpBlock2D"]
    )
    name = words[0].partition("=")[2]
    options = json.dumps(shape.get(name, block))
    times = ["diffusion.times=uniform", f"model.options={options}", "loop.steps=2", "sampling.guidance=2"]
    config = tiny(*times, *words)
    done = run(config, tmp_path / "run", progress=False)
    pipe = MODELS[name][1].from_pretrained(done["weights"])
    pipe.set_progress_bar_config(disable=True)
    assert pipe.num_classes == config.data.num_classes
    given = [3] if pipe.num_classes else None
    assert pipe(given, num_inference_steps=2, guidance_scale=2.0).images[0].size == (8, 8)
    assert validate(tmp_path / "run", config) == pytest.approx(done["metrics"], rel=1e-5)


def test_a_step_does_not_depend_on_how_its_batch_is_shared(tmp_path):
    """Micro-batches stand for processes: noise, times and dropped labels belong to the image."""
    logs = []
    for words in ((), ("loop.micro_batch=3",)):
        done = run(tiny("loop.steps=2", *words), tmp_path / str(len(words)), progress=False)
        logs.append([line["loss"] for line in done["history"] if line["kind"] == "train"])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_a_pickle_is_never_opened(tmp_path):
    done = run(tiny("loop.steps=1"), tmp_path / "run", progress=False)
    weights = Path(done["weights"]) / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        validate(tmp_path / "run", tiny())
