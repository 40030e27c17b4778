"""Loading: renaming, options, types, saving, warm starts, golden whole-model cases."""

import json

import pytest
import torch
from golden import list_cases, load_case
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from toy import TOY, Toy, authors, same

import visionhybrid
from visionhybrid.models import registry
from visionhybrid.models.checkpoint import UnknownKeysError, load_as, rename, save, warm_start
from visionhybrid.models.restorer import padded

pytestmark = pytest.mark.usefixtures("toy_system")


# ---- rename


def test_rename_uses_the_first_rule_that_matches_whole_keys():
    rules = ((r"a\.(\d)", lambda m: f"b.{int(m[1]) + 1}"), (r"a\.(.+)", r"c.\1"), (r"z", None))
    assert rename({"a.1": 1, "a.12": 2, "z": 3}, rules) == {"b.2": 1, "c.12": 2}


def test_rename_names_every_key_without_a_rule():
    with pytest.raises(UnknownKeysError, match="no rule renames 'x', 'y'") as caught:
        rename({"x": 1, "a": 2, "y": 3}, ((r"a", "a"),))
    assert caught.value.keys == ["x", "y"]


def test_rename_refuses_two_keys_of_one_name():
    with pytest.raises(KeyError, match=r"'b' would overwrite 'c'"):
        rename({"a": 1, "b": 2}, ((r"[ab]", "c"),))


# ---- options


def test_options_that_no_shape_shows_are_keywords(toy):
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(visionhybrid.load(authors(toy), gain=2.0)(x), 2 * toy(x))


def test_a_misspelt_option_names_the_nearest(toy):
    with pytest.raises(ValueError, match="toy has no option 'gian'; did you mean 'gain'"):
        visionhybrid.load(authors(toy), gian=2.0)


@pytest.mark.parametrize(
    ("name", "value"), [("gain", "much"), ("gain", None), ("gain", True), ("depth", 2.0)]
)
def test_an_option_of_the_wrong_kind_is_named(name, value, toy):
    with pytest.raises(ValueError, match=f"{name} should be like [12].*, got {value!r}"):
        visionhybrid.load(authors(toy), **{name: value})


def test_unknown_architecture_lists_systems_and_keys():
    with pytest.raises(
        ValueError, match=r"no system recognises these weights \(have .*toy.*\); keys: fc\.weight"
    ):
        visionhybrid.load({"fc.weight": torch.zeros(3, 3)})


def test_two_systems_that_recognise_one_state_are_an_error(toy, monkeypatch):
    monkeypatch.setitem(registry.SYSTEMS, "twin", TOY)
    with pytest.raises(ValueError, match="could be 'toy' and 'toy'; choose with system="):
        visionhybrid.load(authors(toy))
    same(visionhybrid.load(authors(toy), system="toy"), toy)
    with pytest.raises(ValueError, match="no system 'tyo'"):
        visionhybrid.load(authors(toy), system="tyo")


