"""Grafting: other mixers in a trained generator, phase by phase."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import visionhybrid
from visionhybrid.cli import app
from visionhybrid.diffusion import HybridDiT, HybridDiTPipeline
from visionhybrid.train import find, override, run, validate
from visionhybrid.train.config import (
    Augment,
    Classification,
    ConfigError,
    Generator,
    Images,
    Loop,
    Model,
    Phase,
)
from visionhybrid.train.grafting import graft
from visionhybrid.train.grafts import GraftClassifier as GraftClassifierTask
from visionhybrid.train.grafts import GraftGenerator

TINY = [
    "loop.batch_size=16",
    "loop.tensorboard=false",
    "loop.log_every=1",
    "sampling.steps=1",
    "sampling.each=1",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A generator of three blocks after a few steps: not good, but not zero."""
    folder = tmp_path_factory.mktemp("teacher")
    words = ["model.options.num_layers=3", "model.options.attention_head_dim=8", "loop.steps=30"]
    run(
        override(find("hybrid_dit_digits"), [*words, "loop.batch_size=32", *TINY[1:]]), folder, progress=False
    )
    return folder


def recipe(teacher, *words, mixer="linfusion"):
    small = [f"teacher={teacher}", "alone.steps=12", "alone.lr=0.01", "whole.steps=3", "schedule.warmup=0"]
    return override(find(f"hybrid_dit_digits_{mixer}"), [*TINY, *small, *words])


