"""Reading HAT's published files: options from keys and shapes, the authors' layout and back, what is refused."""

import pytest
import torch
from golden import load_case
from small_hat import spandrel_model

import visionhybrid
from visionhybrid.models import hat
from visionhybrid.models.hat import export_official


@pytest.mark.parametrize(
    "options",
    [
        dict(upscale=2),
        dict(upscale=8, num_feat=16),
        dict(upscale=3, resi_connection="identity"),
        dict(upscale=1, in_chans=1, qkv_bias=False),
        dict(upscale=2, ape=True, img_size=8),
        dict(upscale=2, patch_norm=False, in_chans=4, overlap_ratio=1.0),
        dict(upscale=2, overlap_ratio=0.0, mlp_ratio=1.3),
    ],
    ids=str,
)
def test_every_option_against_the_peer_and_back(options):
    """Read from keys and shapes, run, export, and load strictly into spandrel's module."""
    peer = spandrel_model(**options).eval()
    for p in peer.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.2)
    state = peer.state_dict()
    ours = visionhybrid.load(state)
    x = torch.rand(1, options.get("in_chans", 3), 8, 8)
    with torch.no_grad():
        got, want = ours(x), peer(x)
    assert got.shape == want.shape
    assert ((got - want).norm() / want.norm()).item() < 1e-5
    exported = export_official(ours)
    peer.load_state_dict(exported, strict=True)
    assert all(torch.equal(exported[key], state[key]) for key in state)
    # and ours, saved under our keys, is read the same way
    assert hat.options(ours.state_dict()) == hat.options(state)
    assert hat.convert(ours.state_dict()).keys() == ours.state_dict().keys()


def test_keywords_of_the_authors():
    state = load_case("hat_tiny_x3_24x40").state_dict()
    chosen = hat.options(
        state,
        embed_dim=48,
        depths=(2, 2),
        compress_ratio=4,
        squeeze_factor=6,
        overlap_ratio=0.5,
        mlp_ratio=2.0,
        upscale=3,
        upsampler="pixelshuffle",
        resi_connection="1conv",
        ape=False,
        img_size=64,
        patch_size=1,
        conv_scale=0.5,
        img_range=255.0,
        qk_scale=0,
        drop_path_rate=0.2,
    )
    assert chosen["conv_scale"] == 0.5
    assert chosen["img_range"] == 255.0
    assert chosen["qk_scale"] is None
    assert "shift" not in chosen
    # Nothing in the weights shows that the authors' blocks would not shift here.
    assert hat.options(state, img_size=8)["shift"] == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(embed_dim=64), "embed_dim|dim=64 contradicts the weights, which have dim 48"),
        (dict(compress_ratio=3), r"that is conv_dim 16\) contradicts"),
        (dict(overlap_ratio=0.25), r"that is key_window_size 10\) contradicts"),
        (dict(upscale=4), "which have scale 3"),
        (dict(img_size=4), "img_size must be at least the window 8"),
        (dict(upsampler=""), "upsampler must be 'pixelshuffle'"),
        (dict(ape=True), "ape=True"),
        (dict(resi_connection="3conv"), "must be '1conv' or 'identity'"),
        (dict(attn_drop_rate=0.1), "attn_drop_rate must be 0"),
        (dict(banana=1), "no option 'banana'"),
    ],
    ids=str,
)
def test_contradictions_and_impossible_values(given, message):
    with pytest.raises(ValueError, match=message):
        hat.options(load_case("hat_tiny_x3_24x40").state_dict(), **given)


def test_index_buffers_may_be_missing_but_not_others():
    state = load_case("hat_tiny_x3_24x40").state_dict()
    bare = {key: value for key, value in state.items() if "position_index" not in key}
    assert hat.recognise(bare)
    want = hat.convert(state)
    assert all(torch.equal(value, want[key]) for key, value in hat.convert(bare).items())
    state["relative_position_index_OCA"] = state["relative_position_index_OCA"] % 361
    with pytest.raises(ValueError, match="come from another HAT"):
        hat.convert(state)


def test_not_hat():
    swinir = {
        "layers.0.residual_group.blocks.0.attn.relative_position_bias_table": torch.zeros(225, 6),
        "conv_first.weight": torch.zeros(60, 3, 3, 3),
        "conv_last.weight": torch.zeros(3, 64, 3, 3),
    }
    assert not hat.recognise(swinir)
    state = load_case("hat_tiny_x3_24x40").state_dict()
    state["layers.0.residual_group.blocks.0.attn.foreign.weight"] = torch.zeros(1)
    with pytest.raises(KeyError, match="no rule renames"):
        hat.convert(state)