def test_weights_of_another_system_than_asked_for(toy):
    with pytest.raises(ValueError, match=r"these are weights of toy, not of hat; keys: .*\(\d+ in all\)"):
        visionhybrid.load(authors(toy), system="hat")
    with pytest.raises(ValueError, match=r"state dict: these are no weights of hat; keys: a\.weight"):
        load_as("vh_hat_small_x2", {"a.weight": torch.zeros(3), "b.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="vh_hat_small_x2 has no tag 'df3k'; have df2k"):
        load_as("vh_hat_small_x2.df3k", authors(toy))


@pytest.mark.parametrize("own", [True, False], ids=["our keys", "authors' keys"])
def test_mismatches_tell_both_sides(own, toy):
    state = toy.state_dict() if own else authors(toy)
    state["extra.weight"] = torch.zeros(2)
    del state["head.bias"]
    state["stem.bias"] = torch.zeros(9)
    with pytest.raises(ValueError, match="does not fit toy") as caught:
        visionhybrid.load(state)
    for part in ("1 missing: head.bias", "1 unexpected: extra.weight", "stem.bias (file (9,), model (8,))"):
        assert part in str(caught.value)


# ---- dtype, device


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_become_float32_unless_asked(dtype, toy, tmp_path):
    other = {k: (v.double() / 3).to(dtype) if v.is_floating_point() else v for k, v in authors(toy).items()}
    torch.save(other, tmp_path / "other.pth")
    model = visionhybrid.load(tmp_path / "other.pth")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.blocks[0].norm.num_batches_tracked.dtype == torch.int64
    torch.testing.assert_close(model.head.weight, toy.head.weight / 3, rtol=1e-2, atol=1e-2)
    model = visionhybrid.load(tmp_path / "other.pth", dtype=str(dtype).removeprefix("torch."))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(model.head.weight, other["head.weight"])
    assert model.blocks[0].norm.num_batches_tracked.dtype == torch.int64
    assert visionhybrid.inspect(tmp_path / "other.pth").dtypes == {str(dtype)[6:]: len(other) - 4, "int64": 4}


def test_dtype_must_be_floating(toy):
    for wrong_type in ("int8", "float3", torch.int64):
        with pytest.raises(ValueError, match="dtype must be a floating-point type"):
            visionhybrid.load(authors(toy), dtype=wrong_type)


def test_device(toy):
    model = visionhybrid.load(authors(toy), device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


# ---- save, deployed, warm start


def test_save_load_round_trip(toy, tmp_path):
    toy.gain = 3.0
    path = save(
        toy,
        tmp_path / "new" / "toy.safetensors",
        classes=list("abcde"),
        options={"gain": 3.0},
        metadata={"by": "me"},
    )
    model = visionhybrid.load(path)
    same(model, toy)
    assert model.pretrained_cfg["label_names"] == list("abcde")
    found = visionhybrid.inspect(path)
    assert (found.system, found.options["gain"], found.metadata["by"]) == ("toy", 3.0, "me")
    assert found.metadata["version"] == visionhybrid.__version__
    assert [p.name for p in path.parent.iterdir()] == ["toy.safetensors"]
    # The second generation remembers what the file told the first.
    assert visionhybrid.inspect(save(model, tmp_path / "again.safetensors")).options["gain"] == 3.0
    # The same tensors without metadata load as well.
    save_file(load_file(path), tmp_path / "bare.safetensors")
    same(visionhybrid.load(tmp_path / "bare.safetensors", gain=3.0), toy)


def test_a_head_replaced_after_loading_is_saved_as_it_is(toy, tmp_path):
    model = visionhybrid.load(authors(toy), gain=2.0)
    model.head, model.num_classes = torch.nn.Linear(8, 2), 2
    again = visionhybrid.load(save(model, tmp_path / "two.safetensors"))
    assert (again.num_classes, again.gain) == (2, 2.0)
    same(again, model)


def test_deployed_models_round_trip_and_deploy_only_once(toy, tmp_path):
    import copy

    folded = copy.deepcopy(toy).deploy()
    path = save(folded, tmp_path / "deployed.safetensors")
    assert visionhybrid.inspect(path).deployed
    model = visionhybrid.load(path)
    same(model, folded)
    x = torch.randn(2, 3, 6, 7)
    torch.testing.assert_close(model(x), toy(x), rtol=1e-5, atol=1e-5)
    same(visionhybrid.load(folded.state_dict()), folded)
    with pytest.raises(ValueError, match="deployed weights have no norms left to train"):
        warm_start(toy, path)


def test_save_leaves_the_old_file_when_writing_fails(toy, tmp_path, monkeypatch):
    path = save(toy, tmp_path / "toy.safetensors")
    before = path.read_bytes()

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    toy.head.bias.data.zero_()
    with monkeypatch.context() as patch:
        patch.setattr("visionhybrid.models.checkpoint.saving.save_file", full)
        with pytest.raises(OSError, match=r"toy.safetensors: cannot be written: .*No space left"):
            save(toy, path)
    assert path.read_bytes() == before

    def stopped(source, target):
        raise KeyboardInterrupt

    # Whatever happens before the last step, the renaming, the old file is as it was.
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            save(toy, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["toy.safetensors"]


def test_save_checks_the_number_of_class_names(toy, tmp_path):
    with pytest.raises(ValueError, match="2 class names for 5 classes"):
        save(toy, tmp_path / "toy.safetensors", classes=["a", "b"])
    assert not list(tmp_path.iterdir())


def test_metadata_of_another_version_is_checked(toy, tmp_path):
    save_file(toy.state_dict(), tmp_path / "a.safetensors", {"system": "toy", "options": '{"wings": 2}'})
    with pytest.raises(ValueError, match="toy has no option 'wings'"):
        visionhybrid.load(tmp_path / "a.safetensors")
    save_file(toy.state_dict(), tmp_path / "b.safetensors", {"options": "{"})
    with pytest.raises(ValueError, match="metadata 'options' is not JSON"):
        visionhybrid.load(tmp_path / "b.safetensors")


def test_warm_start_reports_what_it_did(toy, tmp_path):
    torch.save({"params": authors(toy)}, tmp_path / "start.pth")
    model = Toy(num_classes=2, depth=4)
    head = model.head.weight.clone()
    report = warm_start(model, tmp_path / "start.pth")
    assert report.reshaped == ("head.weight", "head.bias")
    assert set(report.new) == {name for name in model.state_dict() if name.startswith("blocks.3.")}
    assert (len(report.loaded), report.unused) == (len(toy.state_dict()) - 2, ())
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.blocks[2].conv.weight, toy.blocks[2].conv.weight)
    assert "2 of another shape: head.weight, head.bias" in str(report)


def test_warm_start_refuses_when_nothing_fits(toy):
    with pytest.raises(ValueError, match="no tensor of this toy fits the model"):
        warm_start(torch.nn.Linear(3, 3), authors(toy))
    with pytest.raises(ValueError, match="no system recognises"):
        warm_start(toy, {"fc.weight": torch.zeros(3)})


def test_inspect_of_unknown_and_unfit_weights_says_so(toy):
    found = visionhybrid.inspect({"fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3)})
    assert (found.system, found.values, found.parameters) == (None, 15, None)
    assert "no system recognises" in found.problem
    state = authors(toy)
    del state["head.bias"]
    assert "1 missing: head.bias" in visionhybrid.inspect(state).problem


def test_inspect_counts(toy):
    found = visionhybrid.inspect(authors(toy))
    assert found.parameters == sum(p.numel() for p in toy.parameters())
    assert found.tensors == len(authors(toy))
    assert found.options == {"in_chans": 3, "dim": 8, "num_classes": 5, "depth": 3}
    json.dumps(vars(found))


# ---- golden cases: the published implementations' keys, sizes and outputs, through `load` alone

# Not visible in any tensor of the case.
KEYWORDS = {"nextvit_custom_129x97": {"sr_ratios": (8, 2, 2, 1)}}
STEP = {"stage0": 4, "stage1": 4, "stage2": 4, "stage3": 2, "features": 2}  # outputs are stored subsampled


def whole_models(system):
    """Cases of whole models: blocks and arithmetic have no state that a system recognises."""
    return [name for name in list_cases() if name.startswith(f"{system}_") and is_whole(load_case(name))]


def is_whole(case):
    return {"stem.0.conv.weight", "conv_first.weight"} & set(case.facts["keys"])


@pytest.mark.parametrize("name", whole_models("nextvit"))
def test_golden_nextvit(name):
    case = load_case(name)
    model = visionhybrid.load({"model": case.state_dict()}, **KEYWORDS.get(name, {}))
    if "deploy" in name:
        with torch.inference_mode():
            case.check("logits_unmerged", model(case.input("x")))
            model.deploy()
    with torch.inference_mode():
        final, taps = model.forward_intermediates(case.input("x"))
        got = {f"stage{i}": tap for i, tap in enumerate(taps)}
        if "logits" in case.outputs:
            got |= {"features": final, "pooled": final.mean((2, 3)), "logits": model.forward_head(final)}
    for output, value in got.items():
        step = STEP.get(output)
        case.check(output, value[..., ::step, ::step] if step else value)
    assert {"logits", "stage3"} & got.keys()


@pytest.mark.parametrize(
    ("name", "key"),
    [("nextvit_custom_129x97", "features.1.norm.weight"), ("hat_tiny_x3_24x40", "layers.1.conv.bias")],
)
def test_golden_states_are_loaded_strictly(name, key):
    """One key too few, one too many, both (then both are told), one of another shape."""
    state, given = load_case(name).state_dict(), KEYWORDS.get(name, {})
    fewer = {k: v for k, v in state.items() if k != key}
    with pytest.raises(ValueError, match="1 missing: "):
        visionhybrid.load(fewer, **given)
    with pytest.raises(ValueError, match=r"1 unexpected: extra\.weight$"):
        visionhybrid.load({**state, "extra.weight": torch.zeros(1)}, **given)
    with pytest.raises(ValueError, match=r"1 missing: .*1 unexpected: extra\.weight"):
        visionhybrid.load({**fewer, "extra.weight": torch.zeros(1)}, **given)
    with pytest.raises(ValueError, match=r"1 of another shape: .* \(file \(3,\), model"):
        visionhybrid.load({**state, key: torch.zeros(3)}, **given)


@pytest.mark.parametrize("name", ["nextvit_custom_129x97", "hat_tiny_x3_24x40"])
def test_absurd_shapes_are_value_errors(name):
    state, given = load_case(name).state_dict(), KEYWORDS.get(name, {})
    for shape in ((), (0,), (1,), (0, 0, 0, 0)):
        for key in [*list(state)[:8], *list(state)[-4:]]:
            if state[key].shape != shape:
                with pytest.raises(ValueError, match="state dict: "):
                    visionhybrid.load({**state, key: torch.zeros(shape)}, **given)


# The attribution map of a model (hat_*_lam_*) is infer's to check; loading that model is the same as loading the others.
HAT = [name for name in whole_models("hat") if "_lam_" not in name]


@pytest.mark.parametrize("name", HAT)
def test_golden_hat(name):
    case = load_case(name)
    model = visionhybrid.load({"params": {}, "params_ema": case.state_dict()})
    assert model.scale == case.facts["kwargs"]["upscale"]
    groups = {}
    for i, group in enumerate(model.groups):
        group.register_forward_hook(lambda module, args, out, i=i: groups.update({f"group{i}": out}))
    with torch.inference_mode():
        if "tile" in case.facts:
            case.check("out", official_tiles(model, case.input("x"), **case.facts["tile"]))
        else:
            case.check("out", model(case.input("x")))
    for key in case.outputs:
        if key.startswith("group"):
            case.check(
                key, groups[key].permute(0, 2, 3, 1)[:, ::8, ::8]
            )  # the authors' are tokens (B, H, W, C)


@pytest.mark.parametrize("name", [name for name in HAT if "tiny" in name])
def test_golden_hat_takes_its_authors_keywords(name):
    case = load_case(name)
    state, keywords = case.state_dict(), case.facts["kwargs"]
    visionhybrid.load(state, **keywords)
    with pytest.raises(ValueError, match="dim=7 contradicts the weights"):
        visionhybrid.load(state, **{**keywords, "embed_dim": 7})
    with pytest.raises(ValueError, match="no option 'embed_dims'; did you mean 'embed_dim'"):
        visionhybrid.load(state, embed_dims=48)


def official_tiles(model, x, tile_size, tile_pad):
    """The authors' hard tiles: the padded image cut up, each tile with context, cores put side by side."""
    h, w = x.shape[2:]
    x = padded(x, model.multiple_of)
    out = x.new_zeros(*x.shape[:2], x.shape[2] * model.scale, x.shape[3] * model.scale)
    for top in range(0, x.shape[2], tile_size):
        for left in range(0, x.shape[3], tile_size):
            y0, x0 = max(top - tile_pad, 0), max(left - tile_pad, 0)
            tile = model(x[:, :, y0 : top + tile_size + tile_pad, x0 : left + tile_size + tile_pad])
            core = tile[:, :, (top - y0) * model.scale :, (left - x0) * model.scale :]
            core = core[:, :, : tile_size * model.scale, : tile_size * model.scale]
            target = out[:, :, top * model.scale :, left * model.scale :]
            target[:, :, : core.shape[2], : core.shape[3]] = core
    return out[:, :, : h * model.scale, : w * model.scale]
