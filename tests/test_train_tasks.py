"""Classification and restoration through the same loop, on real images; what their data refuse."""

from __future__ import annotations

import io
import math
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import visionhybrid
from visionhybrid.data.classification import Digits, LabelledImages, Mix, Shards, TimmSource, open_source
from visionhybrid.data.errors import CorruptSample
from visionhybrid.train import recipes, run, validate
from visionhybrid.train.classify import Classify
from visionhybrid.train.config import Augment, ConfigError, Images, Loop, Model, Pictures, override
from visionhybrid.train.restore import Restore

SMALL_HAT = dict(
    dim=16,
    depths=[1],
    num_heads=[2],
    window_size=8,
    key_window_size=12,
    conv_dim=4,
    gate_dim=2,
    mlp_dim=16,
    tail_dim=8,
)


def digits(**loop_fields):
    config = recipes.find("nextvit_digits")
    fields = dict(epochs=None, steps=4, validate_every=4, log_every=2, batch_size=16)
    return replace(config, loop=replace(config.loop, **{**fields, **loop_fields}))


def photographs(**loop_fields):
    config = recipes.find("hat_samples_x2")
    fields = dict(steps=3, validate_every=3, log_every=1, batch_size=2)
    return replace(
        config,
        model=replace(config.model, options=SMALL_HAT),
        loop=replace(config.loop, **{**fields, **loop_fields}),
        data=replace(config.data, patch=16, held_out_crop=32),
    )


def picture_folder(root, classes, count=3, size=(20, 24), damage=None):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    if damage:
        (root / damage).write_bytes((root / damage).read_bytes()[:60])


# ---- classification


def test_classifier_end_to_end(tmp_path, told):
    result = run(digits(), tmp_path, progress=False)
    assert {"top1", "top5", "loss"} == set(result["metrics"])
    assert all(math.isfinite(v) for v in result["metrics"].values())
    assert next(row for row in result["history"] if row["kind"] == "train")["top1"] >= 0
    with Image.open(tmp_path / "samples" / "step_00000004" / "held_out.png") as sheet:
        assert sheet.size == (8 * 96, 5 * 110)
    model = visionhybrid.load(result["weights"])
    assert model.pretrained_cfg["label_names"] == list("0123456789")
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 32, 32)
    # the released weights are those validated last
    again = validate(tmp_path, recipes.find(str(tmp_path)))
    assert again == pytest.approx(result["metrics"], abs=1e-6)
    assert (told[0], told) == (0, sorted(told))
    assert 0 < told[-1] < 1
    assert validate(model, "nextvit_digits", limit=1).keys() == again.keys()


def test_any_timm_model_can_be_trained(tmp_path):
    config = replace(
        digits(steps=1, validate_every=1), model=Model(name="test_vit", options={"img_size": 32})
    )
    result = run(config, tmp_path, progress=False)
    again = timm.create_model("test_vit", img_size=32, num_classes=10, checkpoint_path=result["weights"])
    assert validate(again, config) == pytest.approx(result["metrics"], abs=1e-6)


def test_starting_from_weights(tmp_path):
    first = run(digits(steps=1, validate_every=1), tmp_path / "first", progress=False)
    config = override(digits(steps=1, validate_every=1), [f"model.start={tmp_path / 'first'}", "optim.lr=0"])
    config = override(config, ["schedule.warmup_lr=0", "schedule.min_lr=0"])
    # with a rate of 0 only the running statistics move
    second = run(config, tmp_path / "second", progress=False)
    a, b = (visionhybrid.load(r["weights"]).state_dict() for r in (first, second))
    assert all(
        torch.equal(a[name], b[name]) for name in a if "running" not in name and "num_batches" not in name
    )
    notes = [row["text"] for row in second["history"] if row["kind"] == "note"]
    assert notes[0].startswith(f"started from {tmp_path / 'first'}: ")
    other = override(config, ["data.num_classes=11"])
    with pytest.raises(ValueError, match=r"data.num_classes is 11, but digits has 10 classes"):
        run(other, tmp_path / "third", progress=False)


