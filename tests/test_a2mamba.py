"""A2Mamba: mixers, blocks and whole models against the official code's numbers, keys, options, sizes, mixed precision.

What holds for every backbone is in `tests/test_models.py`.
"""

import copy
import re

import pytest
import timm
import torch
from golden import list_cases, load_case
from torch import nn

import visionhybrid
from visionhybrid.models import a2mamba, registry
from visionhybrid.models.a2mamba import A2SSM, A2Mamba, Block, GlobalMixer, StateSpaceMixer
from visionhybrid.models.a2mamba.keys import _MIXER, block_key
from visionhybrid.models.a2mamba.mixer import adaptive_dilation, resized
from visionhybrid.models.layers import RotaryGrid

TINY = dict(depths=(1, 1, 2, 1), dims=(16, 16, 32, 32), num_heads=(2, 2, 4, 4), proj_dim=48, num_classes=5)


def tiny(**kwargs):
    return A2Mamba(**{**TINY, **kwargs})


def randomised(model):
    """Every tensor as after training: no norm an identity, no table empty."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("running_var"):
            nn.init.uniform_(value, 0.5, 1.5)
        elif value.is_floating_point():
            value.data.add_(0.1 * torch.randn_like(value))
    return model.eval()


def cases(*kinds):
    return [name for name in list_cases() if name.startswith(tuple(f"a2mamba_{kind}_" for kind in kinds))]


# ---- the official numbers


@pytest.mark.parametrize("name", cases("n", "t", "s", "b", "l"))
def test_golden_model(name):
    case = load_case(name)
    model = visionhybrid.load({"model": case.state_dict()}, image_size=case.facts["kwargs"]["image_size"])
    assert model.state_dict().keys() == a2mamba.convert(case.state_dict()).keys()
    check(model, case)
    check(model.deploy(), case)


def check(model, case):
    with torch.inference_mode():
        final, taps = model.forward_intermediates(case.input("x"))
        case.check("logits", model.forward_head(final))
    for i, (tap, step) in enumerate(zip(taps, (4, 4, 2, 1), strict=True), start=1):
        case.check(f"stage{i}", tap[..., ::step, ::step])


@pytest.mark.parametrize("name", cases("mass", "massglobal", "block", "a2ssm"))
def test_golden_part(name):
    """A mixer, a block or a state space alone: the output, and the gradient of input and parameters for a given cotangent."""
    case = load_case(name)
    kwargs, x = case.facts["kwargs"], case.input("x").requires_grad_()
    part, prefix = build(kwargs)
    state = {
        ours(prefix, key): value for key, value in case.state_dict().items() if not key.endswith("rpb.0")
    }
    target = part.state_dict()
    part.load_state_dict({key: value.view_as(target[key]) for key, value in state.items()}, strict=True)
    part.eval()
    heads = kwargs["num_heads"]
    args = () if isinstance(part, A2SSM) else (RotaryGrid(x.shape[1] // heads)(x),)
    y = part(x, *args)
    case.check("y", y)
    y.backward(case.input("g"))
    case.check("dx", x.grad)
    gradients = dict(part.named_parameters())
    for key in [key for key in case.outputs if key.startswith("d:")]:
        grad = gradients[ours(prefix, key[2:])].grad
        case.check(key, grad.view_as(case.outputs[key]))


def build(kwargs):
    """The part that a case names, and what its keys have before them in a block."""
    if "d_model" in kwargs:
        return A2SSM(kwargs["d_model"], num_heads=kwargs["num_heads"]), "token_mixer.ssm."
    common = dict(num_heads=kwargs["num_heads"], kernel_size=kwargs["window_size"])
    dim = kwargs["embed_dim"]
    if kwargs["global_mode"]:
        height, width = kwargs["image_size"]
        mixer = GlobalMixer(dim, tokens=height * width, **common)
    else:
        mixer = StateSpaceMixer(dim, **common)
    if "ffn_dim" not in kwargs:
        return mixer, "token_mixer."
    scale = "layer_scale" if kwargs["layerscale"] else "plain"
    residual = "residual_scale" if kwargs["resscale"] else scale
    return Block(dim, mixer=lambda dim: mixer, hidden=kwargs["ffn_dim"], residual=residual), ""


def ours(prefix, key):
    return block_key(prefix + key).removeprefix(block_key(prefix))


# ---- keys and options


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("nano", 4_195_052),
        ("tiny", 15_365_506),
        ("small", 30_672_834),
        ("base", 51_134_464),
        ("large", 93_737_376),
    ],
)
def test_published_sizes_and_what_their_shapes_tell(size, parameters):
    name = f"vh_a2mamba_{size}"
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert registry.names_of(registry.SYSTEMS["a2mamba"], a2mamba.options(model.state_dict())) == [name]


def authors(model):
    """The state of `model` under the authors' names."""
    state = {}
    inner = {ours: theirs for theirs, ours in _MIXER.items() if theirs != "rpb.0"}
    part = {"conv": 0, "norm": 1}
    for key, value in model.state_dict().items():
        head, _, rest = key.partition(".")
        if head == "stem":
            place, kind, leaf = rest.split(".")
            key = f"patch_embed.{3 * int(place) + part[kind]}.{leaf}"
        elif head in ("norm", "head"):
            kind, leaf = rest.split(".")
            key = f"classifier.{part.get(kind, 4)}.{leaf}"
        elif ".downsample." in key:
            stage, _, kind, leaf = rest.split(".")
            key = f"layers.{2 * int(stage) - 1}.{part[kind]}.{leaf}"
        else:
            stage, _, block, name = rest.split(".", 3)
            if name.startswith("mixer."):
                name = name.removeprefix("mixer.")
                start = max((ours for ours in inner if name.startswith(ours)), key=len, default="")
                name = f"token_mixer.{inner.get(start, '')}{name.removeprefix(start)}"
            key = f"layers.{2 * int(stage)}.blocks.{block}.{name.replace('scale', 'layer_scale')}"
        one_by_one = re.search(r"layer_scale\d.weight|state_fusion.weight|classifier.4.weight", key)
        state[key] = value.reshape(*value.shape, *[1] * (4 - value.dim())) if one_by_one else value
    for stage in range(4):
        state[f"layers.{2 * stage}.rope.angle"] = torch.ones(4)
    return state


