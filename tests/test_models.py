"""What timm asks of a backbone, on every registered classifier and on a toy that uses each part of `Spec`.

Mirrors what applies of timm 1.0.31's `tests/test_models.py`; `tests/timm_contract/` runs that file itself.
"""

import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers import NormMlpClassifierHead
from timm.models import create_feature_extractor, get_graph_node_names, reparameterize_model
from timm.models._features import FeatureGetterNet
from timm.models._manipulate import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from toy_backbone import toy_backbone

import visionhybrid
from visionhybrid.models import registry

# Plain vision transformers have one stage of tokens instead of maps: tests/test_vit.py.
CLASSIFIERS = [
    name for name in visionhybrid.list_models(task="classification") if registry.SYSTEM_OF[name] != "vit"
]
SIZES = ("nano", "tiny", "small", "base", "large")


def size(name):
    return next((i for i, word in enumerate(SIZES) if word in name.split("_")), 0)


# The smallest of each kind: the larger ones differ in depths and widths only.
KINDS = {
    "_".join(w for w in name.split("_") if w not in SIZES): name
    for name in sorted(CLASSIFIERS, key=size)[::-1]
}
NAMES = ["toy", *sorted(KINDS.values())]
# One of each system, where kinds share all code.
SYSTEMS = list({registry.SYSTEM_OF[name]: name for name in reversed(NAMES[1:])}.values())


def make(name, **kwargs):
    return toy_backbone(**kwargs) if name == "toy" else timm.create_model(name, **kwargs)


