"""`vh_vit_*`: timm's contract for plain vision transformers, checkpoints that describe themselves.

Mirrors what applies of timm 1.0.31's `tests/test_models.py`; `tests/timm_contract/` runs that file itself.
"""

import json
from functools import partial

import pytest
import timm
import torch
from timm.models._manipulate import group_parameters
from torch import nn

import visionhybrid
from visionhybrid import mixers
from visionhybrid.models import checkpoint, registry, vit
from visionhybrid.models.facts import facts

NAMES = visionhybrid.list_models(system="vit")
SMALLEST = [name for name in NAMES if "_tiny_" in name]
SMALL = dict(depth=2, embed_dim=32, num_heads=2, img_size=64)  # options that make tests quick
close = partial(torch.testing.assert_close, atol=2e-5, rtol=2e-5)


def make(name, **kwargs):
    """Small, every weight as after training, no branch at zero."""
    model = timm.create_model(name, num_classes=7, **SMALL, **kwargs)
    for value in model.parameters():
        nn.init.normal_(value, std=0.2)
    return model.eval()


@pytest.fixture(params=SMALLEST)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return make(name)


# ---- registered


def test_names_are_sizes_times_mixers():
    assert len(NAMES) == len(vit.SIZES) * len(vit.MIXERS)
    assert {"vh_vit_tiny_patch16_sla", "vh_vit_base_patch16_linfusion"} <= set(NAMES)
    plain = {
        f"vh_vit_{size}": timm.create_model(f"vit_{size}_patch16_224", device="meta") for size in vit.SIZES
    }
    for name in NAMES:
        with torch.device("meta"):
            ours = timm.create_model(name)
        report = visionhybrid.describe(ours)
        wanted = vit.MIXERS[name.rpartition("_")[2]]
        assert {row.mixer for row in report.rows} == {wanted["mixer"]}
        assert wanted.get("mixer_options", {}).items() <= report.rows[0].options.items()
        theirs = plain[name.rpartition("_patch16")[0]].state_dict()
        own = {key: value for key, value in ours.state_dict().items() if "_extra" not in key}
        assert {key: v.shape for key, v in own.items() if ".mixer." not in key} == {
            key: v.shape for key, v in theirs.items()
        }


@pytest.mark.parametrize("name", NAMES)
def test_description_fits_the_model(name):
    with torch.device("meta"):
        model = timm.create_model(name, device="meta", dtype=torch.float32).eval()
    cfg = model.default_cfg
    assert (model.in_chans, model.num_classes) == (cfg["input_size"][0], cfg["num_classes"])
    assert not cfg.get("url")
    assert not cfg.get("hf_hub_id")
    x = torch.zeros(1, *cfg["input_size"], device="meta")
    assert model.forward_features(x).shape == (1, 197, model.num_features)
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert {f"{cfg['first_conv']}.weight", f"{cfg['classifier']}.weight"} <= model.state_dict().keys()
    for part in (*model.parameters(), *model.buffers()):
        assert part.device.type == "meta"


def test_facts_count_what_the_mixers_do():
    found = facts("vh_vit_tiny_patch16_linear")
    softmax = facts("vh_vit_tiny_patch16_clear")
    assert found.parameters - softmax.parameters == 12 * 192 * 26  # a 5x5 convolution with bias per channel
    assert softmax.parameters == 5_717_416  # timm's vit_tiny_patch16_224
    assert found.options["mixer"] == "linear"
    # ViT-Ti without what its attention matrix takes: 12 blocks x 2 x 197^2 x 192; the mixer's own is a small part.
    rest = 1.258e9 - 12 * 2 * 197**2 * 192
    assert 0 < found.macs - rest < 0.1e9


# ---- the interface


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (97, 40)])
def test_any_size(model, size):
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        y = model(x)
        assert y.shape == (2, 7)
        assert y.isfinite().all()
        close(y, model.forward_head(model.forward_features(x)))
        close(torch.cat([model(x[:1]), model(x[1:])]), y)  # images do not see each other


