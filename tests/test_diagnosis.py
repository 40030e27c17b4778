"""Effective receptive fields and profiles: against arithmetic done by hand, on every kind of classifier, by command."""

import dataclasses
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import visionhybrid
from visionhybrid.cli import app
from visionhybrid.infer.profiling import profile
from visionhybrid.infer.receptive_field import centre_gradient, receptive_field, square
from visionhybrid.infer.watching import KINDS, kind_of
from visionhybrid.models import facts, registry

CLASSIFIERS = [
    name
    for name in ("vh_a2mamba_nano", "vh_mala_tiny", "vh_nextvit_small", "vh_ravlt_tiny")
    if name in registry.SYSTEM_OF
]


class Boxes(nn.Module):
    """One map: the sum over a window of side `k`, of every colour, with a sign; infinite for a black picture."""

    def __init__(self, k, sign=1.0, in_chans=3):
        super().__init__()
        self.in_chans = in_chans
        self.pretrained_cfg = dict(
            mean=(0.0,) * in_chans, std=(0.5,) * in_chans, input_size=(in_chans, 32, 32)
        )
        self.conv = nn.Conv2d(in_chans, 1, k, padding=k // 2, bias=False)
        nn.init.constant_(self.conv.weight, sign)

    def forward_intermediates(self, x, indices, intermediates_only):
        return [self.conv(x) + (x.mean() == 0).float() * x.mean().log()]


def picture(value, side=40):
    return Image.fromarray(np.full((side, side, 3), value, np.uint8))


# ---- the effective receptive field


def test_field_of_a_window_is_the_window():
    field = receptive_field(
        Boxes(7), [picture(9), torch.rand(3, 50, 30)], size=33, thresholds=(0.2, 0.5, 0.99)
    )
    want = torch.zeros(33, 33, dtype=torch.float64)
    want[13:20, 13:20] = 3  # three colours
    torch.testing.assert_close(field.mean, want)
    torch.testing.assert_close(field.display, (want > 0).double())
    assert field.sides == {0.2: 5, 0.5: 5, 0.99: 7}  # of 49 pixels 25 are more than half, 9 less than a fifth
    assert field.ratios[0.99] == 49 / 33**2
    assert (field.images, field.skipped) == (2, 0)


def test_negative_gradients_do_not_count():
    with pytest.raises(ValueError, match="the gradient is not finite, or 0 everywhere, for all of 1 images"):
        receptive_field(Boxes(3, sign=-1.0), [picture(9)], size=32)


def test_images_without_a_finite_gradient_are_left_out():
    field = receptive_field(Boxes(3), [picture(0), picture(9), picture(200)], size=32)
    assert (field.images, field.skipped) == (2, 1)
    assert field.mean.max() == 3


def test_grey_models_take_grey_pictures():
    field = receptive_field(Boxes(3, in_chans=1), [picture(9)], size=32)
    assert field.mean.max() == 1


@pytest.mark.parametrize("shape", [(9, 9), (32, 32), (33, 20)])
def test_squares_are_those_of_the_published_script(shape):
    H, W = shape
    display = torch.rand(shape, dtype=torch.float64) ** 4
    for threshold in (0.05, 0.2, 0.5, 0.9):
        for i in range(1, max(H, W)):
            rows = slice(max(H // 2 - i, 0), H // 2 + i + 1)
            columns = slice(max(W // 2 - i, 0), W // 2 + i + 1)
            if display[rows, columns].sum() / display.sum() > threshold:
                break
        assert square(display, threshold) == min(2 * i + 1, max(H, W))


def test_model_is_left_as_it_was():
    model = timm.create_model("test_convnext").train()
    model.stem.requires_grad_(False)
    field = receptive_field(model, [picture(90)], size=64)
    assert field.mean.shape == (64, 64)
    assert model.training
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.startswith("stem")
    }
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_centre_gradient_of_classifiers_is_the_slope(name):
    """Against a difference quotient along the gradient itself."""
    model = timm.create_model(name).eval().double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)

    def centre(x):
        return model.forward_intermediates(x, 1, intermediates_only=True)[0][:, :, 1, 1].relu().sum()

    gradient = centre_gradient(model, x)
    x.requires_grad_()
    (full,) = torch.autograd.grad(centre(x), x)
    torch.testing.assert_close(gradient, full.relu().sum((0, 1)))
    with torch.no_grad():
        step = full / full.norm()
        quotient = (centre(x + 1e-5 * step) - centre(x - 1e-5 * step)) / 2e-5
    # Sums inside the operators are float64, too; relu has kinks.
    torch.testing.assert_close(quotient, full.norm(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([], {}, "no images"),
        ([picture(9)], {"size": 8}, "size starts at 32"),
        ([picture(9)], {"thresholds": (1.0,)}, r"thresholds lie in \(0, 1\), got 1024 and \[1.0\]"),
    ],
)
def test_wrong_calls_say_so(images, options, message):
    with pytest.raises(ValueError, match=message):
        receptive_field(Boxes(3), images, **options)


def test_no_backbone_is_named():
    with pytest.raises(ValueError, match="a backbone with forward_intermediates is needed, got Linear"):
        receptive_field(nn.Linear(2, 2), [picture(9)])


# ---- profiles


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm(16), nn.Linear(16, 16)])
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):  # (B, 3, 16, 16)
        conv, norm, linear = self.blocks
        x = linear(norm(conv(x)))  # (B, 8, 16, 16)
        return F.scaled_dot_product_attention(x, x, x) * self.gain


