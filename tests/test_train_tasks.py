"""Classification and restoration through the same loop, on real images; what their data refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import timm
import torch
from pictures import picture_folder
from PIL import Image

import visionhybrid
from visionhybrid.data.classification import Mix
from visionhybrid.train import recipes, run, validate
from visionhybrid.train.classify import Classify
from visionhybrid.train.config import Augment, ConfigError, Loop, Model, Pictures, override
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
    model.reset_classifier(7)
    with pytest.raises(ValueError, match=r"the data have 10 classes, the model makes \(7,\) of an image"):
        validate(model, "nextvit_digits", limit=1)


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
    same_size = timm.create_model("vh_hat_small_x1", **{**SMALL_HAT, "scale": 1})
    with pytest.raises(
        ValueError, match=r"the data are at x2, the model made \(3, 32, 32\) of \(3, 32, 32\)"
    ):
        validate(same_size, recipes.find(str(tmp_path)), limit=1)


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
