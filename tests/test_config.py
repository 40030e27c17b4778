"""Configs: overrides checked by field and type, JSON there and back, recipes by every kind of name."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import pytest
import timm
from train_case import Toy, toy

import visionhybrid.models  # noqa: F401 - registers the names that recipes use
from visionhybrid.train import recipes
from visionhybrid.train.config import (
    Augment,
    Classification,
    Config,
    ConfigError,
    Generation,
    Loop,
    Model,
    Optim,
    Restoration,
    Schedule,
    bounds,
    check,
    diff,
    flat,
    from_json,
    override,
    to_json,
)


def base() -> Classification:
    return recipes.find("nextvit_digits")


@pytest.mark.parametrize(
    ("word", "field", "value"),
    [
        ("optim.lr=3e-4", "optim.lr", 3e-4),
        ("optim.lr=1", "optim.lr", 1.0),
        ("loop.batch_size=128", "loop.batch_size", 128),
        ("loop.micro_batch=16", "loop.micro_batch", 16),
        ("loop.micro_batch=none", "loop.micro_batch", None),
        ("loop.compile=true", "loop.compile", True),
        ("loop.compile=0", "loop.compile", False),
        ("loop.precision=bf16", "loop.precision", "bf16"),
        ("optim.betas=0.8,0.95", "optim.betas", (0.8, 0.95)),
        ("optim.betas=[0.8, 0.95]", "optim.betas", (0.8, 0.95)),
        ("schedule.milestones=1,2,3", "schedule.milestones", (1, 2, 3)),
        ("data.root=/data/a=b", "data.root", "/data/a=b"),
        ("augment.policy=none", "augment.policy", None),
        ("model.options.drop_path_rate=0.3", "model.options.drop_path_rate", 0.3),
        ("model.options.dims=[8,8,8,8]", "model.options.dims", [8, 8, 8, 8]),
        ("model.options.global_pool=max", "model.options.global_pool", "max"),
    ],
)
def test_override(word, field, value):
    changed = override(base(), [word])
    assert flat(changed)[field] == value
    assert type(flat(changed)[field]) is type(value)
    others = {k: v for k, v in flat(changed).items() if k != field}
    assert others == {k: v for k, v in flat(base()).items() if k != field}


def test_override_of_a_literal_that_is_a_number():
    assert override(recipes.find("hat_samples_x2"), ["data.channels=1"]).data.channels == 1


def test_later_words_win():
    assert override(base(), ["optim.lr=1", "optim.lr=2"]).optim.lr == 2


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lrr=1", "no field 'optim.lrr' in recipe 'nextvit_digits'; the nearest is 'optim.lr'"),
        ("lr=1", "no field 'lr' in recipe 'nextvit_digits'; the nearest is 'optim.lr'"),
        (
            "loop.batchsize=8",
            "no field 'loop.batchsize' in recipe 'nextvit_digits'; the nearest is 'loop.batch_size'",
        ),
        ("optim.lr.x=1", "no field 'optim.lr.x'"),
        ("optim.lr=fast", "optim.lr: expected a number, got 'fast'"),
        ("loop.batch_size=8.5", "loop.batch_size: expected a whole number, got '8.5'"),
        ("loop.compile=perhaps", "loop.compile: expected true or false, got 'perhaps'"),
        (
            "loop.precision=bf61",
            "loop.precision: expected one of 'no', 'fp16', 'bf16', got 'bf61'; did you mean 'bf16'?",
        ),
        ("loop.micro_batch=x", "loop.micro_batch: expected a whole number or none, got 'x'"),
        ("optim.betas=a,b", "optim.betas: expected a number, got 'a'"),
        ("optim=adam", "optim: expected the fields of Optim"),
        ("optim.lr", "expected field=value, got 'optim.lr'"),
        ("model.options=3", "model.options: expected a JSON object, got 3"),
    ],
)
def test_override_refused_in_one_line(word, message):
    with pytest.raises(ConfigError) as error:
        override(base(), [word])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(loop=Loop(epochs=1, steps=1)), "loop: set one of epochs and steps"),
        (dict(loop=Loop()), "loop: set one of epochs and steps"),
        (dict(loop=Loop(steps=0)), "loop.steps: expected more than 0, got 0"),
        (dict(loop=Loop(steps="many")), "loop.steps: expected a whole number or none, got 'many'"),
        (dict(loop=Loop(steps=True)), "loop.steps: expected a whole number or none, got True"),
        (dict(loop=Loop(steps=1, ema_decay=1.5)), r"loop.ema_decay: expected a number in \[0, 1\)"),
        (dict(schedule=Schedule(name="step")), "schedule.every: a step schedule needs a period"),
        (dict(schedule=Schedule(name="cosin")), "schedule.name: expected one of"),
        (dict(loop=Loop(steps=1, workers=-1)), "loop.workers: expected 0 or more, got -1"),
        (dict(optim=Optim(lr=math.nan)), "optim.lr: expected 0 or more, got nan"),
        (dict(optim=Optim(clip_norm=0.0)), "optim.clip_norm: expected more than 0, got 0.0"),
        (dict(optim=Optim(betas=(0.9,))), "optim.betas: expected two or three numbers"),
        (
            dict(augment=Augment(scale=(0.1,))),
            "augment.scale: expected two numbers above 0, the smaller first",
        ),
        (dict(augment=Augment(ratio=(2.0, 1.0))), "augment.ratio: expected two numbers above 0"),
        (dict(augment=Augment(flip=2.0)), r"augment.flip: expected a share in \[0, 1\], got 2.0"),
        (dict(eval_batch=0), "eval_batch: expected more than 0, got 0"),
        (
            dict(model=Model(name="x", options={"layer": object()})),
            "model.options and optim.options must be JSON",
        ),
    ],
)
def test_check_refuses(change, message):
    with pytest.raises(ConfigError, match=message):
        check(replace(base(), **change))


def test_every_bound_is_of_a_field_and_every_field_is_read():
    """A bound of a misspelt field would never fail, and a field that nothing reads would be set in vain."""
    ours = [kind for kind in Config.kinds.values() if kind.__module__.startswith("visionhybrid.")]
    known = {name for kind in ours for name in fields_of(kind)}
    bounded = {name for names, _, _ in bounds._RULES for name in names.split()}
    assert bounded <= known
    package = Path(bounds.__file__).parents[2]
    source = "\n".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    read = set(re.findall(r"\.(\w+)", source))
    unread = {name for name in known if name.rsplit(".", 1)[-1] not in read}
    # those that `Grafts.loss` reads by the names of its terms
    assert unread == {"task_weight", "output_weight", "variance_weight"}


def fields_of(cls, prefix=""):
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from fields_of(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_configs_cannot_be_changed():
    with pytest.raises(AttributeError):
        base().optim.lr = 1.0
    with pytest.raises(TypeError):
        Loop(32)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe(name):
    """Correct types, a known model, the name of its function, a docstring with its command, JSON there and back."""
    function = recipes.names()[name]
    config = recipes.find(name)
    assert check(config) == config
    assert config.name == name
    generators = ("hybrid_dit", "pipeline") if isinstance(config, Generation) else ()
    assert timm.is_model(config.model.name) or config.model.name in generators
    assert f" {name}" in (function.__doc__ or "")
    assert from_json(to_json(config)) == config


def test_json_keeps_the_task_and_the_types():
    config = override(toy(corrupt=(1, 2)), ["optim.betas=0.8,0.9"])
    again = from_json(to_json(config))
    assert type(again) is Toy
    assert again == config
    assert isinstance(again.corrupt, tuple)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "cooking"}, "no task 'cooking'; have"),
        ({"optim": {"lrr": 1}}, "no field 'optim.lrr'; the nearest is 'optim.lr'"),
        ({"optim": {"lr": "fast"}}, "optim.lr: expected a number, got 'fast'"),
        ({"optim": 3}, "optim: expected fields, got 3"),
        ({"model": {"options": {}}}, "model: field 'name' is missing"),
    ],
)
def test_json_refused(change, message):
    text = json.dumps({**json.loads(to_json(base())), **change})
    with pytest.raises(ConfigError, match=message):
        from_json(text)


def test_not_json():
    with pytest.raises(ConfigError, match="not a saved config"):
        from_json("{")


def test_diff():
    changed = override(base(), ["optim.lr=0.5", "model.options.new=1"])
    assert diff(changed, base()) == ["optim.lr: 0.002 -> 0.5", "model.options.new: (none) -> 1"]
    assert diff(base(), base()) == []


def test_recipe_by_name():
    assert recipes.find("nextvit_small_in1k").model.name == "vh_nextvit_small"
    with pytest.raises(
        ConfigError, match="no recipe 'nextvit_smal_in1k'; the nearest is 'nextvit_small_in1k'"
    ):
        recipes.find("nextvit_smal_in1k")


def test_recipe_of_a_users_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import replace\n"
        "from visionhybrid.configs.nextvit import nextvit_digits\n"
        "from visionhybrid.train.config import Optim\n"
        "def slow():\n    return replace(nextvit_digits(), name='slow', optim=Optim(lr=1e-5))\n"
        "def wrong():\n    return 3\n"
    )
    assert recipes.find(f"{file}:slow").optim.lr == 1e-5
    with pytest.raises(ConfigError, match=r"mine.py has no recipe 'slowly'; it has slow, wrong"):
        recipes.find(f"{file}:slowly")
    with pytest.raises(ConfigError, match="returned int"):
        recipes.find(f"{file}:wrong")
    with pytest.raises(ConfigError, match="no file"):
        recipes.find(f"{tmp_path / 'yours.py'}:slow")


def test_recipe_of_an_earlier_run(tmp_path):
    config = override(base(), ["optim.lr=0.5"])
    (tmp_path / "config.json").write_text(to_json(config))
    assert recipes.find(str(tmp_path / "config.json")) == config
    assert recipes.find(str(tmp_path)) == config
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no task None; have"):
        recipes.find(str(tmp_path))
    with pytest.raises(ConfigError, match="cannot read config"):
        recipes.find(str(tmp_path / "other.json"))


def test_published_numbers_of_nextvit():
    config = recipes.find("nextvit_small_in1k")
    assert isinstance(config, Classification)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.clip_norm) == (2e-3, 0.1, 5.0)
    assert (config.loop.batch_size, config.loop.epochs, config.loop.precision) == (2048, 300, "fp16")
    assert int(224 / config.augment.crop) == 256
    fine = recipes.find("nextvit_base_in1k_384")
    assert (fine.optim.lr, fine.optim.weight_decay, fine.loop.batch_size) == (3e-6, 1e-8, 1024)
    assert int(fine.data.image_size / fine.augment.crop) == 438


def test_published_numbers_of_hat():
    config = recipes.find("hat_large_x3_imagenet")
    assert isinstance(config, Restoration)
    assert config.schedule.milestones == (300_000, 500_000, 650_000, 700_000, 750_000)
    assert (config.loop.steps, config.loop.batch_size, config.loop.ema_decay) == (800_000, 32, 0.999)
    assert config.data.enlarge
    assert recipes.find("hat_x4").model.start_strict is False
    assert recipes.find("hat_large_x4_finetune").optim.lr == 1e-5