def test_start_must_fit_exactly_unless_told(tmp_path):
    run(photographs(steps=1, validate_every=1), tmp_path / "x2", progress=False)
    config = photographs(steps=1, validate_every=1)
    x4 = replace(
        config,
        model=replace(config.model, name="vh_hat_small_x4", start=str(tmp_path / "x2")),
        data=replace(config.data, scale=4, patch=8, held_out_crop=16),
    )
    with pytest.raises(ConfigError, match="does not fit exactly"):
        run(x4, tmp_path / "strict", progress=False)
    result = run(override(x4, ["model.start_strict=false"]), tmp_path / "x4", progress=False)
    note = next(row["text"] for row in result["history"] if row["kind"] == "note")
    assert "tensors loaded; " in note
    assert "new" in note


def test_augmentation_depends_on_the_seed_only():
    config = replace(digits(), augment=replace(Augment(), policy="rand-m9-mstd0.5-inc1", erase=0.9, crop=1.0))
    data = Classify(config).train_set
    a, b, c = data.sample(3, 7)["image"], data.sample(3, 7)["image"], data.sample(3, 8)["image"]
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.shape == (3, 32, 32)


def test_mix_depends_on_the_seed_only():
    mixing = Mix(4, mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1)

    def mixed(seed):
        return mixing(
            {
                "image": torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
                "label": torch.arange(4),
            },
            seed,
        )

    assert torch.equal(mixed(1)["image"], mixed(1)["image"])
    assert not torch.equal(mixed(1)["image"], mixed(2)["image"])
    torch.testing.assert_close(mixed(1)["label"].sum(1), torch.ones(4))
    with pytest.raises(ValueError, match="mixup needs an even batch"):
        mixing({"image": torch.rand(3, 1, 8, 8), "label": torch.arange(3)}, 0)


def folder_config(folder, **data):
    fields = dict(dataset="", root=str(folder), held_out="val", num_classes=2, image_size=32)
    return replace(digits(batch_size=2, steps=2, validate_every=2), data=Images(**{**fields, **data}))


def test_folder_of_images(tmp_path):
    for split in ("train", "val"):
        picture_folder(tmp_path / "data" / split, ["cat", "dog"])
    broken = tmp_path / "data" / "train" / "cat" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    result = run(folder_config(tmp_path / "data"), tmp_path / "run", progress=False)
    assert visionhybrid.load(result["weights"]).pretrained_cfg["label_names"] == ["cat", "dog"]
    task = Classify(folder_config(tmp_path / "data"))
    assert len(task.train_set) == 6
    with pytest.raises(CorruptSample, match="image 1: OSError"):
        task.train_set.sample(1, 0)
    assert [int(task.train_set.sample(i, 0)["label"]) for i in (0, 2, 3, 4, 5)] == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("prepare", "change", "message"),
    [
        (
            lambda root: None,
            {"root": "/no/such/place"},
            "data.root: no such folder or tar file: /no/such/place",
        ),
        (lambda root: None, {"root": ""}, r"data.root: no such folder or tar file: \(empty\)"),
        (lambda root: (root / "train").mkdir(), {}, "split 'train'.*"),
        (
            lambda root: picture_folder(root / "train", ["a", "b", "c"]),
            {"held_out": "train"},
            "data.num_classes is 2, but .* has 3 classes",
        ),
        (
            lambda root: (
                picture_folder(root / "train", ["a", "b"]),
                picture_folder(root / "val", ["a", "z"]),
            ),
            {},
            "training and held-out classes of .* differ, first in 'b'",
        ),
        (lambda root: None, {"dataset": "tfds/mnist"}, "data.dataset: 'tfds/mnist' is a stream"),
        (lambda root: None, {"dataset": "wds"}, "data.root: no tar files in"),
    ],
)
def test_data_refused_in_one_line(tmp_path, prepare, change, message):
    prepare(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        Classify(folder_config(tmp_path, **change))
    assert "\n" not in str(error.value)


def test_webdataset_shards_are_indexed(tmp_path):
    expected = []
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:04}.tar", "w") as tar:
            for i in range(3):
                pixels = np.full((5, 6, 3), 40 * i + shard, dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "png")
                add(tar, f"{i:03}.png", file.getvalue())
                add(tar, f"{i:03}.cls", str(i % 2).encode())
                expected.append((40 * i + shard, i % 2))
            add(tar, "999.png", b"no label beside it")
    source = Shards(str(tmp_path), "train")
    found = [(np.asarray(image)[0, 0, 0], label) for image, label in map(source.read, range(len(source)))]
    assert found == expected
    assert open_source("wds", str(tmp_path), "train").read(4)[1] == 1
    (tmp_path / "0002.tar").write_bytes(b"x" * 600)
    with pytest.raises(ValueError, match=r"0002.tar is not a tar file"):
        Shards(str(tmp_path), "train")


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