def trained(model):
    """Batch norms as after training: no two channels alike, no identity."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model.eval()


def batch_norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


close = partial(torch.testing.assert_close, atol=2e-5, rtol=2e-5)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return trained(make(name, num_classes=7))


# ---- registration


@pytest.mark.parametrize(
    "tag", [tag for tag in timm.list_models("vh_*", include_tags=True) if tag.split(".")[0] in CLASSIFIERS]
)
def test_description_fits_the_model(tag):
    with torch.device("meta"):
        model = timm.create_model(tag, device="meta", dtype=torch.float32).eval()
    cfg = model.default_cfg
    assert model.in_chans == cfg["input_size"][0]
    assert model.num_classes == cfg["num_classes"]
    assert not cfg.get("url")
    assert not cfg.get("hf_hub_id")  # timm's tests would download it
    x = torch.zeros(1, *cfg["input_size"], device="meta")
    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    names = model.state_dict().keys()
    assert cfg["first_conv"] + ".weight" in names
    assert not model.num_classes or cfg["classifier"] + ".weight" in names
    for part in (*model.parameters(), *model.buffers()):
        assert part.device.type == "meta"


def test_nothing_of_timms_is_shadowed():
    assert all(name.startswith("vh_") for name in registry.SYSTEM_OF)
    assert not [name for name in timm.list_models(module="nextvit") if name.startswith("vh_")]


# ---- the interface


def test_unknown_keyword_is_an_error(name):
    with pytest.raises(TypeError, match="not_an_option"):
        make(name, not_an_option=1)


@pytest.mark.parametrize("size", [(33, 47), (64, 32), (97, 40)])
def test_any_size_and_forward_is_head_of_features(model, size):
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        y = model(x)
        close(y, model.forward_head(model.forward_features(x)))
        assert y.shape == (2, 7)
        assert y.isfinite().all()
        close(torch.cat([model(x[:1]), model(x[1:])]), y)  # images do not see each other


def test_backward_reaches_every_parameter_and_checkpointing_changes_nothing(name):
    x = torch.randn(2, 3, 64, 48)
    cotangent = torch.randn(2, 7)
    results = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = make(name, num_classes=7).train()
        model.set_grad_checkpointing(enable)
        y = model(x)
        y.backward(cotangent)
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        assert not missing
        results.append((y.detach(), [p.grad for p in model.parameters()]))
    (y, grads), (y2, grads2) = results
    torch.testing.assert_close(y2, y)
    torch.testing.assert_close(grads2, grads)


def test_reset_classifier(model):
    x = torch.randn(2, 3, 64, 64)
    model.reset_classifier(3, "max")
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(5)  # keeps the pooling
        close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
        assert model(x).shape == (2, 5)
        assert model.num_classes == 5
        model.reset_classifier(4, "catavgmax")
        assert model.head_hidden_size == 2 * model.num_features
        assert model(x).shape == (2, 4)
        model.reset_classifier(0)
        assert model(x).shape == (2, model.head_hidden_size)
        model.reset_classifier(0, "")
        close(model(x), model.forward_features(x))
    model.double().reset_classifier(2, "avg")
    assert model.get_classifier().weight.dtype == torch.float64
    assert not model.get_classifier().training
    assert model.head_hidden_size == model.num_features


def test_layer_groups(model):
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    blocks = sum(len(stage.blocks) for stage in model.stages)
    assert len(set(groups.values())) == blocks + 2  # stem, blocks, head
    assert groups["norm.weight" if "norm.weight" in groups else "head.fc.weight"] >= blocks
    assert all(groups[n] <= groups["head.fc.weight"] for n in groups)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len(set(coarse.values())) == len(model.stages) + 2


def test_names_without_weight_decay_exist(model):
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


def test_stochastic_depth_rises_linearly():
    model = toy_backbone(drop_path_rate=0.3)
    rates = [block.drop_path for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_toy_names_what_must_not_decay():
    assert toy_backbone().no_weight_decay() == {"stages.1.position.gain"}


def test_a_head_of_another_kind():
    model = toy_backbone(head=partial(NormMlpClassifierHead, hidden_size=20), num_classes=3).eval()
    assert model.head_hidden_size == 20
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_made_on_meta_then_filled(name):
    model = make(name, device="meta", dtype=torch.float64, num_classes=5)
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"meta"}
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.fill_(float("nan"))
    model.init_weights()
    for key, value in (*model.named_parameters(), *model.named_buffers()):
        assert value.isfinite().all(), key
    assert model(torch.randn(1, 3, 64, 64, dtype=torch.float64)).isfinite().all()


# ---- features


def test_intermediates(model):
    x = torch.randn(2, 3, 65, 96)
    with torch.no_grad():
        final, taps = model.forward_intermediates(x)
        torch.testing.assert_close(final, model.forward_features(x))
        assert len(taps) == len(model.feature_info)
        for tap, info in zip(taps, model.feature_info, strict=True):
            sides = [-(-side // info["reduction"]) for side in (65, 96)]
            assert tap.shape[1] == info["num_chs"]
            assert all(0 <= side - got <= 1 for side, got in zip(sides, tap.shape[2:], strict=True))
        normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
        torch.testing.assert_close(normed, [*taps[:-1], final])
        some = model.forward_intermediates(x, [0, -2], stop_early=True)
        torch.testing.assert_close(some[1], [taps[0], taps[-2]])
        torch.testing.assert_close(some[0], taps[-2])  # the last stage did not run
        torch.testing.assert_close(model.forward_intermediates(x, 2, intermediates_only=True), taps[-2:])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_pruning(model):
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        taps = model.forward_intermediates(x, intermediates_only=True)
        kept = copy.deepcopy(model)
        assert kept.prune_intermediate_layers(1, prune_head=False) == [len(taps) - 1]
        torch.testing.assert_close(kept(x), model(x))
        assert model.prune_intermediate_layers([0, 1]) == [0, 1]
        torch.testing.assert_close(model.forward_intermediates(x, intermediates_only=True), taps[:2])
        torch.testing.assert_close(model.forward_features(x), taps[1])
    assert model.num_features == model.head_hidden_size == taps[1].shape[1]
    model.reset_classifier(3, "avg")
    model.train()(x).backward(torch.randn(2, 3))
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "kind", [{}, {"feature_cls": "getter"}, {"out_indices": (1, -1), "feature_cls": "list"}]
)
def test_features_only(kind):
    for name in NAMES[1:]:
        torch.manual_seed(1)
        model = timm.create_model(name)
        torch.manual_seed(1)
        net = timm.create_model(name, features_only=True, **kind)
        indices = list(kind.get("out_indices", range(4)))
        x = torch.randn(1, 3, 96, 64)
        with torch.no_grad():
            want = model.eval().forward_intermediates(x, indices, intermediates_only=True)
            got = net.eval()(x)
        torch.testing.assert_close(got, want)
        assert net.feature_info.channels() == [f.shape[1] for f in got]
        assert net.feature_info.reduction() == [96 // f.shape[2] for f in got]


# ---- weights


def test_state_round_trip_headless_and_folder(name, tmp_path):
    if name == "toy":
        other = toy_backbone(num_classes=7)
        other.load_state_dict(trained(toy_backbone(num_classes=7)).state_dict())
        return
    model = trained(timm.create_model(name, num_classes=6, in_chans=1, global_pool="max"))
    x = torch.randn(1, 1, 64, 64)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), atol=0, rtol=0)
    headless = {k: v for k, v in sorted(model.state_dict().items()) if not k.startswith("head.")}
    bare = timm.create_model(
        name,
        pretrained=True,
        num_classes=0,
        pretrained_cfg_overlay=dict(state_dict=headless, input_size=(1, 64, 64)),
    )
    with torch.no_grad():
        torch.testing.assert_close(bare.eval().forward_features(x), model.forward_features(x), atol=0, rtol=0)


# ---- deployment


def test_deploy_folds_every_batch_norm(model):
    x = torch.randn(2, 3, 64, 96)
    before = copy.deepcopy(model)
    assert batch_norms(model)
    fused = reparameterize_model(model)
    assert batch_norms(model)  # a copy was fused
    deployed = model.deploy()
    assert deployed is model
    assert not deployed.training
    assert not batch_norms(deployed)
    with torch.no_grad():
        want = before(x)
        close(deployed(x), want)
        close(deployed.forward_features(x), before.forward_features(x))
        keys, again = deployed.state_dict().keys(), deployed(x)
        assert deployed.deploy().state_dict().keys() == keys
        torch.testing.assert_close(deployed(x), again, atol=0, rtol=0)
        close(fused(x), want)


def test_deployed_model_goes_on_living(model):
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for norm, indices in ((False, [0, 1]), (True, [0, -1])):
            want = model.forward_intermediates(x, indices, norm=norm, intermediates_only=True)
            deployed = copy.deepcopy(model).deploy()
            close(deployed.forward_intermediates(x, indices, norm=norm, intermediates_only=True), want)
            close(FeatureGetterNet(deployed, out_indices=indices, norm=norm)(x), want)
        deployed = copy.deepcopy(model).deploy()
        other = copy.deepcopy(deployed)
        for p in other.parameters():
            p.mul_(1.5)
        assert not torch.allclose(other(x), deployed(x))
        other.load_state_dict(deployed.state_dict())
        torch.testing.assert_close(other(x), deployed(x), atol=0, rtol=0)
        with pytest.raises(RuntimeError, match=r"Unexpected key|Missing key"):
            model.load_state_dict(deployed.state_dict())
    with torch.inference_mode():
        half = copy.deepcopy(deployed).bfloat16()(x.bfloat16()).float()
        assert (half - deployed(x)).norm() < 0.03 * deployed(x).norm()
        with torch.autocast("cpu", torch.bfloat16):
            half = deployed(x).float()
        assert (half - deployed(x)).norm() < 0.03 * deployed(x).norm()
    deployed.reset_classifier(3)
    deployed.train()(x).backward(torch.randn(2, 3))
    assert all(p.grad is not None for p in deployed.parameters())


# ---- compilers


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("name", ["toy", *SYSTEMS], indirect=True)
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings(
    "ignore:NOTE. The nodes obtained by tracing:UserWarning"
)  # in training paths are dropped
def test_compilers(model, deployed):
    if deployed:
        model.deploy()
    x, smaller = torch.randn(2, 3, 64, 96), torch.randn(2, 3, 41, 33)
    with torch.no_grad():
        want, want_smaller = model(x), model(smaller)
        scripted = torch.jit.script(model)
        close(scripted(x), want)
        close(scripted(smaller), want_smaller)
        last = get_graph_node_names(model)[1][-1]
        traced = torch.jit.script(create_feature_extractor(model, {last: "logits"}))
        close(traced(x)["logits"], want)
        program = torch.export.export(model, (x,))
        assert not any("mkldnn" in str(node.target) for node in program.graph.nodes)  # runs anywhere
        close(program.module()(x), want)
        torch.compiler.reset()
        close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), want)
