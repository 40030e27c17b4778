"""The command: what it prints, its exit statuses, and that errors are one line unless --debug."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from golden import load_case
from PIL import Image
from toy import randomised
from typer.testing import CliRunner

import visionhybrid
from visionhybrid.cli import app
from visionhybrid.configs.nextvit import nextvit_digits
from visionhybrid.infer.classification import classify, find_images, read_labels
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


@pytest.fixture(scope="module")
def hat(tmp_path_factory):
    """A HAT x2 with random weights in the authors' container."""
    path = tmp_path_factory.mktemp("hat") / "tiny_x2.pth"
    torch.save({"params": {}, "params_ema": load_case("hat_tiny_x2_pad_29x21").state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def nextvit(tmp_path_factory):
    """A classifier of three named classes, as the trainer saves one."""
    torch.manual_seed(0)
    model = randomised(timm.create_model("vh_nextvit_small", num_classes=3, **TINY))
    with torch.no_grad():  # so that different images get different answers, and no answer is certain
        logits = model(torch.randn(16, 3, 32, 32))
        model.head.fc.weight /= logits.std(0)[:, None]
        model.head.fc.bias -= model(torch.randn(16, 3, 32, 32)).mean(0)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32), "crop_pct": 1.0}
    return save(model, tmp_path_factory.mktemp("nextvit") / "tiny.safetensors", classes=["ant", "bee", "cow"])