def test_profile_counts_what_a_hand_counts():
    model = Attending().train()
    found = profile(model, (2, 3, 16, 16), name="toy", repeats=2)
    assert model.training
    row = {row.name: row for row in (*found.blocks, *found.kinds)}
    macs = dict(convolution=2 * 256 * 27 * 8, attention=2 * 8 * 2 * 16**3)
    macs["matrix product"] = 2 * 8 * 16 * 16 * 16
    assert {kind: row[kind].macs for kind in KINDS} == {**dict.fromkeys(KINDS, 0), **macs}
    assert [r.macs for r in found.blocks] == [
        macs["convolution"],
        0,
        macs["matrix product"],
        macs["attention"],
    ]
    assert [r.name for r in found.blocks] == ["blocks.0", "blocks.1", "blocks.2", "outside blocks"]
    assert [r.parameters for r in found.blocks] == [224, 32, 272, 1]
    assert [row[kind].parameters for kind in KINDS] == [224, 272, 0, 0, 32, 1]
    map_bytes = 2 * 8 * 16 * 16 * 4
    assert row["blocks.0"].memory == row["convolution"].memory == map_bytes
    assert row["blocks.1"].memory > map_bytes  # the convolution's map, and its own
    assert found.memory == max(r.memory for r in found.blocks)
    for rows in (found.blocks, found.kinds):
        assert sum(r.seconds for r in rows) == pytest.approx(found.seconds)
        assert min(r.seconds for r in rows) >= 0
    assert row["attention"].seconds > 0
    assert "toy, 2 x 3 x 16 x 16, float32 on cpu" in found.title


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_profiles_of_classifiers(name):
    model = timm.create_model(name)
    found = profile(model, (1, 3, 64, 96), repeats=1)
    assert found.parameters == facts.parameters(model) == sum(row.parameters for row in found.blocks)
    assert found.parameters == sum(row.parameters for row in found.kinds)
    counted, _ = facts.count(timm.create_model(name, device="meta").eval(), (3, 64, 96))
    assert found.macs == counted
    kinds = {row.name: row.macs for row in found.kinds}
    assert kinds["convolution"] > 0
    assert kinds["attention"] > 0
    assert (kinds["scan"] > 0) == ("mamba" in name)
    assert sum(len(stage.blocks) for stage in model.stages) == sum(
        ".blocks." in row.name for row in found.blocks
    )
    assert "outside blocks" not in found.cells
    json.dumps(dataclasses.asdict(found))


