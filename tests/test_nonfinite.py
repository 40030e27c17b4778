"""Weights with NaN or infinity: what opens a file of them says so, and training neither writes nor continues from them."""

import json
import math

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from toy import TOY, Toy, authors, randomised
from train_case import ToyTask, toy
from typer.testing import CliRunner

import visionhybrid
from visionhybrid.cli import app
from visionhybrid.configs.nextvit import nextvit_digits
from visionhybrid.models import registry
from visionhybrid.models.checkpoint import load_as, save, warm_start
from visionhybrid.models.checkpoint.finite import nonfinite
from visionhybrid.train import run, state
from visionhybrid.train.guard import DivergedError
from visionhybrid.train.log import read

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.complex64]
CASES = [(dtype, number) for dtype in FLOATS for number in ("nan", "inf", "-inf")]
CASES += [(torch.float8_e4m3fn, "nan")]  # it has no infinity


@pytest.fixture(autouse=True)
def toy_system(monkeypatch):
    monkeypatch.setitem(registry.SYSTEMS, "toy", TOY)


@pytest.fixture
def damaged():
    """A toy's weights under its authors' names, with three numbers that are none."""
    state = authors(randomised(Toy(num_classes=5, depth=3)))
    state["stem.weight"][0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    state["layers.1.lin.weight"][3] = -torch.inf
    return state


@pytest.mark.parametrize(("dtype", "number"), CASES, ids=str)
def test_each_type_and_number_is_counted(dtype, number):
    content = torch.linspace(-2, 2, 999).to(torch.float32 if dtype.itemsize == 1 else dtype)
    bad = content.clone()
    bad[[0, 500, 998]] = float(number)
    found = nonfinite({"good": content.to(dtype), "bad": bad.to(dtype), "count": torch.arange(3)})
    assert found == {"bad": 3}


def test_opposite_infinities_do_not_cancel_and_huge_sums_are_no_infinity():
    huge = torch.full((1000,), torch.finfo(torch.float32).max)
    both = torch.tensor([torch.inf, -torch.inf, 1.0])
    found = nonfinite({"huge": huge, "half": torch.full((9,), 6e4).half(), "both": both})
    assert found == {"both": 2}


def test_nothing_to_look_at():
    meta = torch.full((3,), torch.nan, device="meta")
    assert nonfinite({"meta": meta, "empty": torch.zeros(0), "mask": torch.ones(3, dtype=torch.bool)}) == {}


def test_load_names_them_unless_they_are_allowed(damaged, tmp_path):
    path = tmp_path / "damaged.safetensors"
    save_file(damaged, path)
    with pytest.raises(ValueError, match="hold NaN") as error:
        visionhybrid.load(path)
    assert str(error.value) == (
        f"{path}: 2 of 23 tensors hold NaN or infinity: layers.1.lin.weight (8), stem.weight (2); "
        "load(..., allow_nonfinite=True) takes them as they are"
    )
    model = visionhybrid.load(path, allow_nonfinite=True)
    torch.testing.assert_close(model.stem.weight, damaged["stem.weight"], equal_nan=True, rtol=0, atol=0)


def test_what_no_model_takes_does_not_matter(damaged):
    good = authors(randomised(Toy(num_classes=5)))
    good["index_table"] = torch.full((4,), -torch.inf)  # a mask, say; the table of keys drops it
    assert visionhybrid.load(good).num_classes == 5
    found = visionhybrid.inspect(good)
    assert (found.nonfinite, found.problem) == ({"index_table": 4}, "")


def test_numbers_too_large_for_the_type_asked_for():
    state = authors(randomised(Toy(num_classes=5)))
    state["head.bias"][2] = 1e5
    assert visionhybrid.load(state, dtype="bfloat16").head.bias[2] > 9e4
    with pytest.raises(
        ValueError, match=r"in float16 1 of \d+ tensors hold .*: head.bias \(1\); it does not"
    ):
        visionhybrid.load(state, dtype="float16")


def test_every_other_door(damaged, tmp_path):
    with pytest.raises(ValueError, match="2 of 23 tensors hold NaN"):
        warm_start(Toy(num_classes=5, depth=3), damaged)
    # not what it takes of them: this model's stem has another shape
    assert "1 of another shape" in str(warm_start(Toy(num_classes=5, depth=1, in_chans=1), damaged))
    name, options = "vh_nextvit_small", nextvit_digits().model.options
    model = timm.create_model(name, num_classes=3, **options)
    model.head.fc.bias.data[1] = torch.nan
    path = tmp_path / "model.safetensors"
    with pytest.raises(
        ValueError, match=r"^save: 1 of \d+ .*: head.fc.bias \(1\); save\(..., allow_nonfinite=True\)"
    ):
        save(model, path)
    assert not path.exists()
    save(model, path, allow_nonfinite=True)
    with pytest.raises(ValueError, match=r"head.fc.bias \(1\)"):
        load_as(name, path, **options)
    with pytest.raises(ValueError, match=r"head.fc.bias \(1\)"):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **options)


