"""The timm host: mixers in vision transformers, taken out again, saved, recomputed and compiled at any size of image."""

import copy
import io
import pickle

import pytest
import timm
import torch
from mixing import joint, places
from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn

import visionhybrid
from visionhybrid import mixers
from visionhybrid.hosts.timm.modules import MixedAttention

# Options under which each mixer does something on the small grids here.
MIXERS = {
    "agent": dict(cell=2, ratio=0.2, agent_ratio=0.6),
    "clear": dict(radius=2),
    "hyena": {},
    "lina": dict(conv=3),
    "linear": dict(conv=3),
    "linfusion": dict(zero_init=False),
    "neighborhood": dict(kernel_size=3),
    "sla": dict(block_q=4, block_k=4, topk=0.3),
    "softmax": {},
    "window": dict(window_size=2, shift=1),
}


def vit(**kwargs):
    given = dict(
        img_size=(64, 96), patch_size=16, embed_dim=32, depth=3, num_heads=2, num_classes=5, reg_tokens=2
    )
    torch.manual_seed(3)
    model = VisionTransformer(**{**given, "dynamic_img_size": True, "qk_norm": True, **kwargs})
    for value in model.parameters():
        nn.init.normal_(value, std=0.3)  # gains, tokens and scales as after training
    return model.eval()


def images(height=64, width=96, batch=2):
    return torch.randn(batch, 3, height, width)


def trained(model):
    """Mixers as after training: no branch left at zero."""
    for module in model.modules():
        if isinstance(module, mixers.Mixer):
            for value in module.parameters():
                nn.init.normal_(value, std=0.3)
    return model


def test_every_mixer_is_tried():
    assert sorted(MIXERS) == mixers.list_mixers()


# ---- in and out


