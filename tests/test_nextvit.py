"""Next-ViT: blocks and deployed models against the official code's numbers, key layouts, options, sizes, frozen training.

Whole models before deployment are compared in `tests/test_checkpoints.py`; what holds for every backbone in `tests/test_models.py`.
"""

import copy
import re

import pytest
import timm
import torch
from golden import load_case
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import visionhybrid
from visionhybrid.models import nextvit
from visionhybrid.models.checkpoint import rename
from visionhybrid.models.layers import Affine, DeployedConv2d, fold_after, fold_before, scale_shift
from visionhybrid.models.nextvit import EMHSA, NCB, NTB, NextViT, pool_tokens

TINY = dict(
    depths=(1, 2, 5, 2),
    stem_chs=(8, 8, 16),
    dims=(32, 32, 32, 32),
    ntb_dims=(64, 64, 64),
    mix_block_ratio=0.5,
)
INNER = ((r"mlp\.conv([12])\.(.+)", r"mlp.fc\1.\2"), (r"(.+)", r"\1"))


def tiny(**kwargs):
    return NextViT(**{**TINY, "num_classes": 5, **kwargs})


def trained(model):
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model.eval()


def authors(model):
    """The state of `model` under the authors' names, blocks numbered through."""
    state, names = {}, []
    for key, value in model.state_dict().items():
        if ".blocks." in key:
            _, stage, _, block, rest = key.split(".", 4)
            if (stage, block) not in names:
                names.append((stage, block))
            rest = rest.replace("mlp.fc", "mlp.conv")
            key = f"features.{names.index((stage, block))}.{rest}"
        key = re.sub(r"stages\.(\d)\.norm", r"extra_norm_list.\1", key)
        state[key.replace("head.fc", "proj_head.0")] = value
    return state


# ---- the official numbers


@pytest.mark.parametrize(
    "name", ["ncb_identity", "ncb_stride1", "ncb_stride2_odd", "ntb_sr1_stride2", "ntb_sr4_odd"]
)
def test_golden_block(name):
    case = load_case(f"nextvit_{name}")
    kwargs = case.facts["kwargs"]
    kind = NCB if "ncb" in name else NTB
    given = {k: kwargs[k] for k in ("stride", "sr_ratio") if k in kwargs}
    block = kind(kwargs["in_channels"], dim=kwargs["out_channels"], **given).eval()
    block.load_state_dict(rename(case.state_dict(), INNER), strict=True)
    x = case.input("x")
    with torch.no_grad():
        case.check("y", block(x))
        case.check("patch_embed", block.patch_embed(x))
        timm.models.reparameterize_model(nn.Sequential(block), inplace=True)
        case.check("y_merged" if "y_merged" in case.outputs else "y", block(x))
        for key in case.outputs:
            if key.startswith("merged:"):
                check_merged(case, key, block)


def check_merged(case, key, block):
    """The authors fold fewer norms, but these layers the same way: q without our scale, k and v with their biases."""
    layer, _, leaf = key.removeprefix("merged:").rpartition(".")
    layer = layer.replace("mlp.conv", "mlp.fc")
    if (layer, leaf) in (("e_mhsa.k", "bias"), ("e_mhsa.v", "bias")):
        return  # k's has no effect, v's went into proj
    value = block.get_parameter(f"{layer}.{leaf}")
    if layer == "e_mhsa.q":
        value = value * 32**0.5
    if leaf == "weight":
        step = 4 if layer == "mlp.fc1" else 2
        value = value[::step, ::step]
    case.check(key, value, rel=1e-5)


@pytest.mark.parametrize("name", ["small_200x232", "custom_129x97", "det_small_195x267", "seg_small_131x168"])
def test_golden_deployed_saved_and_loaded(name, tmp_path):
    case = load_case(f"nextvit_{name}")
    model = visionhybrid.load(case.state_dict(), **case.facts["kwargs"])  # the authors' names of arguments
    assert model.norm_eval == case.facts["kwargs"].get("norm_eval", False)
    torch.save(model.deploy().state_dict(), tmp_path / "deployed.pth")
    sr = {"sr_ratios": (8, 2, 2, 1)} if "custom" in name else {}
    again = visionhybrid.load(tmp_path / "deployed.pth", **sr)
    assert not [m for m in again.modules() if isinstance(m, _BatchNorm)]
    x = case.input("x")
    with torch.inference_mode():
        final, taps = again.forward_intermediates(x)
        got = {
            f"stage{i}": tap[..., :: 4 if i < 3 else 2, :: 4 if i < 3 else 2] for i, tap in enumerate(taps)
        }
        if "logits" in case.outputs:
            got |= dict(features=final[..., ::2, ::2], pooled=final.mean((2, 3)), logits=again(x))
        for output, value in got.items():
            case.check(output, value)


