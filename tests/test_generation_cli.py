"""`visionhybrid generate` and `evaluate`, from a run to its numbers."""

import json

import pytest
import tiny_pipelines
from PIL import Image
from typer.testing import CliRunner

from visionhybrid.cli import app
from visionhybrid.data.samples import digits
from visionhybrid.train import find, override, run

WORDS = ["model.options.num_layers=1", "model.options.attention_head_dim=8", "loop.steps=1"]
WORDS += ["loop.batch_size=8", "loop.tensorboard=false", "sampling.steps=1", "sampling.each=1"]


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(override(find("hybrid_dit_digits"), WORDS), folder, progress=False)
    return folder


def test_generate_continues_and_repeats_itself(trained, tmp_path):
    words = ("--label", "7", "--label", "0", "--steps", 2)
    done = call("generate", trained, tmp_path / "a", *words, "--each", 3, "--grid", tmp_path / "grid.png")
    assert done.exit_code == 0, done.output
    files = sorted((tmp_path / "a").rglob("*.png"))
    assert [str(f.relative_to(tmp_path / "a")) for f in files] == [
        f"{label}/0000{i}.png" for label in (0, 7) for i in range(3)
    ]
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (3 * 66, 2 * 66)
    before = {f: f.read_bytes() for f in files}
    files[1].unlink()
    done = call("generate", trained, tmp_path / "a", *words, "--each", 3, "--batch-size", 2)
    assert "6 images" in done.output
    assert {f: f.read_bytes() for f in files} == before
    other = call("generate", trained, tmp_path / "b", *words, "--seed", 1)
    assert other.exit_code == 0
    assert (tmp_path / "b" / "7" / "00000.png").read_bytes() != before[files[3]]


def test_generate_says_what_is_wrong(trained, tmp_path):
    assert "no class 'seven'" in call("generate", trained, tmp_path, "--label", "seven").output
    assert "no pipeline" in call("generate", tmp_path, tmp_path / "out").output


def test_validate_a_generator(trained):
    wanted = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    for folder in (trained, trained / "pipeline"):
        done = call("validate", "hybrid_dit_digits", *WORDS, "--model", folder, "--json")
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert found["loss"] == pytest.approx(wanted[-1]["loss"], rel=1e-4)
    assert "not for it" in call("validate", "hybrid_dit_digits", "--model", trained, "--key", "ema").output


def test_generate_from_prompts(tmp_path):
    tiny_pipelines.sd15().save_pretrained(tmp_path / "pipe")
    words = ("generate", tmp_path / "pipe", tmp_path / "out", "--steps", 1, "--size", 16)
    prompts = ("--prompt", "a cat/dog", "--prompt", "a cat dog")
    done = call(*words, *prompts, "--each", 2)
    assert done.exit_code == 0, done.output
    files = sorted((tmp_path / "out").rglob("*.png"))
    assert [file.name for file in files] == ["00000.png", "00001.png"] * 2
    assert all(file.parent.name.startswith("a-cat-dog-") for file in files)
    assert len({file.read_bytes() for file in files}) == 4
    with Image.open(files[0]) as image:
        assert image.size == (16, 16)
    for wrong in ((), ("--label", "7"), ("--prompt", "a", "--label", "7")):
        assert "give --prompt" in call(*words, *wrong).output


def test_generate_refuses_what_makes_no_pictures_of_prompts(tmp_path):
    tiny_pipelines.dit().save_pretrained(tmp_path)
    done = call("generate", tmp_path, tmp_path / "out", "--prompt", "a cat")
    assert "DiTPipeline does not make pictures of prompts" in done.output


def test_generate_at_another_size(trained, tmp_path):
    done = call("generate", trained, tmp_path, "--label", "3", "--steps", 1, "--size", 12)
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "3" / "00000.png") as image:
        assert image.size == (12, 12)
    assert "--label" in call("generate", trained, tmp_path, "--prompt", "a cat").output


def test_evaluate_two_folders(tmp_path):
    images, _ = digits("val")
    for name, start in (("real", 0), ("generated", 5)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images[start : start + 10]):
            pixels = (image[0] * 255).round().byte().numpy()
            Image.fromarray(pixels).resize((32, 32)).save(tmp_path / name / f"{start + i}.png")
    judge = override(find("nextvit_digits"), ["loop.epochs=none", "loop.steps=1", "loop.tensorboard=false"])
    run(judge, tmp_path / "judge", progress=False)
    words = ("evaluate", tmp_path / "real", tmp_path / "generated")
    done = call(*words, "--model", tmp_path / "judge", "--paired", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["real"] == found["generated"] == 10
    assert found["frechet"] >= 0
    assert found["pairs"] == 5
    assert found["pair_cosine"] == pytest.approx(1)  # the same files
    assert "name what to compare by" in call(*words).output
    assert "download" in call(*words, "--inception", tmp_path / "none.pth").output
    assert "--prompts" in call(*words, "--clip", tmp_path).output