def test_backward_reaches_every_parameter_and_checkpointing_changes_nothing(name):
    x, cotangent = torch.randn(2, 3, 64, 48), torch.randn(2, 7)
    found = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = make(name).train()
        model.set_grad_checkpointing(enable)
        model(x).backward(cotangent)
        assert not [key for key, value in model.named_parameters() if value.grad is None]
        found.append([value.grad for value in model.parameters()])
    torch.testing.assert_close(found[1], found[0])


def test_classifier_pooling_groups_and_decay(model):
    x = torch.randn(2, 3, 64, 64)
    with pytest.raises(TypeError, match="not_an_option"):
        make("vh_vit_tiny_patch16_linear", not_an_option=1)
    with torch.no_grad():
        model.reset_classifier(3, "avg")
        assert model(x).shape == (2, 3)
        model.reset_classifier(0)
        assert model(x).shape == (2, 32)
        model.reset_classifier(0, "")
        close(model(x), model.forward_features(x))
    model.double().reset_classifier(2, "token")
    assert model.get_classifier().weight.dtype == torch.float64
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert len(set(groups.values())) == 2 + 2  # embedding, blocks, norm and head
    assert model.no_weight_decay() <= {*dict(model.named_parameters()), "reg_token", "dist_token"}


def test_intermediates_features_only_and_pruning(name):
    model, x = make(name), torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        final, taps = model.forward_intermediates(x)
        close(final, model.forward_features(x))
        assert [tap.shape for tap in taps] == [(2, 32, 4, 5)] * 2
        torch.manual_seed(1)
        whole = timm.create_model(name, **SMALL).eval()
        torch.manual_seed(1)
        net = timm.create_model(name, **SMALL, features_only=True, out_indices=(0, 1)).eval()
        close(net(x), whole.forward_intermediates(x, norm=False, intermediates_only=True))
        assert net.feature_info.channels() == [32, 32]
        assert net.feature_info.reduction() == [16, 16]
        assert model.prune_intermediate_layers([0]) == [0]
        close(model.forward_intermediates(x, intermediates_only=True), taps[:1])


def test_made_on_meta_then_filled(name):
    model = timm.create_model(name, device="meta", dtype=torch.float64, **SMALL)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(float("nan"))
    model.init_weights()
    for key, value in model.named_parameters():
        assert value.isfinite().all(), key
    fresh = mixers.create("linfusion", dim=32, heads=2, head_dim=16)
    for module in model.modules():
        if isinstance(module, type(fresh)):
            assert not module.to_q_[3].weight.any()  # as the mixer begins, not as timm draws a linear layer


def test_mixers_by_selector(tmp_path):
    model = make(
        "vh_vit_tiny_patch16_linear",
        mixer={"blocks.0": "linear", "*": ("window", {"window_size": 2})},
        mixer_options={},
    )
    x = torch.randn(1, 3, 40, 64)
    again = visionhybrid.load(checkpoint.save(model, tmp_path / "vit.safetensors"))
    assert [row.mixer for row in visionhybrid.describe(again).rows] == ["linear", "window"]
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("name", ["vh_vit_tiny_patch16_sla", "vh_vit_tiny_patch16_neighborhood"])
def test_exported(name):
    model, x = make(name), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        program = torch.export.export(model, (x,)).module()
        close(program(x), model(x))


# ---- saved