def test_sixty_one_norms():
    model = timm.create_model("vh_nextvit_small", device="meta")
    assert len([m for m in model.modules() if isinstance(m, _BatchNorm)]) == 61
    assert sum(p.numel() for p in model.parameters()) == 31_763_368
    rates = [
        b.mlp_drop_path.drop_prob if isinstance(b, NTB) else b.drop_path.drop_prob
        for s in model.stages
        for b in s.blocks
    ]
    assert rates == pytest.approx([0.1 * j / 19 for j in range(20)])
    last = model.stages[3].blocks[2]
    assert last.mhsa_drop_path.drop_prob == pytest.approx(0.075)
    assert last.mhca_drop_path.drop_prob == pytest.approx(0.025)


def test_timms_weights_give_timms_numbers():
    peer = trained(timm.create_model("nextvit_small", num_classes=9))
    model = visionhybrid.load(peer.state_dict())
    x = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        torch.testing.assert_close(model(x), peer(x), rtol=1e-5, atol=1e-6)


# ---- keys


@pytest.mark.parametrize("order", [list, sorted])
@pytest.mark.parametrize("headless", [False, True])
def test_any_layout_in_any_order(order, headless):
    model = trained(tiny(mlp_ratios=(2, 4), in_chans=1))
    x = torch.randn(1, 1, 60, 70)
    for state in (authors(model), model.state_dict()):
        state = {k: state[k] for k in order(state) if not (headless and ("head" in k))}
        again = visionhybrid.load(state, sr_ratios=(8, 4, 2, 1))
        assert again.num_classes == (0 if headless else 5)
        with torch.no_grad():
            torch.testing.assert_close(again.forward_features(x), model.forward_features(x), rtol=0, atol=0)
    assert nextvit.checkpoint_filter_fn(authors(model), model).keys() == model.state_dict().keys()


def test_a_detectors_backbone_is_taken_out():
    model = trained(tiny(num_classes=0, final_norm=False))
    state = {f"backbone.{k}": v for k, v in authors(model).items()} | {"neck.conv.weight": torch.zeros(1)}
    assert nextvit.recognise(state)
    assert nextvit.convert(state).keys() == model.state_dict().keys()


@pytest.mark.parametrize("loser", [None, "norm", "extra_norm_list.3"])
def test_of_two_last_norms_the_trained_one_counts(loser):
    model = trained(tiny(num_classes=0, extra_norm=True))
    state = authors(model)
    last = {k[5:]: state.pop(k) for k in list(state) if k.startswith("norm.")}
    winner = "norm" if loser == "extra_norm_list.3" else "extra_norm_list.3"
    state |= {f"{winner}.{leaf}": value for leaf, value in last.items()}
    if loser:
        state |= {f"{loser}.{leaf}": value for leaf, value in nn.BatchNorm2d(64).state_dict().items()}
    again = visionhybrid.load(state, sr_ratios=(8, 4, 2, 1), mix_block_ratio=0.5)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again.forward_features(x), model.forward_features(x), rtol=0, atol=0)


def test_pooling_ratio_that_no_shape_shows_must_be_given():
    model = trained(tiny(sr_ratios=(8, 2, 2, 1)))
    for state in (model.state_dict(), copy.deepcopy(model).deploy().state_dict()):
        with pytest.raises(ValueError, match=r"shows in no shape; pass sr_ratios="):
            visionhybrid.load(state)
        assert visionhybrid.load(state, sr_ratios=(8, 2, 2, 1)).stages[1].blocks[-1].e_mhsa.run == 4
        # Depths given as to the constructor: the rest has the constructor's defaults.
        assert visionhybrid.load(state, depths=TINY["depths"]).stages[1].blocks[-1].e_mhsa.run == 16
    none = tiny(sr_ratios=(1, 1, 1, 1))
    assert visionhybrid.load(none.state_dict()).stages[1].blocks[-1].e_mhsa.run == 1


