"""Registering: names, tags, weights from the hub or a folder, authors' files through timm's own arguments."""

import copy
import json
import pickle

import pytest
import timm
import torch
from golden import load_case
from safetensors.torch import save_file
from toy import TOY, Toy, authors, randomised

import visionhybrid
from visionhybrid.models import registry
from visionhybrid.models.checkpoint import pretrained
from visionhybrid.models.facts import facts


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """`vh_toy` registered with timm, with two tags of published weights; taken out again afterwards."""
    models = timm.models._registry
    kept = {name: copy.copy(getattr(models, name)) for name in vars(models) if name.startswith("_model_")}
    for table in ("SYSTEMS", "SYSTEM_OF", "VARIANTS", "WEIGHTS", "default_cfgs"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    cfg = dict(input_size=(3, 32, 32), num_classes=5, first_conv="stem", classifier="head")
    registry.register(
        TOY,
        {"vh_toy": {"depth": 3, "num_classes": 5}},
        {"vh_toy.first": cfg, "vh_toy.second": {**cfg, "crop_pct": 1.0}},
        weights={
            "vh_toy.first": registry.Weights(
                file="model.safetensors",
                hub="nobody/toy",
                license="MIT",
                purpose="tests",
                published={"top-1 %": 99.0},
            ),
            "vh_toy.second": registry.Weights(
                file="toy_second.pth", url="https://example.org/toy", license="MIT", purpose="tests"
            ),
        },
    )
    monkeypatch.delenv(pretrained.FOLDER, raising=False)
    yield randomised(Toy(num_classes=5, depth=3))
    for name, value in kept.items():
        table = getattr(models, name)
        if isinstance(table, (dict, set)):
            table.clear()
            table.update(value)


def same(model, toy):
    x = torch.randn(2, 3, 6, 7)
    torch.testing.assert_close(model.eval()(x), toy(x), rtol=0, atol=0)


# ---- names


def test_names_start_with_our_prefix_and_timm_knows_them():
    names = visionhybrid.list_models()
    assert set(names) == set(timm.list_models("vh_*"))
    assert {registry.SYSTEMS[owner].task for owner in registry.SYSTEM_OF.values()} == {
        "classification",
        "restoration",
    }
    with pytest.raises(ValueError, match="names start with 'vh_', got 'toy'"):
        registry.register(TOY, {"toy": {}}, {})


def test_a_name_is_registered_once(toy):
    with pytest.raises(ValueError, match="'vh_nextvit_small' is taken by nextvit"):
        registry.register(TOY, {"vh_nextvit_small": {}}, {})


def test_list_models_filters():
    tasks = [visionhybrid.list_models(task=task) for task in ("classification", "restoration")]
    assert sorted(tasks[0] + tasks[1]) == visionhybrid.list_models()
    assert "vh_hat_small_x4" in tasks[1]
    assert visionhybrid.list_models("*_x4", system="hat") == [
        "vh_hat_large_x4",
        "vh_hat_small_x4",
        "vh_hat_x4",
    ]
    with pytest.raises(ValueError, match="task must be one of classification, restoration"):
        visionhybrid.list_models(task="detection")
    with pytest.raises(ValueError, match="no system 'swin'; have"):
        visionhybrid.list_models(system="swin")


def test_no_name_claims_weights_to_timm():
    """timm's own tests download whatever claims weights."""
    assert timm.list_models("vh_*", pretrained=True) == []


def test_every_published_weight_belongs_to_a_name_and_a_tag():
    for key, weights in registry.WEIGHTS.items():
        name, _, tag = key.partition(".")
        assert tag in registry.tags_of(name)
        assert weights.license
        assert weights.purpose
        assert weights.hub or weights.url, f"{key}: nowhere to fetch it from"


# ---- weights


def test_pretrained_finds_weights_in_the_folder(toy, tmp_path, monkeypatch):
    monkeypatch.setenv(pretrained.FOLDER, str(tmp_path))
    save_file(authors(toy), tmp_path / "vh_toy.first.safetensors")
    wrong = {name: value * 0 for name, value in authors(toy).items() if name != "index_table"}
    torch.save({"params": wrong, "params_ema": authors(toy)}, tmp_path / "toy_second.pth")
    for name in ("vh_toy", "vh_toy.first", "vh_toy.second"):
        same(timm.create_model(name, pretrained=True), toy)
    assert timm.create_model("vh_toy.second", pretrained=True).pretrained_cfg["crop_pct"] == 1.0


def test_pretrained_from_the_hub(toy, tmp_path, monkeypatch):
    save_file(authors(toy), tmp_path / "cached")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *a, **k: asked.append(a) or str(tmp_path / "cached")
    )
    same(timm.create_model("vh_toy", pretrained=True), toy)
    assert asked == [("nobody/toy", "model.safetensors")]