def test_checkpoints_describe_themselves(tmp_path):
    """Without metadata, from keys alone: heads, pooling, size of the table, and a mixer for each block."""
    model = make("vh_vit_tiny_patch16_sla", qk_norm=True, reg_tokens=2, global_pool="avg", in_chans=1)
    visionhybrid.detach(model, layers="blocks.1")
    visionhybrid.attach(model, "window", window_size=2)
    x = torch.randn(2, 1, 50, 64)
    again = visionhybrid.load(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    path = checkpoint.save(model, tmp_path / "vit.safetensors")
    again = visionhybrid.load(path)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert again.fc_norm.weight.shape == (32,)
    mixed = [(row.mixer, row.options.get("window_size")) for row in visionhybrid.describe(again).rows]
    assert mixed == [("sla", None), ("window", 2)]
    assert registry.made_with(model)["mixer"]["blocks.1.attn"] == ["window", {"window_size": 2}]
    assert visionhybrid.inspect(path).system == "vit"
    model.reset_classifier(3, "max")
    model.set_input_size(img_size=(64, 96))
    model.prune_intermediate_layers([0], prune_head=False)
    again = visionhybrid.load(checkpoint.save(model, tmp_path / "other.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    visionhybrid.detach(model)
    bare = visionhybrid.load(checkpoint.save(model, tmp_path / "bare.safetensors"))
    assert not visionhybrid.describe(bare).mixed
    with torch.no_grad():
        assert torch.equal(bare(x), model(x))


def test_a_name_is_found_again(tmp_path):
    for name in SMALLEST:
        with torch.device("meta"):
            model = timm.create_model(name)
        found = registry.names_of(registry.SYSTEMS["vit"], {**model.options(), "num_classes": 3})
        assert found == [name]


def test_folders_of_timm(name, tmp_path):
    model, x = make(name, global_pool="avg"), torch.randn(1, 3, 64, 64)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("size", [64, (96, 160)])
def test_pretrained_for_another_image_size(size):
    """Positions resampled once, for `img_size`, are those that would be resampled at every call."""
    kwargs = dict(depth=1, embed_dim=12, num_heads=2, reg_tokens=2)
    model = timm.create_model("vh_vit_tiny_patch16_linfusion", **kwargs, img_size=(128, 64)).eval()
    nn.init.normal_(model.pos_embed)
    given = dict(
        kwargs, pretrained_cfg_overlay=dict(state_dict=model.state_dict()), img_size=size, in_chans=1
    )
    again = timm.create_model("vh_vit_tiny_patch16_linfusion", pretrained=True, **given, num_classes=3).eval()
    grey = torch.randn(1, 1, *((size, size) if isinstance(size, int) else size))
    with torch.no_grad():
        want = model.forward_features(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(again.forward_features(grey), want, rtol=1e-4, atol=1e-5)
    assert again.pos_embed.shape[1] == 3 + again.patch_embed.num_patches


def test_contradictions_are_told(tmp_path):
    model = make("vh_vit_tiny_patch16_linear")
    path = checkpoint.save(model, tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match="num_heads must be 2 for these weights, got 4"):
        visionhybrid.load(path, num_heads=4)
    with pytest.raises(ValueError, match="mixer must be linear for these weights, got sla"):
        visionhybrid.load(model.state_dict(), mixer="sla")
    with pytest.raises(ValueError, match=r"mixer_options must be .*'conv': 5.* for these weights, got .*3"):
        visionhybrid.load(path, mixer_options=dict(conv=3))
    assert visionhybrid.load(path, drop_path_rate=0.1).blocks[1].drop_path1.drop_prob == pytest.approx(0.1)
    other = timm.create_model("vh_vit_tiny_patch16_linear", num_classes=7, **{**SMALL, "num_heads": 4})
    with pytest.raises(ValueError, match=r"these weights are of another mixer: .*'heads': 2"):
        other.load_state_dict(model.state_dict())
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=7, **SMALL)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*_extra_state"):
        plain.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="no system recognises these weights"):
        visionhybrid.load(plain.state_dict())
    state = {**model.state_dict(), "_extra_state": torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="no system recognises these weights"):
        visionhybrid.load(state)
    with pytest.raises(ValueError, match="no mixer 'linar'"):
        timm.create_model("vh_vit_tiny_patch16_linear", mixer="linar", mixer_options={})
    json.dumps(facts("vh_vit_tiny_patch16_sla").options)
