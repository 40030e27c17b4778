"""`visionhybrid classify` and `restore`: answers, files, broken images, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from commands import TINY, error, hat_file, nextvit_file, photos_folder, run
from PIL import Image

import visionhybrid
from visionhybrid.infer.classification import classify, find_images, read_labels


@pytest.fixture(scope="module")
def hat(tmp_path_factory):
    return hat_file(tmp_path_factory.mktemp("hat"))


@pytest.fixture(scope="module")
def nextvit(tmp_path_factory):
    return nextvit_file(tmp_path_factory.mktemp("nextvit"))


@pytest.fixture
def photos(tmp_path):
    return photos_folder(tmp_path)


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
    deep = Image.fromarray(np.full((32, 32), 99 * 257, np.uint16))
    assert classify(model, [deep])[0].guesses == classify(model, [grey])[0].guesses
    (refused,) = classify(model, [grey.convert("F")])
    assert (refused.source, refused.error[:13]) == ("image 0", "float samples")


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
    with pytest.raises(ValueError, match="an empty path"):
        find_images([photos, ""])
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
