"""The loop's parts: guard, memory, schedules, averages, what a run leaves behind."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from train_case import Toy, ToyTask, outcome, toy

from visionhybrid.train import loop, recipes, run, state
from visionhybrid.train.config import ConfigError, Guard, Model, Schedule, from_json, override
from visionhybrid.train.ema import Ema
from visionhybrid.train.guard import DivergedError
from visionhybrid.train.log import read
from visionhybrid.train.schedule import Rate

# ---- guard


class Poisoned(ToyTask):
    """Losses of the steps in `steps` (as long as the data order is the first one) are made `value`."""

    steps: tuple[int, ...] = ()
    value = math.nan
    trainer: loop.Trainer | None = None

    def loss(self, part, parts, batch):
        loss, logs = super().loss(part, parts, batch)
        assert self.trainer is not None
        if self.trainer.step in self.steps and self.trainer.position.order < 1:
            loss = loss * self.value
            # as a NaN in the input would do
            parts["model"][1].running_mean.data.fill_(math.nan)
        return loss, logs


def poisoned(tmp_path, steps, value=math.nan, config: Toy | None = None):
    config = config or toy()
    trainer = loop.Trainer(config, tmp_path, progress=False)
    task = Poisoned(config)
    task.steps, task.value, task.trainer, trainer.task = steps, value, trainer, task
    tmp_path.mkdir(parents=True, exist_ok=True)
    trainer.log.open(0)
    trainer.save()
    return trainer


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_left_out_and_leaves_no_trace(tmp_path, value):
    trainer = poisoned(tmp_path, (4, 7), value)
    trainer.fit()
    assert (trainer.watch.skipped, trainer.watch.nonfinite, trainer.watch.rollbacks) == (2, 2, 0)
    assert trainer.step == 12
    assert all(t.isfinite().all() for t in trainer.main.bare.state_dict().values())
    assert math.isfinite(trainer.metrics["error"])
    assert f"step 4: update left out, loss is {value}" in [row.get("text") for row in read(trainer.log.path)]


def test_spike_is_left_out(tmp_path):
    config = replace(toy(), guard=Guard(spike=5, warm=3))
    trainer = poisoned(tmp_path, (6,), 1e3, config)
    trainer.fit()
    assert (trainer.watch.skipped, trainer.watch.nonfinite) == (1, 0)
    calm = poisoned(tmp_path / "calm", (6,), 1e3, replace(config, guard=Guard(spike=0)))
    calm.fit()
    assert calm.watch.skipped == 0


def test_rolls_back_with_another_order(tmp_path):
    config = replace(toy(), guard=Guard(in_a_row=3))
    trainer = poisoned(tmp_path, tuple(range(5, 12)), config=config)
    trainer.fit()
    texts = [row["text"] for row in read(trainer.log.path) if row["kind"] == "note"]
    assert any("3 updates in a row left out; back to step 5" in text for text in texts)
    assert (trainer.step, trainer.watch.rollbacks, trainer.position.order) == (12, 1, 1)
    steps = [row["step"] for row in read(trainer.log.path) if row["kind"] == "train"]
    assert steps == sorted(set(steps))
    assert trainer.watch.skipped == 3


def test_gives_up_in_the_end(tmp_path):
    class Always(Poisoned):
        def loss(self, part, parts, batch):
            loss, logs = ToyTask.loss(self, part, parts, batch)
            return loss * math.nan, logs

    trainer = poisoned(tmp_path, (), config=replace(toy(), guard=Guard(in_a_row=2, rollbacks=2)))
    trainer.task = Always(trainer.config)
    with pytest.raises(DivergedError, match=r"went astray 3 times after step 0; lower optim.lr"):
        trainer.fit()


# ---- memory


def test_out_of_memory_halves_the_micro_batch(tmp_path, monkeypatch):
    """The run that met its limit equals, bit for bit, one that had the smaller micro-batch from the start."""
    loss = ToyTask.loss

    def small(self, part, parts, batch):
        result = loss(self, part, parts, batch)  # the failed pass has already changed running statistics
        if len(batch["x"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return result

    run(toy(loop_micro_batch=2), tmp_path / "small", progress=False)
    monkeypatch.setattr(ToyTask, "loss", small)
    result = run(toy(), tmp_path / "large", progress=False)
    notes = [row["text"] for row in result["history"] if row["kind"] == "note"]
    assert notes[:-1] == [
        "out of memory: micro-batch 6 -> 3, same effective batch",
        "out of memory: micro-batch 3 -> 2, same effective batch",
    ]
    large, expected = outcome(tmp_path / "large"), outcome(tmp_path / "small")
    assert large == expected


def test_out_of_memory_with_one_sample_is_an_error(tmp_path, monkeypatch):
    def never(self, part, parts, batch):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    monkeypatch.setattr(ToyTask, "loss", never)
    with pytest.raises(loop.MemoryLimitError, match="out of memory with 1 sample"):
        run(toy(), tmp_path, progress=False)


def test_other_runtime_errors_are_not_taken_for_it(tmp_path, monkeypatch):
    def broken(self, part, parts, batch):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(ToyTask, "loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(toy(), tmp_path, progress=False)


def test_accumulation_is_the_whole_batch(tmp_path):
    """Without dropout and batch norm, micro-batches of 4 + 2 give the gradient of 6."""
    results = []
    for name, micro in (("whole", 6), ("parts", 4)):
        config = toy(dropout=0.0, norm=False, loop_micro_batch=micro, loop_steps=3, loop_ema_decay=None)
        trainer = loop.Trainer(config, tmp_path / name, progress=False)
        trainer.update(next(trainer.batches()))
        results.append(torch.cat([p.detach().flatten() for p in trainer.main.bare.parameters()]))
    torch.testing.assert_close(*results)


# ---- schedules


def rates(schedule: Schedule, lr: float, total: int, per_epoch: int, steps) -> list[float]:
    rate = Rate(schedule, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr), total, per_epoch)
    return [rate.set(step) for step in steps]


def test_nextvit_schedule_is_the_authors_log():
    config = recipes.find("nextvit_small_in1k")
    epochs = (0, 1, 2, 20, 21, 149, 299)
    found = rates(config.schedule, config.optim.lr, 300 * 625, 625, [625 * e + 300 for e in epochs])
    expected = [1e-6, 1e-6, 1.0095e-4, 1.90005e-3, 1.97825e-3, 1.0258e-3, 1.0e-5]
    assert found == pytest.approx(expected, rel=3e-2)
    assert found[:3] == pytest.approx(expected[:3], rel=1e-6)


def test_hat_milestones_take_effect_at_the_next_iteration():
    config = recipes.find("hat_x2")
    # the authors count iterations from 1: iteration 250,001 is our step 250,000
    steps = (0, 249_999, 250_000, 399_999, 400_000, 450_000, 474_999, 475_000, 499_999)
    found = rates(config.schedule, config.optim.lr, 500_000, 1000, steps)
    assert found == [2e-4, 2e-4, 1e-4, 1e-4, 5e-5, 2.5e-5, 2.5e-5, 1.25e-5, 1.25e-5]


def test_cooldown_stays_at_the_floor():
    config = recipes.find("a2mamba_tiny_in1k")
    found = rates(
        config.schedule, config.optim.lr, 310 * 10, 10, [10 * e for e in (1, 5, 6, 150, 299, 301, 305, 309)]
    )
    assert found[:3] == pytest.approx([1e-6, 1.6e-3, 2e-3], rel=2e-3)
    assert found[3] == pytest.approx(1.01e-3, rel=1e-2)
    assert found[4] > 1e-5
    assert found[5:] == pytest.approx([1e-5] * 3)


@pytest.mark.parametrize("name", ["cosine", "tanh", "poly", "step", "multistep", "constant"])
def test_schedules_need_only_the_step(name):
    schedule = Schedule(name=name, warmup=5, warmup_lr=1e-4, every=10, milestones=(20, 30), min_lr=1e-5)
    forward = rates(schedule, 1e-2, 50, 10, range(50))
    assert forward[0] == 1e-4
    assert max(forward) <= 1e-2
    for step in (0, 4, 5, 17, 31, 49):
        assert rates(schedule, 1e-2, 50, 10, [step]) == [forward[step]]


def test_layer_decay_is_kept_by_the_schedule():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    optimizer.param_groups[0]["lr_scale"] = 0.5
    for name in ("constant", "cosine"):
        Rate(Schedule(name=name, warmup=0), optimizer, 10, 10).set(0)
        assert optimizer.param_groups[0]["lr"] == 0.5


# ---- averages


def test_ema_by_hand():
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    ema = Ema(net, 0.75)
    values = [float(net[0].weight.detach())]
    for step, new in enumerate((2.0, -1.0, 0.5), 1):
        with torch.no_grad():
            net[0].weight.fill_(new)
            net[1].num_batches_tracked += 1
        ema.update(net, step)
        values.append(0.75 * values[-1] + 0.25 * new)
    assert float(ema.average["0.weight"]) == pytest.approx(values[-1])
    assert int(ema.average["1.num_batches_tracked"]) == 3
    with ema.applied(net):
        assert float(net[0].weight.detach()) == pytest.approx(values[-1])
    assert float(net[0].weight.detach()) == 0.5
    warm = Ema(net, 0.75, warmup=True)
    with torch.no_grad():
        net[0].weight.fill_(1.5)
    warm.update(net, 1)
    assert float(warm.average["0.weight"]) == pytest.approx(0.5 + (1 - 2 / 11) * 1.0)


# ---- a run as a whole


def test_what_a_run_leaves_and_returns(tmp_path):
    config = toy(loop_log_every=4)
    result = run(config, tmp_path / "run", progress=False)
    assert result["steps"] == 12
    assert set(result["metrics"]) == {"error"}
    assert [row["step"] for row in result["history"] if row["kind"] == "train"] == [4, 8, 12]
    assert [row["step"] for row in result["history"] if row["kind"] == "validation"] == [5, 10, 12]
    row = result["history"][0]
    assert {"loss", "grad_norm", "lr", "epoch", "order", "skipped", "corrupt"} <= row.keys()
    assert (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0] == "step,epoch,error,seconds"
    assert recipes.find(str(tmp_path / "run")) == config
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["torch"] == torch.__version__
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"| error | {result['metrics']['error']:.4f} |" in report
    assert "`optim.lr` | `0.01`" in report
    again = run(config, tmp_path / "run", progress=False)  # finished already: nothing is trained
    assert again["metrics"] == result["metrics"]
    with pytest.raises(ValueError, match="already holds a run"):
        run(config, tmp_path / "run", resume=False, progress=False)


def test_best_checkpoint_is_kept(tmp_path, monkeypatch):
    errors = iter([0.5, 0.2, 0.9, 0.8, 0.7, 0.6])
    monkeypatch.setattr(ToyTask, "validate", lambda *args: {"error": next(errors)})
    run(toy(loop_validate_every=2, loop_keep=1), tmp_path, progress=False)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000004", "step_00000012"]


def test_a_changed_config_is_written_down(tmp_path):
    run(toy(), tmp_path, progress=False)
    longer = override(toy(), ["loop.steps=14", "optim.weight_decay=0.5"])
    result = run(longer, tmp_path, progress=False)
    notes = [row["text"] for row in result["history"] if row["kind"] == "note"]
    assert "config changed: loop.steps: 12 -> 14" in notes
    assert result["steps"] == 14
    last = state.read(state.newest(tmp_path / "checkpoints")[0])[1]
    groups = last["optimizers"]["model"]["param_groups"]
    assert max(group["weight_decay"] for group in groups) == 0.5
    (tmp_path / "config.json").write_text('{"task": "toy", "of_another_version": 1}')
    notes = [row["text"] for row in run(longer, tmp_path, progress=False)["history"] if row["kind"] == "note"]
    assert "config changed; the one before cannot be read: no field 'of_another_version'" in " ".join(notes)
    assert from_json((tmp_path / "config.json").read_text()) == longer


def test_tensorboard(tmp_path):
    run(toy(loop_tensorboard=True), tmp_path, progress=False)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_dry_run_touches_nothing_and_measures(tmp_path):
    config = toy(loop_ema_decay=0.9)
    result = run(config, tmp_path / "none", dry_run=True, progress=False)
    assert not (tmp_path / "none").exists()
    assert set(result["seconds"]) == {"data", "train", "validate and sample", "save", "load"}
    parameters = (8 * 16 + 16) + 2 * 16 + (16 + 1)
    memory = result["memory"]
    assert memory["parameters"] == memory["gradients"] == 4 * parameters
    assert 8 * parameters <= memory["optimiser"] <= 8 * parameters + 64  # and a step count each
    # input 6x8, and what norm, GELU, dropout and the second layer keep of 6x16
    assert 4 * 6 * (8 + 3 * 16) <= memory["activations"] <= 4 * 6 * (8 + 6 * 16) + 1024
    smaller = run(toy(loop_micro_batch=2), tmp_path / "none", dry_run=True, progress=False)
    assert smaller["memory"]["activations"] < 0.6 * memory["activations"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.name=adamm"], "optim: timm cannot make 'adamm'"),
        (["optim.options.nonsense=1"], "optim: timm cannot make 'adamw'"),
        (["loop.grad_checkpointing=true"], "loop.grad_checkpointing: Sequential has none"),
        (["loop.batch_size=35"], "loop.batch_size: 35 is larger than the data set, 34 samples"),
    ],
)
def test_impossible_settings(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run(override(toy(), words), tmp_path, progress=False)


def test_fp16_is_not_replaced_by_something_else(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("fp16 works here")
    with pytest.raises(ConfigError, match=r"loop.precision: fp16 does not work on cpu; use bf16 or no"):
        run(toy(loop_precision="fp16"), tmp_path, progress=False)


def test_loss_scaling_leaves_out_what_overflows(tmp_path, monkeypatch):
    """The scale begins far too high on purpose: the scaler lowers it, and none of this counts as divergence."""
    trainer = loop.Trainer(toy(), tmp_path, progress=False)
    accelerator = trainer.accelerator
    # what accelerate sets up for fp16 on a GPU; torch's scaler itself also works on the CPU
    scaler = accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    trainer.main.optimizer = AcceleratedOptimizer(trainer.main.optimizer.optimizer, scaler=scaler)
    loss = ToyTask.loss
    monkeypatch.setattr(ToyTask, "loss", lambda *args: (1e3 * (found := loss(*args))[0], found[1]))
    trainer.log.open(0)
    trainer.fit()
    assert trainer.watch.overflow > 5
    assert (trainer.watch.skipped, trainer.step) == (0, 12)
    assert scaler.get_scale() == 2.0 ** (126 - trainer.watch.overflow)
    assert state.read(state.newest(tmp_path / "checkpoints")[0])[1]["scaler"]["scale"] == scaler.get_scale()


def test_unknown_model_suggests(tmp_path):
    config = replace(recipes.find("nextvit_digits"), model=Model(name="vh_nextvit_smal"))
    with pytest.raises(
        ConfigError, match="timm knows no 'vh_nextvit_smal'; the nearest is 'vh_nextvit_small'"
    ):
        run(config, tmp_path, progress=False)
    config = override(recipes.find("nextvit_digits"), ["model.options.depth=3"])
    with pytest.raises(ConfigError, match=r"model.options: vh_nextvit_small: .*depth"):
        run(config, tmp_path, progress=False)
