"""RAVLT and MALA: the authors' numbers and keys, options, precision, deployment."""

import pytest
import timm
import torch
from golden import list_cases, load_case

import visionhybrid
from visionhybrid.models import registry
from visionhybrid.models.gated import SoftmaxMixer
from visionhybrid.models.layers import RotaryGrid
from visionhybrid.models.mala import MagnitudeAwareMixer
from visionhybrid.models.ravlt import RankAugmentedMixer

SYSTEMS = {"ravlt": RankAugmentedMixer, "mala": MagnitudeAwareMixer}
CASES = [name for name in list_cases() if name.split("_")[0] in SYSTEMS]
MIXERS = [name for name in CASES if "_mixer_" in name]


@pytest.mark.parametrize("name", [name for name in CASES if name not in MIXERS])
def test_golden_models(name):
    case = load_case(name)
    system, size, _ = name.split("_")
    model = visionhybrid.load({"model": case.state_dict()})
    found = registry.made_with(model)
    (known,) = registry.names_of(registry.SYSTEMS[system], found)
    assert known.startswith(f"vh_{system}_{size}")
    assert sum(p.numel() for p in model.parameters()) == case.facts["params"]
    with torch.inference_mode():
        final, taps = model.forward_intermediates(case.input("x"))
        for i, tap in enumerate(taps):
            case.check(f"stage{i}", tap[:, ::4, ::4, ::4], rel=1e-5)
        case.check("logits", model.forward_head(final), rel=1e-5)
        model.deploy()
        case.check("logits", model(case.input("x")), rel=1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_golden_mixers(name):
    case = load_case(name)
    cls = SoftmaxMixer if "softmax" in name else SYSTEMS[name.split("_")[0]]
    mixer = cls(**case.facts["kwargs"])
    mixer.load_state_dict({k[5:]: v for k, v in case.state_dict().items() if k.startswith("attn.")})
    x = case.input("x")
    with torch.inference_mode():
        case.check("y", mixer(x, RotaryGrid(mixer.head_dim)(x)), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vh_ravlt_small", 25.59),
        ("vh_ravlt_base", 48.24),
        ("vh_ravlt_large", 95.24),
        ("vh_mala_small", 27.14),
        ("vh_mala_base", 49.79),
        ("vh_mala_large", 97.77),
    ],
)
def test_published_sizes_and_options_from_our_keys(name, millions):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    system = registry.SYSTEMS[registry.SYSTEM_OF[name]]
    assert registry.names_of(system, system.options(model.state_dict())) == [name]


def test_a_tiny_model_of_our_own_tells_what_shapes_do_not():
    given = dict(depths=(1, 1, 1, 1), dims=(8, 16, 16, 24), num_heads=(2, 1, 4, 2), num_classes=3)
    model = visionhybrid.models.ravlt.RAVLT(**given, layer_scale=(None, 1.0, None, 0.1)).eval()
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"the number of heads shows in no shape; pass num_heads="):
        visionhybrid.load(state)
    with pytest.raises(
        ValueError, match=r"dims is \[8, 16, 16, 24\] in this checkpoint, got \[8, 16, 16, 32\]"
    ):
        visionhybrid.load(state, num_heads=(2, 1, 4, 2), dims=(8, 16, 16, 32))
    x = torch.randn(1, 3, 40, 33)
    with torch.inference_mode():
        want = model(x)
        again = visionhybrid.load(state, num_heads=(2, 1, 4, 2))
        torch.testing.assert_close(again(x), want, atol=0, rtol=0)
        deployed = visionhybrid.load(model.deploy().state_dict(), num_heads=(2, 1, 4, 2))
        torch.testing.assert_close(deployed(x), want)
    with pytest.raises(ValueError, match="RAVLT: 3 heads of a multiple of 4 channels do not fit width 16"):
        visionhybrid.models.ravlt.RAVLT(dims=(16, 16, 16, 16), num_heads=(3, 1, 1, 1))
    with pytest.raises(ValueError, match=r"RAVLT: depths needs 4 entries, got \[1, 2\]"):
        visionhybrid.models.ravlt.RAVLT(depths=(1, 2))


def test_without_the_projection_either_system_could_be_meant():
    case = load_case("mala_t_224")
    state = {k: v for k, v in case.state_dict().items() if not k.startswith(("proj.", "norm.", "head."))}
    with pytest.raises(ValueError, match="could be 'mala' and 'ravlt'; choose with system="):
        visionhybrid.load(state)


@pytest.mark.parametrize("system", SYSTEMS)
def test_half_precision_and_autocast_stay_near_float32(system):
    """One rounding of inputs and output is about 0.004."""
    case = load_case(f"{system}_mixer_linear_9x14")
    mixer = SYSTEMS[system](**case.facts["kwargs"])
    mixer.load_state_dict({k[5:]: v for k, v in case.state_dict().items() if k.startswith("attn.")})
    x = case.input("x")
    table = RotaryGrid(mixer.head_dim)(x)
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            case.check("y", mixer(x, table), rel=0.01)
        case.check("y", mixer.bfloat16()(x.bfloat16(), table), rel=0.01)


@pytest.mark.parametrize("system", SYSTEMS)
def test_gradients_of_the_linear_mixers(system):
    mixer = SYSTEMS[system](8, num_heads=2).double()
    x = torch.randn(1, 8, 3, 2, dtype=torch.float64, requires_grad=True)
    table = RotaryGrid(4)(x)
    torch.autograd.gradcheck(lambda x: mixer(x, table), x, fast_mode=True)


def test_rotary_angles_are_the_stored_ones():
    case = load_case("ravlt_mixer_linear_9x14")
    angle = case.state_dict()["rope.angle"]  # each twice
    cos, sin = RotaryGrid(32)(torch.empty(1, 32, 3, 5))
    row, column = 2, 4
    want = torch.cat([row * angle[::2], column * angle[::2]])
    torch.testing.assert_close(cos[row * 5 + column], want.cos())
    torch.testing.assert_close(sin[row * 5 + column], want.sin())
    with pytest.raises(ValueError, match="head_dim must be a multiple of 4, got 6"):
        RotaryGrid(6)


def test_published_file_of_a_name(tmp_path, monkeypatch):
    state = load_case("ravlt_t_224").state_dict()
    untrained = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({"model": untrained, "model_ema": state, "epoch": 299}, tmp_path / "RAVLT_T.pth")
    monkeypatch.setenv("VISIONHYBRID_WEIGHTS", str(tmp_path))
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        want = visionhybrid.load(state)(x)  # averaged weights are preferred
        got = timm.create_model("vh_ravlt_tiny.authors_in1k", pretrained=True).eval()(x)
        torch.testing.assert_close(got, want, atol=0, rtol=0)
        grey = timm.create_model("vh_ravlt_tiny", pretrained=True, in_chans=1, num_classes=3).eval()
        assert grey(x[:, :1]).shape == (1, 3)
        overlay = dict(file=str(tmp_path / "RAVLT_T.pth"))
        with pytest.raises(ValueError, match="these are weights of ravlt, but vh_mala_tiny is a mala"):
            timm.create_model("vh_mala_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
    monkeypatch.delenv("VISIONHYBRID_WEIGHTS")
    with pytest.raises(
        FileNotFoundError, match=r"fetch RAVLT_B\.pth from https://huggingface\.co/aldjalkdf/RAVLT"
    ):
        timm.create_model("vh_ravlt_base", pretrained=True, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="no published weights for vh_mala_tiny"):
        timm.create_model("vh_mala_tiny", pretrained=True)