@pytest.mark.parametrize("mixer", ["linfusion", "sla"])
def test_a_graft_learns_and_is_released(mixer, teacher, tmp_path):
    report = graft(recipe(teacher, mixer=mixer), tmp_path, progress=False)
    assert [layer.name for layer in report.layers] == [f"blocks.{i}.attn" for i in range(3)]
    assert all(layer.kept and layer.mixer == mixer for layer in report.layers)
    pipe = HybridDiTPipeline.from_pretrained(report.weights)
    assert pipe.transformer.config.mixer == [mixer] * 3
    assert json.loads((tmp_path / "report.json").read_text())["student"].keys() == {"loss", "distance"}
    assert report.teacher["loss"] > 0
    # it nears the teacher
    lines = [json.loads(line) for line in (tmp_path / "alone" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    # the teacher is not touched
    again = HybridDiTPipeline.from_pretrained(teacher / "pipeline").transformer
    assert again.config.mixer in ("softmax", ["softmax"] * 3)


def test_only_the_new_attention_is_trained(teacher):
    task = GraftGenerator(recipe(teacher, "layers=blocks.1"))
    net = task.parts()["model"]
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {f"student.blocks.1.attn.{n}" for n, _ in net.student.blocks[1].attn.named_parameters()}
    assert not any(name.startswith("_teacher") for name in net.state_dict())
    everything = GraftGenerator(recipe(teacher, "train=all")).parts()["model"]
    assert all(p.requires_grad for p in everything.parameters())


def test_a_budget_chooses_layers(teacher, tmp_path):
    whole = graft(recipe(teacher, "whole.steps=0", "alone.steps=4"), tmp_path / "all", progress=False)
    costs = sorted(layer.output_error for layer in whole.layers)
    budget = (costs[0] + costs[1]) / 2
    part = graft(
        recipe(teacher, "whole.steps=1", "alone.steps=4", f"budget={budget}"),
        tmp_path / "some",
        progress=False,
    )
    kept = [layer for layer in part.layers if layer.kept]
    assert 0 < len(kept) < 3
    model = HybridDiT.from_pretrained(tmp_path / "some" / "whole" / "pipeline" / "transformer")
    assert model.config.mixer.count("linfusion") == len(kept)
    with pytest.raises(ConfigError, match="less than any layer costs"):
        graft(recipe(teacher, "budget=1e-12", "alone.steps=1"), tmp_path / "none", progress=False)


def test_the_command_continues_and_reports(teacher, tmp_path):
    config = recipe(teacher, "alone.steps=1", "whole.steps=1", "tune.steps=1")
    from visionhybrid.train.config import to_json

    (tmp_path / "graft.json").write_text(to_json(config))
    words = ["graft", str(tmp_path / "graft.json"), "--out", str(tmp_path / "out"), "--no-progress"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "blocks.2.attn" in done.output
    assert (tmp_path / "out" / "tune" / "pipeline" / "model_index.json").is_file()
    weights = HybridDiT.from_pretrained(tmp_path / "out" / "tune" / "pipeline" / "transformer").state_dict()
    assert CliRunner().invoke(app, words).exit_code == 0
    again = HybridDiT.from_pretrained(tmp_path / "out" / "tune" / "pipeline" / "transformer").state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("teacher=", "name the generator"),
        ("teacher=/nowhere", "no HybridDiT"),
        ("mixer=softmax", "nothing to train"),
        ("layers=blocks.7", "no attention is called"),
        ("data.num_classes=0", "made for"),
    ],
)
def test_what_cannot_be_grafted(word, message, teacher, tmp_path):
    with pytest.raises(ValueError, match=message):
        graft(recipe(teacher, word), tmp_path, progress=False)
    with pytest.raises(ConfigError, match="all 0"):
        graft(recipe(teacher, "alone.steps=0", "whole.steps=0"), tmp_path, progress=False)
    with pytest.raises(ConfigError, match="not for grafting"):
        graft("hybrid_dit_digits", tmp_path)


def test_the_changed_layers_are_told_by_mixer_and_options(teacher):
    task = GraftGenerator(recipe(teacher))
    student = task.plain()
    assert task.changed(student) == []
    visionhybrid.attach(student, "linfusion", layers="blocks.0")
    assert task.changed(student) == ["blocks.0.attn"]


# ---- diffusers' own models
DIFFUSERS = {
    "dit": dict(num_layers=1, num_attention_heads=2, attention_head_dim=8, patch_size=2),
    "unet": dict(
        block_out_channels=[8, 8],
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        down_block_types=["AttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "AttnUpBlock2D"],
    ),
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_models_of_diffusers_are_grafted_and_opened_again(name, tmp_path):
    model = Generator(name=name, options=DIFFUSERS[name])
    base = override(replace(find("hybrid_dit_digits"), model=model), [*TINY, "loop.steps=1"])
    run(base, tmp_path / "teacher", progress=False)
    config = replace(recipe(tmp_path / "teacher", "alone.steps=1", "whole.steps=1"), model=model)
    report = graft(config, tmp_path / "graft", progress=False)
    assert report.student["distance"] > 0
    student = GraftGenerator(config).open(tmp_path / "graft" / "whole")
    assert [row.name for row in visionhybrid.describe(student).mixed] == [x.name for x in report.layers]


# ---- a classifier of timm


def classifier(*words):
    """The recipe for a vision transformer, of two blocks for the digits."""
    options = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    recipe = find("vit_small_in1k_linear")
    config = replace(
        recipe,
        model=Model(name="vit_tiny_patch16_224", options=options),
        schedule=replace(recipe.schedule, warmup=0),
        loop=Loop(batch_size=16, steps=1, workers=0, log_every=1, tensorboard=False),
        data=Images(dataset="digits", num_classes=10, image_size=32),
        augment=Augment(mean=(0.5,), std=(0.5,), flip=0.0, scale=(0.9, 1.0), crop=1.0),
        alone=Phase(steps=12, lr=1e-2),
        whole=Phase(steps=2, lr=1e-3),
    )
    return override(config, words)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Trained a little by the task that trains classifiers."""
    config = classifier()
    own = {name: getattr(config, name) for name in ("model", "optim", "loop", "data", "augment")}
    folder = tmp_path_factory.mktemp("vit")
    run(Classification(name="vit_digits", **own), folder, progress=False)
    return folder / "model.safetensors"


def test_a_transformer_of_timm_learns_to_imitate_itself(weights, tmp_path):
    report = graft(classifier(f"teacher={weights}", "layers=blocks.1"), tmp_path, progress=False)
    (layer,) = report.layers
    assert (layer.name, layer.mixer) == ("blocks.1.attn", "linear")
    assert report.student.keys() == {"top1", "top5", "loss", "distance"}
    lines = [json.loads(line) for line in (tmp_path / "alone" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    # what was released opens again, with its mixer
    config = classifier(f"teacher={weights}")
    student = GraftClassifierTask(config).open(tmp_path / "whole")
    assert [row.mixer for row in visionhybrid.describe(student).rows] == [None, "linear"]
    assert validate(student, config, progress=False)["loss"] == pytest.approx(
        report.student["loss"], rel=1e-5
    )


def test_what_no_classifier_can_be_grafted_from(weights, tmp_path):
    with pytest.raises(ConfigError, match="name the weights to imitate"):
        graft(classifier(), tmp_path, progress=False)
    task = GraftClassifierTask(classifier(f"teacher={weights}"))
    with pytest.raises(ConfigError, match=r"other\.safetensors does not fit"):
        task.open(_other(tmp_path))
    with pytest.raises(ConfigError, match=r"no changed layer is called 'blocks\.7'"):
        GraftClassifierTask(classifier(f"teacher={weights}", "features=blocks.7")).parts()


def _other(folder):
    from safetensors.torch import save_file

    save_file({"stem.weight": torch.zeros(2)}, folder / "other.safetensors")
    return folder / "other.safetensors"