@pytest.fixture
def photos(tmp_path):
    """A folder with two images, a broken one and a text."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate(((17, 12), (30, 41))):
        noise = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes((folder / "1.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("no image")
    return folder


# ---- list, info, inspect


def test_list_is_a_table_and_json():
    lines = run("list", "--filter", "vh_hat_*_x4").stdout.splitlines()
    assert lines[0].split() == ["name", "task", "scale", "parameters", "weights"]
    assert [line.split()[0] for line in lines[1:]] == ["vh_hat_large_x4", "vh_hat_small_x4"]
    assert lines[2].split()[1:4] == ["restoration", "x4", "9.6M"]
    found = json.loads(run("list", "--task", "classification", "--filter", "vh_next*small", "--json").stdout)
    assert [entry["name"] for entry in found] == ["vh_nextvit_small"]
    assert found[0]["parameters"] == 31_763_368
    assert "vh_nextvit_small.bd_in1k" in found[0]["weights"]


def test_list_of_nothing_fails():
    assert "no model matches 'vh_nothing*'" in run("list", "--filter", "vh_nothing*", status=1).stderr
    assert "task must be one of classification, restoration" in error("list", "--task", "detection")


def test_info_tells_all():
    text = run("info", "vh_nextvit_small").stdout
    for part in (
        "31,763,368",
        "5.8G at 3 x 224 x 224",
        "1024 channels at 1/32",
        "arXiv:2207.05501",
        "bd_in1k_384",
        "Apache",
    ):
        assert part in text
    found = json.loads(run("info", "vh_hat_small_x4.df2k", "--json").stdout)
    assert (found["scale"], found["input_size"], found["output_size"]) == (4, [3, 64, 64], [3, 256, 256])
    assert found["weights"]["df2k"]["file"] == "HAT-S_SRx4.pth"
    assert "bicubic" in found["weights"]["df2k"]["purpose"]


def test_info_of_a_misspelt_name_suggests():
    assert "did you mean 'vh_hat_small_x4'?" in error("info", "hat_smal_x4")


def test_inspect(hat, nextvit):
    text = run("inspect", hat).stdout
    for part in ("params_ema", "hat", "restoration, x2", "window_size = 8"):
        assert part in text
    found = json.loads(run("inspect", nextvit, "--json").stdout)
    assert found["options"]["strides"] == [1, 2, 1, 2]
    assert json.loads(found["metadata"]["classes"]) == ["ant", "bee", "cow"]


def test_inspect_of_unknown_weights_describes_them_and_fails(tmp_path):
    torch.save({"fc.weight": torch.zeros(2, 3)}, tmp_path / "other.pth")
    result = run("inspect", tmp_path / "other.pth", status=1)
    assert "unknown" in result.stdout
    assert "no system recognises these weights" in result.stderr
    assert json.loads(run("inspect", tmp_path / "other.pth", "--json", status=1).stdout)["system"] is None


# ---- classify


def test_classify(nextvit, photos):
    result = run("classify", photos / "0.png", photos / "1.png", "--model", nextvit, "-k", 2)
    lines = result.stdout.splitlines()
    assert [lines[0], lines[3]] == [str(photos / "0.png"), str(photos / "1.png")]
    model = visionhybrid.load(nextvit)
    expected = classify(model, photos / "0.png", topk=2)[0]
    assert [line.split("%  ")[1] for line in lines[1:3]] == [guess.label for guess in expected.guesses]


def test_classify_reports_and_skips_broken_images(nextvit, photos):
    result = run("classify", photos, photos / "none.png", "--model", nextvit, "--json", status=1)
    found = json.loads(result.stdout)
    assert [Path(entry["source"]).name for entry in found] == ["0.png", "1.png", "broken.png", "none.png"]
    assert [len(entry["guesses"]) for entry in found] == [3, 3, 0, 0]
    for guesses in (entry["guesses"] for entry in found[:2]):
        assert sum(guess["probability"] for guess in guesses) == pytest.approx(1, abs=1e-5)
    assert result.stderr.count("error: ") == 2
    assert "none.png: No such file" in result.stderr


def test_classify_takes_a_name_with_weights_and_labels(nextvit, photos, tmp_path):
    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    bare = tmp_path / "bare.pth"
    torch.save({"model": visionhybrid.load(nextvit).state_dict()}, bare)
    options = [word for name in TINY for word in ("-o", f"{name}={json.dumps(TINY[name])}")]
    words = ("classify", photos / "0.png", "--model", bare, "--labels", tmp_path / "names.txt", *options)
    first = run(*words).stdout.splitlines()[1].split()[-1]
    assert (
        first
        == {"ant": "x", "bee": "y", "cow": "z"}[
            classify(visionhybrid.load(nextvit), photos / "0.png")[0].guesses[0].label
        ]
    )
    assert "3 class names" not in first
    text = error("classify", photos / "0.png", "--model", "vh_nextvit_small", "--weights", bare)
    assert "depths is" in text or "does not fit" in text


def test_classify_errors(hat, nextvit, photos, tmp_path):
    assert "HAT has no classes" in error("classify", photos / "0.png", "--model", hat)
    assert "no such file" in error("classify", photos / "0.png", "--model", tmp_path / "no.pth")
    assert "did you mean 'vh_nextvit_base'" in error(
        "classify", photos / "0.png", "--model", "vh_nextvit_bas"
    )
    assert "--weights goes with a registered name" in error(
        "classify", photos / "0.png", "--model", nextvit, "--weights", nextvit, status=2
    )
    assert "takes NAME=VALUE" in error("classify", photos / "0.png", "--model", nextvit, "-o", "x", status=2)
    assert "--device nowhere" in error(
        "classify", photos / "0.png", "--model", nextvit, "--device", "nowhere", status=2
    )
    (tmp_path / "two.txt").write_text("x\ny\n")
    assert "2 class names for 3 classes" in error(
        "classify", photos / "0.png", "--model", nextvit, "--labels", tmp_path / "two.txt"
    )
    (tmp_path / "empty").mkdir()
    assert "no images in this folder" in error("classify", tmp_path / "empty", "--model", nextvit)


def test_classify_turns_images_upright_and_agrees_on_all_kinds(nextvit, tmp_path):
    model = visionhybrid.load(nextvit)
    pixels = torch.rand(3, 40, 32)
    image = Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())
    image.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 8  # shown turned by 90 degrees counter-clockwise
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "turned.png", exif=exif)
    kinds = [
        tmp_path / "upright.png",
        str(tmp_path / "turned.png"),
        Image.open(tmp_path / "turned.png"),
        image,
        pixels,
    ]
    first, *others = classify(model.train(), kinds, batch_size=2)
    assert model.training
    for other in others:
        assert [g.label for g in other.guesses] == [g.label for g in first.guesses]
        assert [g.probability for g in other.guesses] == pytest.approx(
            [g.probability for g in first.guesses], abs=2e-3
        )
    raw = classify(model, image.transpose(Image.Transpose.ROTATE_270))[
        0
    ]  # as a file without EXIF would be seen
    answers = [{g.label: g.probability for g in p.guesses} for p in (raw, first)]
    assert max(abs(answers[0][label] - answers[1][label]) for label in answers[0]) > 0.02
    assert [p.source for p in (first, others[-1])] == [str(tmp_path / "upright.png"), "image 4"]
    assert len(classify(model, torch.rand(2, 3, 32, 32))) == 2
    grey = Image.fromarray(np.full((32, 32), 99, np.uint8))
    assert classify(model, [grey])[0].guesses == classify(model, [grey.convert("RGB")])[0].guesses


def test_classify_a_grey_model_and_imagenet_names(photos):
    model = timm.create_model("vh_nextvit_small", in_chans=1, **TINY).eval()
    guess = classify(model, photos / "0.png", topk=1)[0].guesses[0]
    assert guess.label == timm.data.ImageNetInfo().index_to_description(guess.index)
    for bad in (3, torch.rand(2, 2), torch.rand(2, 8, 8)):
        with pytest.raises(ValueError, match="classify: "):
            classify(model, [bad])
    with pytest.raises(ValueError, match="start at 1"):
        classify(model, photos / "0.png", topk=0)


def test_classify_reports_outputs_that_are_not_finite(nextvit, photos):
    model = visionhybrid.load(nextvit)
    with torch.no_grad():
        model.head.fc.weight.fill_(float("nan"))
    assert classify(model, photos / "0.png")[0].error == "the model's output is not finite"


def test_images_and_labels_files(photos, tmp_path):
    assert [path.name for path in find_images([photos, "x.png"])] == ["0.png", "1.png", "broken.png", "x.png"]
    (tmp_path / "names.json").write_text('["a b", "c"]')
    assert read_labels(tmp_path / "names.json") == ["a b", "c"]
    for text in ("", "[1, "):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json: no "):
            read_labels(tmp_path / "bad.json")


# ---- restore


def test_restore_a_file(hat, photos, tmp_path):
    result = run("restore", photos / "0.png", tmp_path / "out.png", "--model", hat)
    assert "24 x 34" in result.stdout
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (24, 34)
    assert "exists already" in error("restore", photos / "0.png", tmp_path / "out.png", "--model", hat)
    run(
        "restore",
        photos / "0.png",
        tmp_path / "out.png",
        "--model",
        hat,
        "--overwrite",
        "--tile",
        16,
        "--overlap",
        8,
    )


def test_restore_a_folder_skips_broken_files_and_fails(hat, photos, tmp_path):
    result = run("restore", photos, tmp_path / "out", "--model", hat, "--suffix", "_x2", status=1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0_x2.png", "1_x2.png"]
    assert "broken.png" in result.stderr
    assert result.stderr.count("error: ") == 1


def test_restore_refuses_a_classifier_and_a_wrong_scale(hat, nextvit, photos, tmp_path):
    text = error("restore", photos / "0.png", tmp_path / "out.png", "--model", nextvit, status=2)
    assert "is a NextViT, not a restorer" in text
    words = ("restore", photos / "0.png", tmp_path / "out.png", "--model", "vh_hat_x4", "--weights", hat)
    assert "contradicts the weights" in error(*words) or "does not fit" in error(*words)
    assert not (tmp_path / "out.png").exists()


# ---- train, validate


def test_train_validate_classify_round_trip(tmp_path, photos):
    options = ("loop.epochs=none", "loop.steps=2", "loop.validate_every=2", "loop.batch_size=8")
    result = run("train", "nextvit_digits", *options, "--out", tmp_path / "run", "--no-progress")
    assert "top1" in result.stdout
    assert "loop.steps: None -> 2" in result.stderr
    assert run("inspect", tmp_path / "run").stdout.count("strides = [1, 2, 1, 2]") == 1
    steps = next((tmp_path / "run" / "checkpoints").glob("step_*2"))
    again = ("validate", "nextvit_digits", "--limit", 1, "--no-progress", "--json")
    metrics = json.loads(run(*again, "--model", tmp_path / "run").stdout)
    assert 0 <= metrics["top1"] <= 100
    assert json.loads(run(*again, "--model", steps).stdout) == pytest.approx(metrics)
    assert " %  " in run("classify", photos / "0.png", "--model", tmp_path / "run").stdout


def test_train_lists_recipes():
    lines = run("train", "--list").stdout.splitlines()
    names = [line.split()[0] for line in lines]
    assert {"nextvit_digits", "nextvit_small_in1k", "hat_small_x4"} <= set(names)


def test_train_errors(tmp_path):
    assert "a recipe is needed" in error("train", status=2)
    assert "the nearest is 'nextvit_digits'" in error("train", "nextvit_digit", status=2)
    assert "the nearest is 'optim.lr'" in error("train", "nextvit_digits", "optim.lrr=1", status=2)
    assert "optim.lr: expected a number, got 'fast'" in error(
        "train", "nextvit_digits", "optim.lr=fast", status=2
    )
    lines = run(
        "train", "nextvit_small_in1k", f"data.root={tmp_path}", "--out", tmp_path / "r", status=1
    ).stderr.splitlines()
    assert lines[-1].startswith("error: ")


def test_demo_passes_its_options_on(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "visionhybrid.demo.run",
        lambda out, parts, seed: asked.append((out, tuple(parts), seed)) or out / "report.html",
    )
    assert run("demo", "--out", tmp_path).stdout == f"report: {tmp_path / 'report.html'}\n"
    run("demo", "--out", tmp_path, "--seed", 3, "--part", "digits", "--part", "generation")
    assert asked == [(tmp_path, (), 0), (tmp_path, ("digits", "generation"), 3)]

    def short(out, parts, seed):
        raise ValueError("the digits reached 90 %")

    monkeypatch.setattr("visionhybrid.demo.run", short)
    assert error("demo", "--out", tmp_path) == "the digits reached 90 %"


# ---- the command as a whole


def test_every_subcommand_has_help_with_examples():
    commands = ("demo", "list", "info", "inspect", "train", "validate", "classify", "restore")
    text = run("--help").stdout
    for command in commands:
        assert f"  {command} " in text
        help_text = run(command, "--help").stdout
        assert "Examples:" in help_text
        assert f"visionhybrid {command}" in help_text


def test_version():
    assert run("--version").stdout == f"visionhybrid {visionhybrid.__version__}\n"


def test_wrong_usage_is_status_2():
    for words in (["nonsense"], ["info"], ["list", "--nonsense"], ["classify"], ["restore", "a"]):
        assert run(*words, status=2).stderr.startswith("Usage: ")


def test_debug_counts_before_and_after_the_subcommand(tmp_path):
    for words in (["--debug", "inspect", "none.pth"], ["inspect", "none.pth", "--debug"]):
        result = RUNNER.invoke(app, words)
        assert isinstance(result.exception, ValueError)
        assert result.exit_code == 1
    assert error("inspect", "none.pth") == "none.pth: no such file"  # and is forgotten the next time


def test_interrupt_and_bugs_leave_one_line(monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    def bug(*args, **kwargs):
        raise TypeError("two\nlines")

    monkeypatch.setattr("visionhybrid.models.checkpoint.inspect", stop)
    monkeypatch.setitem(vars(visionhybrid), "inspect", stop)
    assert run("inspect", "x.pth", status=130).stderr == "stopped\n"
    monkeypatch.setitem(vars(visionhybrid), "inspect", bug)
    assert error("inspect", "x.pth") == "TypeError: two lines (--debug shows where)"


def process(*words):
    command = [Path(sys.executable).parent / "visionhybrid", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})


def test_as_a_process(tmp_path):
    """The installed script: statuses reach the shell, hostile files are refused, tracebacks only with --debug."""
    done = process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"visionhybrid {visionhybrid.__version__}\n",
        "",
    )
    evil = tmp_path / "evil.pth"
    evil.write_bytes(b"\x80\x02cposix\nsystem\nX\x05\x00\x00\x00true \x85R.")
    done = process("inspect", str(evil))
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == f"error: {evil}: refused, it would run posix.system; only tensors and plain values are read\n"
    )
    done = process("inspect", str(evil), "--debug")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr


def test_the_page_says_what_is_wrong_in_one_line(capsys):
    from visionhybrid import app

    with pytest.raises(SystemExit) as stop:
        app.main(["nowhere.pth"])
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "nowhere.pth" in said or 'pip install "visionhybrid[app]"' in said