@pytest.mark.parametrize("name", MIXERS)
def test_attach_changes_outputs_and_detach_gives_back_the_exact_ones(name):
    model, x = vit(), images()
    with torch.no_grad():
        own = model(x)
        keys = list(model.state_dict())
        parameters = list(model.parameters())
        report = visionhybrid.attach(model, name, **MIXERS[name])
        trained(model)
        mixed = model(x)
        assert [row.mixer for row in report.rows] == [name] * 3
        assert [row.tokens for row in report.rows] == [24] * 3
        assert set(keys) < set(model.state_dict())
        assert all(any(p is q for q in model.parameters()) for p in parameters)  # optimisers still hold them
        assert mixed.isfinite().all()
        if name == "softmax":
            assert torch.equal(mixed, own)
        else:
            assert (mixed - own).abs().max() > 1e-3
        assert not visionhybrid.detach(model).mixed
        assert torch.equal(model(x), own)
    assert list(model.state_dict()) == keys
    assert type(model) is VisionTransformer
    assert {type(module) for module in model.blocks} == {Block}


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (48, 112)])
@pytest.mark.parametrize("name", ["window", "clear"])
def test_local_mixers_are_timms_own_attention_under_a_mask(name, size):
    """Class and register tokens see and are seen by all, the image's tokens have their places on its grid."""
    model, x = vit(), images(*size)
    grid = (size[0] // 16, size[1] // 16)
    at = places(grid)
    if name == "window":
        see = (at[:, None] // 2 == at // 2).all(-1)
        options = dict(window_size=2)
    else:
        see = torch.cdist(at.double(), at.double()) < 2
        options = dict(radius=2)
    with torch.no_grad():
        want = model(x, attn_mask=joint(see, 3))
        visionhybrid.attach(model, name, **options)
        torch.testing.assert_close(model(x), want, atol=1e-4, rtol=1e-4)


def test_hidden_states_of_a_mixer_go_through_the_fused_projection():
    model = vit()
    visionhybrid.attach(model, "linfusion", zero_init=False)
    attn = model.blocks[0].attn
    x = torch.randn(2, 27, 32)
    x_q, x_k = attn.mixer.hidden(x)
    want = [attn.qkv(source).chunk(3, -1)[i] for i, source in enumerate((x_q, x_k, x))]
    got = [part.transpose(1, 2).flatten(2) for part in attn._project(x)]
    torch.testing.assert_close(got, want)
    attn.qkv = nn.Sequential(attn.qkv)  # what LoRA or a quantised layer looks like: not a plain nn.Linear
    wrapped = [part.transpose(1, 2).flatten(2) for part in attn._project(x)]
    torch.testing.assert_close(wrapped, want)


@pytest.mark.parametrize("name", ["linfusion", "clear"])
def test_lora_of_the_fused_projection(name):
    """peft's layer computes all of q, k, v for each hidden state of a mixer; merged, a third of the weight does."""
    from peft import LoraConfig, get_peft_model

    model, x = vit(), images()
    visionhybrid.attach(model, name, **MIXERS[name])
    with torch.no_grad():
        before = model(x)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["qkv"], init_lora_weights="gaussian")
    adapted = get_peft_model(model, config)
    adapters = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * len(model.blocks)
    assert all(".attn.qkv.lora_" in key for key in adapters)
    for value in adapters.values():
        nn.init.normal_(value, std=0.3)
    out = adapted(x)
    assert not torch.allclose(out, before, atol=1e-2)
    out.backward(torch.randn_like(out))
    for key, value in adapters.items():
        parts = value.grad.chunk(3) if "lora_B" in key else [value.grad]  # of q, k, v
        assert all(part.abs().sum() > 0 for part in parts), key
    with torch.no_grad():
        with adapted.disable_adapter():
            assert torch.equal(adapted(x), before)
        merged = adapted.merge_and_unload()
        assert type(merged.blocks[0].attn.qkv) is nn.Linear
        torch.testing.assert_close(merged(x), out.detach(), rtol=1e-4, atol=1e-4)
        # peft puts a layer of its own where the projection was, in a model that has a mixer or gets one
        plain = get_peft_model(vit(), config)
        visionhybrid.attach(plain.get_base_model(), "softmax")
        with plain.disable_adapter():
            torch.testing.assert_close(plain(x), vit()(x), rtol=1e-4, atol=1e-4)


def test_several_mixers_rules_and_partial_detach():
    model, x = vit(), images()
    with torch.no_grad():
        own = model(x)
        visionhybrid.attach(model, {"blocks.0": ("window", {"window_size": 2}), "blocks.[12]": "linear"})
        assert [row.mixer for row in visionhybrid.describe(model).rows] == ["window", "linear", "linear"]
        both = model(x)
        visionhybrid.detach(model, layers="blocks.1")
        assert [row.mixer for row in visionhybrid.describe(model).rows] == ["window", None, "linear"]
        assert not torch.equal(model(x), both)
        visionhybrid.detach(model)
        assert torch.equal(model(x), own)
        assert len(visionhybrid.attach(model, "linear", layers="tokens > 20").mixed) == 3
        visionhybrid.detach(model)
        with pytest.raises(ValueError, match=r"detach: VisionTransformer has no mixers"):
            visionhybrid.detach(model)
        with pytest.raises(ValueError, match="selects none of 3"):
            visionhybrid.attach(model, "linear", layers=lambda layer: layer.tokens > 30)
    assert visionhybrid.describe(model, sample_size=(160, 160)).rows[0].tokens == 100


def test_other_blocks_distilled_models_and_precision():
    x = images(64, 64)
    for model in (
        vit(block_fn=ResPostBlock, class_token=False, reg_tokens=0, global_pool="avg"),
        timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=2).eval(),
    ):
        with torch.no_grad():
            own = model(x)
            visionhybrid.attach(model, "softmax")
            torch.testing.assert_close(model(x), own, atol=0, rtol=0)
            visionhybrid.detach(model)
            visionhybrid.attach(model, "linfusion")
            assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
            visionhybrid.detach(model)
    half = vit().bfloat16()
    visionhybrid.attach(half, "sla")
    assert half.blocks[0].attn.mixer.proj_l.weight.dtype == torch.bfloat16


# ---- refused


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", r"layers\.0\.blocks\.0\.attn: attention in windows with a bias"),
        ("eva02_tiny_patch14_224", r"blocks\.0\.attn: rotary attention"),
        ("beit_base_patch16_224", r"blocks\.0\.attn: Attention of Beit; timm models with mixers are Vision"),
        ("vit_small_patch16_18x2_224", r"blocks\.0\.attns\.0\.attn: it stands in a Sequential; blocks that"),
        ("resnet18", "ResNet has no attention that a mixer could replace"),
    ],
)
def test_other_models_are_refused_by_name_with_the_reason(name, reason):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=reason):
        visionhybrid.attach(model, "linear")