def test_inspect_tells(damaged, tmp_path):
    save_file(damaged, tmp_path / "damaged.safetensors")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "damaged.safetensors")])
    assert result.exit_code == 1
    assert "8 in layers.1.lin.weight" in result.output
    assert "2 of 23 tensors hold NaN or infinity" in result.stderr
    told = CliRunner().invoke(app, ["inspect", str(tmp_path / "damaged.safetensors"), "--json"])
    assert json.loads(told.stdout)["nonfinite"] == {"layers.1.lin.weight": 8, "stem.weight": 2}


# ---- training


@pytest.fixture
def runaway(monkeypatch):
    """Of the toy task's network a weight becomes infinite behind the back of losses and gradients, at the calls in the list."""
    calls, loss = [], ToyTask.loss

    def overflowing(self, part, parts, batch):
        result = loss(self, part, parts, batch)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls in calls:
            parts["model"][0].bias.data[3] = math.inf
        return result

    monkeypatch.setattr(ToyTask, "loss", overflowing)
    return calls


def good(out):
    """Whether every checkpoint, and what was released, holds numbers."""
    files = [*out.glob("checkpoints/step_*/[em]*.safetensors"), *out.glob("model.safetensors")]
    assert files
    return not any(nonfinite(load_file(file)) for file in files)


@pytest.mark.parametrize("step", [4, 12], ids=["when a checkpoint is due", "in the last step"])
def test_weights_that_became_infinite_are_not_saved(step, runaway, tmp_path):
    runaway.append(step)
    result = run(toy(), tmp_path, progress=False)
    notes = [row["text"] for row in read(tmp_path / "log.jsonl") if row["kind"] == "note"]
    back = step - 2
    assert f"step {step}: 1 of 6 tensors hold NaN or infinity: model.0.bias (1); back to step {back}" in notes
    assert result["steps"] == 12
    assert math.isfinite(result["metrics"]["error"])
    assert good(tmp_path)


def test_a_run_that_always_ends_so_gives_up(runaway, tmp_path):
    runaway.extend(range(1, 99))
    with pytest.raises(DivergedError, match=r"went astray 4 times after step 0; lower optim.lr"):
        run(toy(), tmp_path, progress=False)
    assert good(tmp_path)


def test_training_does_not_begin_or_continue_with_them(tmp_path, monkeypatch):
    run(toy(loop_steps=2), tmp_path, progress=False)
    (path,) = tmp_path.glob("checkpoints/step_*2")
    tensors, facts = state.read(path)
    tensors["model"]["0.bias"][3] = math.nan
    state.write(path.parent, 4, tensors, facts)
    with pytest.raises(
        state.CheckpointError, match=r"^model: 1 of 9 tensors .*: 0.bias \(1\) in the checkpoint"
    ):
        run(toy(), tmp_path, progress=False)
    parts = ToyTask.parts

    def broken(self):
        found = parts(self)
        found["model"][0].bias.data[3] = math.nan
        return found

    monkeypatch.setattr(ToyTask, "parts", broken)
    with pytest.raises(ValueError, match=r"begin with are no good: 1 of 6 tensors .*: model.0.bias \(1\)"):
        run(toy(), tmp_path / "new", progress=False)
    assert not list((tmp_path / "new").glob("checkpoints/*"))