def test_pretrained_offline_says_what_to_fetch_and_where_to_put_it(toy, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as caught:
        timm.create_model("vh_toy", pretrained=True)
    for part in (
        "https://huggingface.co/nobody/toy/resolve/main/model.safetensors",
        "$VISIONHYBRID_WEIGHTS as vh_toy.first.safetensors",
        "pretrained_cfg_overlay=dict(file=PATH)",
    ):
        assert part in str(caught.value)
    with pytest.raises(
        FileNotFoundError, match=r"not on a hub; fetch toy_second\.pth from https://example\.org/toy"
    ):
        timm.create_model("vh_toy.second", pretrained=True)


def test_real_names_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv(pretrained.FOLDER, raising=False)
    with pytest.raises(FileNotFoundError, match=r"huggingface\.co/timm/nextvit_small\.bd_in1k/resolve"):
        timm.create_model("vh_nextvit_small.bd_in1k", pretrained=True)
    with pytest.raises(
        FileNotFoundError, match=r"fetch HAT-S_SRx4\.pth from https://github\.com/XPixelGroup"
    ):
        timm.create_model("vh_hat_small_x4", pretrained=True)
    with pytest.raises(ValueError, match="no published weights for vh_hat_x1"):
        timm.create_model("vh_hat_x1", pretrained=True)


SOURCES = ("overlay file", "overlay state", "overlay container", "checkpoint_path", "local-dir")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("own", [True, False], ids=["our keys", "authors' keys"])
def test_timms_own_arguments_take_authors_files(source, own, toy, tmp_path):
    state = toy.state_dict() if own else authors(toy)
    path = tmp_path / "toy.pth"
    torch.save(
        {"params": {k: v * 0 for k, v in state.items() if k != "index_table"}, "params_ema": state}, path
    )
    if source == "local-dir":
        config = {"architecture": "vh_toy", "num_classes": 5, "pretrained_cfg": {"num_classes": 5}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        torch.save(state, tmp_path / "pytorch_model.bin")
    overlay = {"overlay file": {"file": str(path)}, "overlay state": {"state_dict": state}}
    overlay["overlay container"] = {"state_dict": {"params_ema": state}}
    given = {
        "checkpoint_path": dict(model_name="vh_toy", checkpoint_path=str(path)),
        "local-dir": dict(model_name=f"local-dir:{tmp_path}", pretrained=True),
    }.get(source, dict(model_name="vh_toy", pretrained=True, pretrained_cfg_overlay=overlay.get(source)))
    model = timm.create_model(**given)
    same(model, toy)
    assert "state_dict" not in model.pretrained_cfg, "a second copy of the weights stays alive"


def test_other_heads_and_channels_are_adapted_as_timm_does(toy, tmp_path):
    torch.save({"model": authors(toy)}, tmp_path / "toy.pth")
    overlay = dict(file=str(tmp_path / "toy.pth"))
    model = timm.create_model(
        "vh_toy", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=2, in_chans=1
    )
    assert model.head.weight.shape == (2, 8)
    torch.testing.assert_close(model.stem.weight, toy.stem.weight.sum(1, keepdim=True))
    assert torch.equal(model.blocks[2].conv.weight, toy.blocks[2].conv.weight)


def test_load_state_dict_takes_authors_keys_and_stays_strict(toy):
    model = timm.create_model("vh_toy")
    model.load_state_dict(authors(toy))
    same(model, toy)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*head\.bias"):
        model.load_state_dict({k: v for k, v in authors(toy).items() if k != "head.bias"})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*extra"):
        model.load_state_dict({**toy.state_dict(), "extra": torch.zeros(1)})


def test_weights_of_another_system_and_deployed_ones_are_refused(toy, tmp_path):
    overlay = dict(state_dict=load_case("hat_tiny_x3_24x40").state_dict())
    with pytest.raises(ValueError, match="these are weights of hat, but vh_toy is a toy"):
        timm.create_model("vh_toy", pretrained=True, pretrained_cfg_overlay=overlay)
    folded = copy.deepcopy(toy).deploy().state_dict()
    with pytest.raises(ValueError, match=r"deployed; open them with visionhybrid\.load"):
        timm.create_model("vh_toy", pretrained=True, pretrained_cfg_overlay=dict(state_dict=folded))


def test_models_can_be_copied_and_pickled(toy):
    model = timm.create_model("vh_toy")
    model.load_state_dict(toy.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(twin, toy)
        assert registry.made_with(twin) == registry.made_with(model)


def test_real_files_of_authors_through_timm(tmp_path):
    """One of each system, whole."""
    nextvit = load_case("nextvit_small_224").state_dict()
    torch.save({"model": nextvit, "epoch": 299}, tmp_path / "nextvit.pth")
    model = timm.create_model("vh_nextvit_small", checkpoint_path=str(tmp_path / "nextvit.pth"))
    assert torch.equal(model.head.fc.weight, nextvit["proj_head.0.weight"])
    case = load_case("hat_s_x2_32x48")
    torch.save({"params_ema": case.state_dict()}, tmp_path / "hat.pth")
    overlay = dict(file=str(tmp_path / "hat.pth"))
    model = timm.create_model("vh_hat_small_x2", pretrained=True, pretrained_cfg_overlay=overlay)
    with torch.inference_mode():
        case.check("out", model.eval()(case.input("x")))


# ---- facts


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("vh_nextvit_small", 31_763_368, 5.794),
        ("vh_nextvit_small.bd_in1k_384", 31_763_368, 17.216),
        ("vh_nextvit_base", 44_818_856, 8.274),
        ("vh_nextvit_large", 57_874_344, 10.753),
        ("vh_hat_small_x1", 9_325_759, 51.5),
        ("vh_hat_small_x4", 9_621_183, 54.6),
        ("vh_hat_x4", 20_772_507, 103.9),
        ("vh_hat_large_x3", 40_883_503, 201.3),
    ],
)
def test_facts_agree_with_published_counts(name, parameters, gmacs):
    """Measured on the authors' modules (shared/facts: nextvit.md section 1, hat.md section 3)."""
    found = facts(name)
    assert found.parameters == parameters
    assert found.macs / 1e9 == pytest.approx(gmacs, rel=2e-3)
    json.dumps(vars(found))


def test_facts_of_unknown_names_suggest():
    with pytest.raises(ValueError, match="no model 'nextvit_smal'; did you mean 'vh_nextvit_small'"):
        facts("nextvit_smal")
    with pytest.raises(ValueError, match="vh_nextvit_small has no tag 'in22k'; have bd_in1k"):
        facts("vh_nextvit_small.in22k")
