"""What the authors of A2Mamba train with beside the ordinary: a loss towards the averaged weights, batch norms over all processes."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_resume import run_until
from torch import nn
from train_case import outcome

import visionhybrid
from visionhybrid.train import recipes, run, start
from visionhybrid.train.classify import Classify
from visionhybrid.train.config import Classification, ConfigError, Model
from visionhybrid.train.loop import Trainer

STEPS_PER_EPOCH = 179  # roughly: the digits in batches of 8
A2MAMBA = dict(
    depths=[1, 1, 1, 1],
    dims=[8, 8, 16, 16],
    num_heads=[2, 2, 2, 2],
    kernel_sizes=[3, 3, 3, 3],
    proj_dim=16,
    drop_path_rate=0.5,
)


def digits(**fields) -> Classification:
    """Four steps, of which the last two are in the "epoch" from which on the averaged weights count."""
    config = recipes.find("a2mamba_digits")
    short = dict(epochs=None, steps=4, batch_size=8, validate_every=4, checkpoint_every=1, log_every=1)
    return replace(
        config,
        model=Model(name="vh_a2mamba_nano", options=A2MAMBA),
        loop=replace(config.loop, **short, ema_decay=0.5),
        augment=replace(config.augment, mixup=0.8),
        **{"mesa": 1.5, "mesa_start": 1.5 / STEPS_PER_EPOCH, **fields},
    )


def test_loss_towards_the_averaged_weights(tmp_path):
    trainer = Trainer(digits(), tmp_path, progress=False)
    # with opinions, so that what is taught differs from the labels
    trainer.main.bare.head.fc.weight.data.mul_(30)
    batches = trainer.batches()
    for step in range(2):
        values = trainer.update(next(batches))
        assert "mesa" not in values
        trainer.step = step + 1
    batch = next(batches)
    model, teacher = trainer.main.bare, copy.deepcopy(trainer.main.bare).eval()
    teacher.load_state_dict(trainer.ema.average)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    label = batch.tensors["label"]
    with torch.no_grad():
        taught = teacher(batch.tensors["image"]).softmax(1)
    with trainer.evaluating() as averaged:
        torch.testing.assert_close(averaged(batch.tensors["image"]).softmax(1), taught)
    trained = []

    def keep(module, args, output):
        if module.training:  # the teacher's pass, with the same module, is over
            assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())
            trained.append(output.detach().clone())

    model.register_forward_hook(keep)
    values = trainer.update(batch)
    (logits,) = trained
    plain, towards = (F.cross_entropy(logits, target).item() for target in (label, taught))
    assert values["mesa"] == pytest.approx(towards, rel=1e-5)
    assert values["loss"] == pytest.approx(plain + 1.5 * towards, rel=1e-5)
    assert towards != pytest.approx(plain, rel=1e-3)


def test_a_killed_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    config = digits()
    run(config, tmp_path / "whole", progress=False)
    expected = outcome(tmp_path / "whole")
    assert ["mesa" in row for row in expected["log"] if row["kind"] == "train"] == [False, False, True, True]
    run_until(config, tmp_path / "killed", 3, monkeypatch)
    run(config, tmp_path / "killed", progress=False)
    assert outcome(tmp_path / "killed") == expected


def test_a_dry_run_asks_the_averaged_weights(monkeypatch):
    asked, consult = [], Classify.consult
    monkeypatch.setattr(Classify, "consult", lambda *args: asked.append(consult(*args)) or asked[-1])
    run(digits(), "unused", dry_run=True, progress=False)
    assert ["averaged" in batch for batch in asked] == [True]


def test_no_averaged_weights_no_loss_towards_them(tmp_path):
    config = digits()
    with pytest.raises(ConfigError, match=r"mesa: needs averaged weights, set loop\.ema_decay"):
        run(replace(config, loop=replace(config.loop, ema_decay=None)), tmp_path, progress=False)


def test_batch_norms_over_all_processes(tmp_path, monkeypatch):
    """One process needs none; on a GPU of several all are converted, under the same keys; gloo has none and says so."""
    config = digits(sync_batch_norm=True)
    result = run(config, tmp_path, progress=False)
    weights = visionhybrid.load(result["weights"]).state_dict()

    def among(processes, device):
        here = SimpleNamespace(num_processes=processes, device=torch.device(device))
        monkeypatch.setattr(start, "PartialState", lambda: here)
        net = start.create(config.model, [], num_classes=10)
        return start.synchronised(net)

    plain, net = among(1, "cuda"), among(2, "cuda")
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in plain.modules())
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(module, nn.SyncBatchNorm) for module in norms)
    net.load_state_dict(weights, strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = visionhybrid.load(result["weights"])(x)
        torch.testing.assert_close(net.eval()(x), want)
        torch.testing.assert_close(net.deploy()(x), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="sync_batch_norm: torch has no batch norm over processes on cpu"):
        among(2, "cpu")


def test_recipes_of_the_authors():
    found = {
        size: recipes.find(f"a2mamba_{size}_in1k") for size in ("nano", "tiny", "small", "base", "large")
    }
    assert all(config.sync_batch_norm for config in found.values())
    assert {size: config.mesa for size, config in found.items()} == dict(
        nano=0.0, tiny=1.0, small=1.0, base=1.5, large=2.0
    )
    assert all(config.mesa_start == 75 for config in found.values() if config.mesa)