def test_keyword_against_the_shapes_is_an_error():
    with pytest.raises(ValueError, match=r"num_classes is 5 in this checkpoint, got 1000"):
        visionhybrid.load(tiny().state_dict(), sr_ratios=(8, 4, 2, 1), num_classes=1000)


def test_missing_blocks_are_an_error():
    state = authors(tiny())
    for key, ours in (
        ("features.3.mlp.conv2.weight", "stages.2.blocks.0.mlp.fc2"),
        ("stem.1.conv.weight", "stem.1.conv"),
    ):
        with pytest.raises(ValueError, match=f"lacks {ours}"):
            visionhybrid.load({k: v for k, v in state.items() if k != key}, sr_ratios=(8, 4, 2, 1))


def test_every_published_weight_has_a_description():
    assert nextvit.WEIGHTS.keys() == {k for k in nextvit.CFGS if "." in k}
    assert nextvit.WEIGHTS["vh_nextvit_small.bd_in1k_384"].hub == "timm/nextvit_small.bd_in1k_384"


# ---- sizes


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 3), (24, 24), (32, 32), (33, 17)])
def test_sizes_at_which_the_official_code_raises(size):
    model = trained(tiny())
    for p in model.parameters():
        if (
            p.dim() > 1
        ):  # of the initial weights, nothing but rounding is left of an image after so many layers
            nn.init.kaiming_normal_(p)
    with torch.no_grad():
        y = model(torch.randn(2, 3, *size))
        assert y.isfinite().all()
        assert (y[0] - y[1]).norm() > 1e-3 * y.norm()
    model.train()(torch.randn(2, 3, *size)).backward(torch.randn(2, 5))


def test_tokens_are_pooled_along_rows():
    x = torch.arange(11.0).view(1, 11, 1).repeat(1, 1, 2)
    assert pool_tokens(x, 4)[0, :, 0].tolist() == [1.5, 5.5]  # tokens 8 to 10 are left out
    assert pool_tokens(x, 11)[0, :, 1].tolist() == [5.0]
    assert pool_tokens(x, 16)[0, :, 0].tolist() == [5.0]  # fewer than a run: their mean


def test_attention_is_softmax_over_pooled_tokens():
    attn = EMHSA(64, head_dim=32, sr_ratio=2).eval()
    x = torch.randn(2, 10, 64)
    kv = torch.stack([x[:, i : i + 4].mean(1) for i in (0, 4)], 1) / (1 + 1e-5) ** 0.5
    q, k, v = (
        layer(t).view(2, -1, 2, 32).transpose(1, 2) for layer, t in ((attn.q, x), (attn.k, kv), (attn.v, kv))
    )
    out = (q @ k.transpose(2, 3) / 32**0.5).softmax(-1) @ v
    want = attn.proj(out.transpose(1, 2).reshape(2, 10, 64))
    torch.testing.assert_close(attn(x), want, rtol=1e-4, atol=1e-6)


def test_dropout_acts_where_it_is_asked_for():
    x = torch.randn(2, 3, 64, 64)
    for kwargs in (
        dict(proj_drop_rate=0.5),
        dict(attn_drop_rate=0.5),
        dict(drop_rate=0.5),
        dict(drop_path_rate=0.9),
    ):
        model = trained(tiny(**{"drop_path_rate": 0.0, **kwargs}))
        with torch.no_grad():
            assert torch.equal(model(x), model(x))
            for norm in [m for m in model.train().modules() if isinstance(m, _BatchNorm)]:
                norm.eval()
            assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(depths=(3, 4, 7, 3)), "the third a multiple of 5"),
        (dict(depths=(3, 4, 10)), "depths needs 4 entries"),
        (dict(dims=(32, 40, 32, 32)), "multiple of head_dim 32, got 40"),
        (dict(mix_block_ratio=1.0), "splits width 64 into 64"),
        (dict(strides=(1, 2, 3, 2)), "strides are 1 or 2"),
    ],
)
def test_impossible_models(wrong, message):
    with pytest.raises(ValueError, match=message):
        tiny(**wrong)


# ---- deployment


def test_deployed_block_is_smaller_and_explains_itself():
    block = trained(nn.Sequential(NTB(32, dim=64, sr_ratio=2, mix=0.5)))
    timm.models.reparameterize_model(block, inplace=True)
    attn = block[0].e_mhsa
    assert attn.k.bias is None
    assert attn.v.bias is None
    assert attn.scale == 1.0
    assert isinstance(block[0].norm1, nn.Identity)
    assert isinstance(block[0].mlp.fc1, DeployedConv2d)


