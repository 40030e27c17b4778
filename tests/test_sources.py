"""Labelled images from wherever they may lie, through training; what is refused, and what is left out."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import picture_folder
from PIL import Image

import visionhybrid
from visionhybrid.data.classification import Digits, LabelledImages, open_source, open_splits
from visionhybrid.data.errors import CorruptSample
from visionhybrid.data.tars import Shards
from visionhybrid.train import recipes, run
from visionhybrid.train.classify import Classify
from visionhybrid.train.config import Augment, Images


def folder_config(folder, **data):
    base = recipes.find("nextvit_digits")
    fields = dict(dataset="", root=str(folder), held_out="val", num_classes=2, image_size=32)
    loop = replace(base.loop, epochs=None, steps=2, validate_every=2, log_every=2, batch_size=2)
    return replace(base, loop=loop, data=Images(**{**fields, **data}))


def test_folder_of_images(tmp_path):
    for split in ("train", "val"):
        picture_folder(tmp_path / "data" / split, ["cat", "dog"])
    for broken in ("train/cat/1.png", "val/dog/2.png"):
        path = tmp_path / "data" / broken
        path.write_bytes(path.read_bytes()[:60])
    config = folder_config(tmp_path / "data")
    config = replace(config, augment=replace(config.augment, interpolation="random"))
    result = run(config, tmp_path / "run", progress=False)
    model = visionhybrid.load(result["weights"])
    assert model.pretrained_cfg["label_names"] == ["cat", "dog"]
    assert model.pretrained_cfg["interpolation"] == "bicubic"  # nothing is random when a file is classified
    assert visionhybrid.classify(model, tmp_path / "data" / "val" / "cat" / "0.png")[0].guesses
    notes = [row["text"] for row in result["history"] if row["kind"] == "note"]
    assert "held-out images left out, as they cannot be read: 1 of 6" in notes
    task = Classify(folder_config(tmp_path / "data"))
    assert len(task.train_set) == 6
    with pytest.raises(CorruptSample, match=r"cat/1\.png: OSError"):
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
        (lambda root: None, {"dataset": "digitz"}, "data.dataset: no 'digitz'; have '' "),
        (lambda root: None, {"root": __file__}, "data: .*test_sources.py, split 'train': "),
        (
            lambda root: picture_folder(root / "train", ["a", "b"]),
            {"held_out": "test"},
            "data.held_out: .* has no split 'test' of its own",
        ),
        (
            lambda root: picture_folder(root, ["a", "b"]),
            {},
            "data.held_out: .* has no split 'val' of its own",
        ),
        (
            lambda root: shard(root / "0.tar", [b"", b""]),
            {"dataset": "wds", "num_classes": 1, "held_out": "train"},
            "data.num_classes is 1, but .* has label 1",
        ),
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


def shard(path, images):
    """A webdataset shard of `images` with the labels 0, 1, ..."""
    with tarfile.open(path, "w") as tar:
        for i, image in enumerate(images):
            add(tar, f"{i}.png", image)
            add(tar, f"{i}.cls", str(i).encode())


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def packed(path, folder):
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname="")


def test_tar_files_of_both_splits(tmp_path):
    (tmp_path / "set").mkdir()
    for split in ("train", "validation"):
        picture_folder(tmp_path / split, ["a", "b"], count=2)
        packed(tmp_path / "set" / f"{split}.tar", tmp_path / split)
    train, held_out = open_splits("", str(tmp_path / "set"), "train", "val")
    assert (len(train), train.classes, train.labels()) == (4, ("a", "b"), [0, 0, 1, 1])
    assert (train.name(2), held_out.name(2)) == tuple(
        f"{tmp_path}/set/{split}.tar:b/0.png" for split in ("train", "validation")
    )
    images = LabelledImages(train, lambda image: torch.from_numpy(np.array(image)))
    for i in (3, 0):
        file = tmp_path / "train" / ("ab"[i // 2]) / f"{i % 2}.png"
        assert images.sample(i, 0)["image"].equal(torch.from_numpy(np.array(Image.open(file))))


def test_tar_of_tars(tmp_path):
    """As ImageNet's training images come: a tar file for each class."""
    picture_folder(tmp_path / "plain", ["a", "b"], count=2)
    (tmp_path / "inner").mkdir()
    for name in ("a", "b"):
        packed(tmp_path / "inner" / f"{name}.tar", tmp_path / "plain" / name)
    packed(tmp_path / "set.tar", tmp_path / "inner")
    source = open_source("", str(tmp_path / "set.tar"), "train")
    found = {(label, np.asarray(image).tobytes()) for image, label in map(source.read, range(4))}
    files = [(i, tmp_path / "plain" / name / f"{j}.png") for i, name in enumerate("ab") for j in (0, 1)]
    assert found == {(label, np.asarray(Image.open(file)).tobytes()) for label, file in files}
    with pytest.raises(ValueError, match=r"set.tar has no split 'val' of its own"):
        open_splits("", str(tmp_path / "set.tar"), "train", "val")
    same, too = open_splits("", str(tmp_path / "set.tar"), "train", "train")
    assert len(same) == len(too) == 4


def test_damage_found_by_a_loading_process_is_one_line(tmp_path):
    for split in ("train", "val"):
        picture_folder(tmp_path / "data" / split, ["cat", "dog"])
    for path in (tmp_path / "data" / "train").rglob("*.png"):
        path.write_text("not an image")
    config = folder_config(tmp_path / "data")
    config = replace(config, loop=replace(config.loop, workers=1))
    with pytest.raises(ValueError, match=r"10 samples in a row .*\.png: not an image") as error:
        run(config, tmp_path / "run", progress=False)
    assert "\n" not in str(error.value)


def test_policy_that_timm_does_not_know(tmp_path):
    with pytest.raises(ValueError, match=r"augment\.policy: timm cannot read 'randx'"):
        Classify(replace(recipes.find("nextvit_digits"), augment=Augment(policy="randx")))


def test_digits_are_split():
    train, held_out = Digits("train"), Digits("val")
    assert (len(train), len(held_out)) == (1442, 355)
    seen = {train.images[i].tobytes() for i in range(len(train))}
    assert sum(held_out.images[i].tobytes() in seen for i in range(len(held_out))) == 0