def test_what_a_mixer_would_lose_is_refused():
    with pytest.raises(ValueError, match=r"blocks\.0\.attn: drops 0\.1 of its weights in training"):
        visionhybrid.attach(vit(attn_drop_rate=0.1), "linear")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn: patch dropout leaves no grid"):
        visionhybrid.attach(vit(patch_drop_rate=0.2), "linear")
    with pytest.raises(ValueError, match="no weights of mixers are published for VisionTransformer"):
        visionhybrid.attach(vit(), "linear", weights="somewhere")
    model = vit()
    visionhybrid.attach(model, "linear")
    with pytest.raises(ValueError, match="linear mixers take neither attn_mask nor is_causal; detach first"):
        model(images(), is_causal=True)
    with pytest.raises(ValueError, match=r"a linear mixer needs grid=\(H, W\)"):
        model.blocks(torch.randn(1, 27, 32))
    assert model.blocks[0](torch.randn(1, 27, 32), grid=(4, 6)).shape == (1, 27, 32)


def test_a_failed_attach_leaves_the_model_alone():
    model = vit()
    with pytest.raises(ValueError, match="no option"):
        visionhybrid.attach(model, {"blocks.0": "linear", "blocks.1": ("window", {"windw": 3})})
    assert type(model) is VisionTransformer
    assert type(model.blocks[0].attn) is Attention


# ---- at use


def test_checkpointing_recomputes_on_the_grid_of_its_own_forward_pass():
    """As in DINO: crops of several sizes, 4 x 6 and 6 x 4 with as many tokens, before the backward pass."""
    x, other = images(64, 96), images(96, 64)
    found = []
    for enable in (False, True):
        model = vit().train()
        torch.manual_seed(0)
        visionhybrid.attach(model, "clear", radius=1.5, layers="blocks.[02]")
        model.set_grad_checkpointing(enable)
        calls = []
        model.blocks[0].attn.mixer.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        ((model(x) - model(other)) * torch.arange(5)).sum().backward()
        assert len(calls) == (4 if enable else 2)  # two sizes, each computed again in the backward pass
        found.append([value.grad.clone() for value in model.parameters()])
    torch.testing.assert_close(found[1], found[0])


def test_intermediates_agree_with_timms():
    model, x = vit(), images(64, 80)
    ours = copy.deepcopy(model)
    visionhybrid.attach(ours, "softmax")
    for options in (
        dict(),
        dict(indices=[0, -1], norm=True),
        dict(indices=2, return_prefix_tokens=True, stop_early=True),
        dict(indices=[0], stop_early=True, output_fmt="NLC"),
        dict(intermediates_only=True, output_fmt="NLC"),
        dict(output_dict=True, return_prefix_tokens=True),
        dict(output_dict=True, intermediates_only=True),
    ):
        with torch.no_grad():
            torch.testing.assert_close(
                ours.forward_intermediates(x, **options), model.forward_intermediates(x, **options)
            )
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NLC, got 'NHWC'"):
        ours.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("name", ["linear", "window"])
def test_compiled_without_a_graph_break(name):
    model = vit(depth=2)
    visionhybrid.attach(model, name, **MIXERS[name])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for x in (images(), images(64, 64)):
            torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
        assert visionhybrid.describe(compiled).mixed
        visionhybrid.detach(compiled)
    assert type(model) is VisionTransformer


# ---- saved


@pytest.mark.parametrize("name", ["sla", "window"])
def test_plain_timm_refuses_weights_that_belong_to_a_mixer(name):
    """Also where the mixer has no weights of its own, so that all other keys are timm's."""
    model = vit()
    visionhybrid.attach(model, name, **MIXERS[name])
    state = trained(model).state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*blocks\.0\.attn\._extra_state"):
        vit().load_state_dict(state)
    other = vit()
    visionhybrid.attach(other, name)
    with pytest.raises(ValueError, match="these weights are of another mixer"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn: it has a mixer, \w+; detach it first"):
        visionhybrid.attach(other, name)
    visionhybrid.detach(other)
    visionhybrid.attach(other, name, **MIXERS[name])
    nn.init.zeros_(other.head.weight)
    other.load_state_dict(state)
    x = images()
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.attn\._extra_state"):
        other.load_state_dict(vit().state_dict())


def test_copied_pickled_and_moved():
    model, x = vit(), images()
    visionhybrid.attach(model, "sla", **MIXERS["sla"])
    trained(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    torch.load(file, weights_only=True)
    with torch.no_grad():
        for twin in twins:
            assert isinstance(twin.blocks[0].attn, MixedAttention)
            assert torch.equal(twin(x), model(x))
        visionhybrid.detach(twins[0])
        assert torch.equal(twins[1](x), model(x))  # copies are apart
    wide = copy.deepcopy(model).double()
    torch.testing.assert_close(wide(x.double()).float(), model(x), atol=1e-4, rtol=1e-4)