def test_sync_batch_norm_folds_too():
    model = trained(tiny(extra_norm=True))
    x = torch.randn(1, 3, 64, 64)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()
    assert any(isinstance(m, nn.SyncBatchNorm) for m in synced.modules())
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(synced.deploy()(x), want, rtol=2e-5, atol=2e-5)
    assert not any(isinstance(m, _BatchNorm) for m in synced.modules())


def test_folds():
    norm = trained(nn.Sequential(nn.BatchNorm2d(6)))[0]
    scale, shift = scale_shift(norm)
    x = torch.randn(2, 4, 5, 5)
    for bias in (False, True):
        conv = nn.Conv2d(4, 6, 3, bias=bias)
        want = norm(conv(x))
        fold_after(conv, scale, shift)
        torch.testing.assert_close(conv(x), want, rtol=1e-5, atol=1e-5)
        after = nn.Conv2d(6, 3, 1, bias=bias)
        y = torch.randn(2, 6, 5, 5)
        want = after(norm(y))
        fold_before(after, scale, shift)
        torch.testing.assert_close(after(y), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Affine(norm)(y), norm(y), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="pointwise on 6 channels"):
        fold_before(nn.Conv2d(6, 3, 3), scale, shift)
    with pytest.raises(ValueError, match="running statistics"):
        scale_shift(nn.BatchNorm2d(3, track_running_stats=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [False, True])
def test_deployed_convolution_follows_its_weight(dtype, relu):
    conv = nn.Conv2d(8, 16, 3, 2, 1, groups=2, dtype=dtype)
    fast = DeployedConv2d.of(conv, relu=relu)
    bound = 1e-5 if dtype == torch.float32 else 2e-2

    def check(size):
        x = torch.randn(2, 8, *size, dtype=dtype)
        with torch.no_grad():
            want = conv(x).relu() if relu else conv(x)
            torch.testing.assert_close(fast(x), want, rtol=bound, atol=bound)

    for size in ((9, 11), (30, 31)):
        check(size)
    with torch.no_grad():
        conv.weight.mul_(-2)  # shared
    check((9, 11))
    conv.load_state_dict(nn.Conv2d(8, 16, 3, 2, 1, groups=2).state_dict())
    check((9, 11))
    x = torch.randn(1, 8, 5, 5, dtype=dtype, requires_grad=True)
    fast(x).backward(torch.randn(1, 16, 3, 3, dtype=dtype))
    assert x.grad is not None


# ---- detection and segmentation


def test_frozen_stages_and_norm_eval_hold_through_train():
    model = timm.create_model("vh_nextvit_small_det", frozen_stages=1, norm_eval=True, features_only=True)
    assert model.eval() is model
    model.train()
    inner = model.model
    assert not inner.stem.training
    assert not inner.stages[0].training
    assert inner.stages[1].training
    assert not any(m.training for m in inner.modules() if isinstance(m, _BatchNorm))
    trainable = [p for p in inner.parameters() if p.requires_grad]
    assert (len(trainable), len(list(inner.parameters()))) == (240, 285)
    maps = model(torch.randn(2, 3, 64, 64))
    assert [m.shape[1] for m in maps] == [96, 256, 512, 1024]
    torch.autograd.backward(maps[1:], [torch.randn_like(m) for m in maps[1:]])
    assert all(p.grad is not None for p in trainable)


def test_extra_norms_stand_in_the_main_path():
    model = trained(tiny(extra_norm=True))
    seen = {}
    model.stages[0].norm.register_forward_hook(lambda module, args, out: seen.update(out=out))
    model.stages[1].register_forward_pre_hook(lambda module, args: seen.update(next=args[0]))
    taps = model.forward_intermediates(torch.randn(1, 3, 64, 64), intermediates_only=True)
    assert seen["out"] is seen["next"] is taps[0]


def test_attention_keeps_no_weights_for_the_backward_pass():
    """Its maps of queries by keys are the largest thing attention could keep."""
    attention = EMHSA(64, sr_ratio=2)
    x = torch.randn(2, 64, 96).transpose(1, 2)  # as a map's tokens lie in memory
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        attention(x)
    assert kept
    assert not any(tuple(shape[-2:]) == (96, 24) for shape in kept)