@pytest.mark.parametrize("tables", ["both", "first", "second", "differing"])
@pytest.mark.parametrize("order", [list, sorted])
def test_one_table_in_two_places(tables, order):
    model = randomised(tiny())
    state = authors(model)
    for key in [key for key in state if key.endswith("rpb.1")]:
        first = key[:-1] + "0"
        state[first] = state[key] + (1 if tables == "differing" else 0)
        if tables == "first":
            del state[key]
        elif tables == "second":
            del state[first]
    state = {key: state[key] for key in order(state)}
    assert a2mamba.recognise(state)
    again = visionhybrid.load({"state_dict": {f"module.{key}": value for key, value in state.items()}})
    x = torch.randn(1, 3, 64, 40)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    assert a2mamba.checkpoint_filter_fn(state, model).keys() == model.state_dict().keys()


def test_what_the_scales_multiply_shows_in_no_shape():
    kinds = ("plain", "layer_scale", "residual_scale", "residual_scale")
    model = randomised(tiny(residual=kinds))
    x = torch.randn(1, 3, 64, 64)
    for state in (authors(model), model.state_dict(), copy.deepcopy(model).deploy().state_dict()):
        with pytest.raises(ValueError, match="shows in no shape; pass residual="):
            visionhybrid.load(state)
        again = visionhybrid.load(state, residual=kinds)
        with torch.no_grad():
            torch.testing.assert_close(again(x), model(x), rtol=2e-5, atol=2e-5)