# timm's reader leaves its tar file open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_tar_through_timm(tmp_path):
    picture_folder(tmp_path / "plain", ["a", "b"], count=2)
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(tmp_path / "plain", arcname="")
    source = TimmSource("", str(tmp_path / "set.tar"), "train")
    assert (len(source), source.classes) == (4, ("a", "b"))
    assert LabelledImages(source, lambda image: torch.tensor(image.size)).sample(0, 0)["image"].tolist() == [
        24,
        20,
    ]


def test_digits_are_split():
    train, held_out = Digits("train"), Digits("val")
    assert (len(train), len(held_out)) == (1442, 355)
    seen = {train.images[i].tobytes() for i in range(len(train))}
    assert sum(held_out.images[i].tobytes() in seen for i in range(len(held_out))) == 0


# ---- restoration


def test_restorer_end_to_end(tmp_path, told):
    result = run(photographs(), tmp_path, progress=False)
    metrics = result["metrics"]
    assert set(metrics) == {"psnr", "ssim", "psnr_bicubic"}
    assert 20 < metrics["psnr_bicubic"] < 40
    sheets = sorted(path.name for path in (tmp_path / "samples" / "step_00000003").iterdir())
    assert len(sheets) == 4
    with Image.open(tmp_path / "samples" / "step_00000003" / sheets[0]) as sheet:
        assert sheet.size == (3 * (64 + 4), 64 + 16)
    model = visionhybrid.load(result["weights"])
    assert (model.scale, model(torch.rand(1, 3, 9, 7)).shape) == (2, (1, 3, 18, 14))
    assert validate(model, recipes.find(str(tmp_path))) == pytest.approx(metrics, abs=1e-3)
    assert told == [0, 0.25, 0.5, 0.75]


def test_restoration_from_folders(tmp_path):
    picture_folder(tmp_path, ["high", "held"], size=(48, 40), damage="high/1.png")
    config = override(
        photographs(),
        [f"data.high={tmp_path / 'high'}", f"data.held_out_high={tmp_path / 'held'}", "data.source=folder"],
    )
    result = run(config, tmp_path / "run", progress=False)
    assert any("1.png" in row.get("text", "") for row in result["history"])
    assert result["metrics"]["psnr"] > 0
    nothing = run(override(config, ["data.held_out_high="]), tmp_path / "run2", progress=False)
    assert nothing["metrics"] == {}


@pytest.mark.parametrize("degradation", ["noise", "jpeg"])
def test_same_size_restoration(tmp_path, degradation):
    config = photographs(steps=1, validate_every=1)
    config = replace(
        config,
        model=replace(config.model, name="vh_hat_small_x1"),
        data=Pictures(
            source="samples", degradation=degradation, strength=(25.0,), scale=1, patch=16, held_out_crop=32
        ),
    )
    assert set(run(config, tmp_path, progress=False)["metrics"]) == {"psnr", "ssim"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.source=folder"], "data.high: name a folder"),
        (["data.source=folder", "data.high=/no/such/place"], "/no/such/place"),
        (["data.source=pairs", "data.high=/tmp"], "data.low: name a folder"),
        (["data.scale=3"], "data.scale is 3, but vh_hat_small_x2 has scale 2"),
        (["data.degradation=noise"], r"data.scale: noise keeps the size \(scale 1\), got 2"),
        (["data.degradation=noise", "data.scale=1"], "data.strength: noise needs a sigma"),
        (["loop.batch_size=999999"], "loop.batch_size: 999999 is larger than the data set"),
    ],
)
def test_pictures_refused_in_one_line(tmp_path, words, message):
    with pytest.raises(ValueError, match=message) as error:
        run(override(photographs(), words), tmp_path, progress=False)
    assert "\n" not in str(error.value)


def test_restoration_of_one_channel(tmp_path):
    config = override(photographs(steps=1, validate_every=1), ["data.channels=1"])
    assert Restore(config).parts()["model"].in_chans == 1
    assert run(config, tmp_path, progress=False)["metrics"]["psnr"] > 0


def test_dry_run_of_both():
    for config in (digits(), photographs()):
        result = run(config, "unused", dry_run=True, progress=False)
        assert result["memory"]["activations"] > result["memory"]["parameters"] > 0
        assert Loop(steps=1).workers == 4