def test_profile_of_a_restorer_and_of_timms_own():
    small = dict(dim=16, conv_dim=4, gate_dim=2, mlp_dim=32, tail_dim=8, window_size=8, key_window_size=12)
    net = visionhybrid.models.hat.HAT(depths=(1, 1), num_heads=(2, 2), scale=2, **small)
    found = profile(net, (1, 3, 16, 16), repeats=1)
    assert {"groups.0.blocks.0", "groups.1.blocks.0"} <= found.cells.keys()
    found = profile(timm.create_model("test_vit"), (1, 3, 160, 160), repeats=1)
    assert "outside blocks" in found.cells  # positions and class token
    assert sum(row.parameters for row in found.blocks) == found.parameters


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::convolution", "convolution"),
        ("mkldnn::_convolution_pointwise", "convolution"),
        ("aten::addmm", "matrix product"),
        ("aten::linear", "matrix product"),
        ("aten::linalg_vector_norm", "the rest"),
        ("aten::native_layer_norm", "normalisation"),
        ("aten::_native_batch_norm_legit_no_training", "normalisation"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("visionhybrid::linear_attention_eager_state", "attention"),
        ("visionhybrid::neighborhood_scores", "attention"),
        ("visionhybrid::selective_scan_triton", "scan"),
        ("aten::gelu", "the rest"),
    ],
)
def test_kinds_of_operators(operator, kind):
    assert kind_of(operator) == kind


def test_profile_needs_a_repeat():
    with pytest.raises(ValueError, match="repeats starts at 1, got 0"):
        profile(nn.Linear(2, 2), (1, 2), repeats=0)


# ---- the commands


def run(*words, status=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == status, result.output
    return result


SHORT = ("-o", "depths=[1,1,1,1]")


def test_erf_command(tmp_path):
    picture(120).save(tmp_path / "a.png")
    picture(30).save(tmp_path / "b.png")
    figure = tmp_path / "erf.png"
    words = ("erf", "vh_ravlt_tiny", tmp_path, "--untrained", *SHORT, "--size", 64, "--out", figure)
    assert f"figure: {figure}" in run(*words).output
    with Image.open(figure) as drawn:
        assert drawn.format == "PNG"
        assert np.asarray(drawn.convert("L")).std() > 10
    figure.unlink()
    said = json.loads(run(*words, "--limit", 1, "--json").stdout)
    assert (said["images"], said["skipped"], said["size"]) == (1, 0, 64)
    assert sorted(said["sides"]) == ["0.2", "0.3", "0.5", "0.99"]
    assert figure.is_file()
    assert (
        "no model 'vh_ravlt_tinny'; did you mean 'vh_ravlt_tiny'"
        in run("erf", "vh_ravlt_tinny", tmp_path, "--untrained", status=1).stderr
    )


def test_profile_command(tmp_path):
    figure = tmp_path / "profile.png"
    words = ("profile", "vh_ravlt_tiny", *SHORT, "--size", 64, "--repeats", 1)
    text = run(*words, "--out", figure).output
    for word in ("stages.3.blocks.0", "convolution", "normalisation", f"figure: {figure}"):
        assert word in text
    with Image.open(figure) as drawn:
        assert drawn.format == "PNG"
        assert np.asarray(drawn.convert("L")).std() > 10
    said = json.loads(run(*words, "--deploy", "--bf16", "--batch", 2, "--json").stdout)
    assert (said["dtype"], said["input_size"]) == ("bfloat16", [2, 3, 64, 64])
    assert [row["name"] for row in said["kinds"]] == list(KINDS)
    assert (
        "--deploy: HAT has nothing to fold" in run("profile", "vh_hat_small_x2", "--deploy", status=2).stderr
    )