def test_options_against_the_shapes_and_wrong_ones():
    state = randomised(tiny(img_size=(64, 96))).state_dict()
    assert visionhybrid.load(state, image_size=(96, 64)).stages[3].blocks[0].mixer.bias.shape[-1] == 6
    with pytest.raises(ValueError, match=r"img_size is \[64, 96\] in this checkpoint, got 224"):
        visionhybrid.load(state, image_size=224)
    for wrong, message in (
        (dict(depths=(1, 1, 1)), "depths needs 4 entries"),
        (dict(residual=("plain",) * 3 + ("other",)), "residual must be one of plain, layer_scale"),
        (dict(num_heads=(1, 2, 4, 4)), "even number of heads must divide width 16, got 1"),
        (dict(num_heads=(2, 2, 4, 8), dims=(16, 16, 32, 48)), "head_dim must be a multiple of 4, got 6"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(**wrong)


def test_pretrained_says_what_to_fetch(monkeypatch, tmp_path):
    monkeypatch.setenv("VISIONHYBRID_WEIGHTS", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        timm.create_model("vh_a2mamba_nano", pretrained=True, cache_dir=tmp_path)
    link = "https://huggingface.co/LMMM2025/A2Mamba/resolve/main/a2mamba_pretrained_weights/a2mamba_nano.pth"
    assert (
        f"from {link}, then put it into a folder named by $VISIONHYBRID_WEIGHTS as a2mamba_nano.pth"
        in str(caught.value)
    )
    model = randomised(timm.create_model("vh_a2mamba_nano"))
    torch.save({"model": authors(model)}, tmp_path / "a2mamba_nano.pth")
    again = timm.create_model("vh_a2mamba_nano", pretrained=True, num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again.forward_features(x), model.forward_features(x), rtol=0, atol=0)


@pytest.mark.parametrize("size", [160, (64, 224)])
def test_pretrained_for_another_image_size(size):
    """What is resized once, for `img_size`, is what would be resized at every call."""
    model = randomised(timm.create_model("vh_a2mamba_nano"))
    given = dict(img_size=size, num_classes=3, pretrained_cfg_overlay=dict(state_dict=authors(model)))
    again = timm.create_model("vh_a2mamba_nano", pretrained=True, **given).eval()
    height, width = (size, size) if isinstance(size, int) else size
    tokens = (height // 32) * (width // 32)
    assert again.stages[3].blocks[0].mixer.bias.shape[-1] == tokens != 49
    x = torch.randn(1, 3, height, width)
    with torch.no_grad():
        want = model.forward_features(x)
        assert (again.forward_features(x) - want).norm() < 1e-5 * want.norm()


# ---- sizes


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (33, 17), (3, 70), (192, 64)])
def test_sizes_at_which_the_official_code_raises(size):
    model = randomised(tiny())
    with torch.no_grad():
        y = model(torch.randn(2, 3, *size))
        assert y.isfinite().all()
        assert not torch.equal(y[0], y[1])
    model.train()(torch.randn(2, 3, *size)).backward(torch.randn(2, 5))


def test_dilation_spans_the_map():
    """As the authors' where theirs runs: floor(side / K), at most K."""
    for K in (7, 9, 11):
        for side in range(K, 200):
            assert adaptive_dilation(side, K) == min(side // K, K)
        assert {adaptive_dilation(side, K) for side in range(1, K)} == {1}


def test_resized_biases_are_kept_and_follow_the_weights():
    table = nn.Parameter(torch.randn(1, 2, 9, 9))
    want = nn.functional.interpolate(table.detach(), size=(20, 20), mode="bicubic")
    assert resized(table, 9) is table
    assert resized(table, 20).requires_grad
    with torch.no_grad():
        first = resized(table, 20)
        torch.testing.assert_close(first, want)
        assert resized(table, 20) is first
        assert resized(table, 12).shape == (1, 2, 12, 12)
        table.mul_(2)
        torch.testing.assert_close(resized(table, 20), 2 * want)
    with torch.inference_mode():
        torch.testing.assert_close(resized(table, 20), 2 * want)


# ---- mixed precision


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_states_and_what_follows_stay_float32_under_autocast(kind):
    """States that float16 cannot hold pass; the mixer keeps to its float32 self, and outputs float32."""
    mixer = randomised(nn.Sequential(StateSpaceMixer(32, num_heads=4, kernel_size=3)))[0]
    with torch.no_grad():
        mixer.ssm.A_log.fill_(-12.0)  # forgets nothing
        mixer.ssm.dt_bias.fill_(3.0)
        mixer.ssm.x_proj[mixer.ssm.rank :].mul_(300)
    x = torch.randn(2, 32, 24, 24)
    table = RotaryGrid(8)(x)
    want = mixer(x, table)
    with torch.autocast("cpu", kind):
        y = mixer(x, table)
        states = mixer.ssm(x)
    assert states.abs().max() > torch.finfo(torch.float16).max
    assert y.dtype == states.dtype == torch.float32
    assert y.isfinite().all()
    assert (y - want).norm() < 16 * torch.finfo(kind).eps * want.norm()
    y.backward(torch.randn_like(y))
    for name, parameter in mixer.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_two_hundred_steps_of_bfloat16():
    model = tiny(img_size=32, depths=(1, 1, 1, 1)).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    losses = []
    for _ in range(200):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0, error_if_nonfinite=True)
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes(dtype):
    model = randomised(tiny())
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        want = model(x)
        got = copy.deepcopy(model).to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert (got - want).norm() < (0.05 if dtype == torch.bfloat16 else 1e-5) * want.norm()


# ---- training


def test_first_weights():
    model = tiny()
    ssm = model.stages[2].blocks[0].mixer.ssm
    step = nn.functional.softplus(ssm.dt_bias)
    assert 1e-3 * 0.99 < step.min() < step.max() < 1e-1 * 1.01
    assert step.log().std() > 0.7  # spread over both decades
    assert ssm.x_proj.abs().max() <= 32**-0.5
    assert ssm.x_proj.std() > 0.5 * 32**-0.5
    decayed = model.no_weight_decay()
    assert {name.rsplit(".", 1)[1] for name in decayed} == {"rpb", "bias", "A_log", "D"}
    assert "stages.3.blocks.0.mixer.bias" in decayed


@pytest.mark.parametrize("residual", ["plain", "layer_scale", "residual_scale"])
def test_residuals(residual):
    """With branches that give nothing, what is left of the input."""
    kwargs = {} if residual == "plain" else dict(residual=residual, scale_init=0.5)
    block = Block(8, mixer=lambda dim: Nothing(), hidden=8, **kwargs)
    with torch.no_grad():
        for conv in (block.cpe1, block.cpe2, block.mlp.fc2):
            conv.weight.zero_()
            conv.bias.zero_()
        for scale in (block.scale1, block.scale2):
            if residual != "plain":
                scale.init_weights()
                scale.bias.fill_(3.0)
    x = torch.randn(1, 8, 4, 4)
    want = {"plain": x, "layer_scale": x + 6, "residual_scale": (x / 2 + 3) / 2 + 3}[residual]
    torch.testing.assert_close(block(x, torch.empty(0)), want)


class Nothing(nn.Module):
    def forward(self, x, position):
        return 0 * x
