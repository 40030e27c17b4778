"""HAT and the restorers' skeleton: published numbers, any size, half precision, training, compilation, timm's view."""

import io
import warnings

import pytest
import timm
import torch
from golden import list_cases, load_case
from small_hat import TINY, spandrel_model, tiny
from torch.nn import functional as F

import visionhybrid
from visionhybrid.kernels import dispatch
from visionhybrid.kernels.window_attention import BACKENDS
from visionhybrid.models import hat
from visionhybrid.models.checkpoint import rename, warm_start
from visionhybrid.models.hat import (
    BLOCK_RULES,
    HAT,
    ChannelAttentionConv,
    HybridBlock,
    OverlapBlock,
    export_official,
    official_index,
    table_from_official,
)
from visionhybrid.models.restorer import padded

WHOLE = [n for n in list_cases() if n.startswith("hat_") and "conv_last.weight" in load_case(n).facts["keys"]]
# ---- published numbers


@pytest.mark.parametrize("name", [n for n in WHOLE if "tile" not in n and "lam" not in n])
def test_whole_models(name):
    case = load_case(name)
    state = case.state_dict()
    model = visionhybrid.load(state)
    x = case.input("x")
    with torch.no_grad():
        final, groups = model.forward_intermediates(x)
        features = model.forward_features(x)
        case.check("out", model(x))
    for i, group in enumerate(groups):
        if f"group{i}" in case.outputs:
            case.check(f"group{i}", group.permute(0, 2, 3, 1)[:, ::8, ::8])
    torch.testing.assert_close(final, features)
    exported = export_official(model)
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[key], state[key]) for key in state)


def test_authors_tiles():
    """The official tile mode, put together from whole tiles: hard cores, context clipped at the border."""
    case = load_case("hat_tiny_x2_tile_40x53")
    model = visionhybrid.load(case.state_dict())
    x = case.input("x")
    H, W = x.shape[2:]
    size, pad = case.facts["tile"]["tile_size"], case.facts["tile"]["tile_pad"]
    x = padded(x, model.multiple_of)
    out = x.new_empty(1, 3, 2 * x.shape[2], 2 * x.shape[3])
    for y in range(0, x.shape[2], size):
        for z in range(0, x.shape[3], size):
            bottom, right = min(y + size, x.shape[2]), min(z + size, x.shape[3])
            top, left = max(y - pad, 0), max(z - pad, 0)
            with torch.no_grad():
                tile = model(x[:, :, top : bottom + pad, left : right + pad])
            tile = tile[:, :, 2 * (y - top) :, 2 * (z - left) :][:, :, : 2 * (bottom - y), : 2 * (right - z)]
            out[:, :, 2 * y : 2 * bottom, 2 * z : 2 * right] = tile
    case.check("out", out[:, :, : 2 * H, : 2 * W])


def block_state(case, **tables):
    state = rename({k: v for k, v in case.state_dict().items() if "position_index" not in k}, BLOCK_RULES)
    state["mixer.bias_table"] = table_from_official(state["mixer.bias_table"], **tables)
    return state


@pytest.mark.parametrize("name", ["hat_hab_w8_24x8", "hat_hab_shift_w8_16x24"])
def test_hybrid_block(name):
    case = load_case(name)
    kw = case.facts["kwargs"]
    block = HybridBlock(48, 4, 8, conv_dim=12, gate_dim=8, mlp_dim=96, shift=kw["shift_size"], conv_scale=0.5)
    block.load_state_dict(block_state(case, window_size=8))
    x = case.input("x").unflatten(1, case.facts.get("feature_map", (24, 8)))
    case.check("out", block(x).flatten(1, 2)[:, ::4])
    with torch.no_grad():
        # by bands, in place, with the fused GELU
        kept = x.clone()
        case.check("out", block.eval()(x).flatten(1, 2)[:, ::4])
    assert torch.equal(x, kept)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_overlap_block(backend, monkeypatch):
    monkeypatch.setattr(dispatch, "PREFERRED", backend)
    case = load_case("hat_ocab_w8_16x24")
    block = OverlapBlock(48, 4, 8, 12, mlp_dim=96)
    block.load_state_dict(block_state(case, window_size=8, key_window_size=12))
    out = block(case.input("x").unflatten(1, case.facts["feature_map"]))
    case.check("out", out.flatten(1, 2)[:, ::4])
    case.check("index", official_index(8, 12)[::4, ::4].float())


def test_channel_attention_conv():
    case = load_case("hat_cab_c180_17x23")
    state = {f"conv_block.{key}": value for key, value in case.state_dict().items()}
    block = ChannelAttentionConv(180, 60, 6)
    block.load_state_dict({k.removeprefix("conv."): v for k, v in rename(state, BLOCK_RULES).items()})
    case.check("out", block(case.input("x"))[:, ::4])
    with torch.no_grad():  # the gate inside the weights
        out = block.onto(torch.zeros_like(case.input("x")), case.input("x"), 1.0)
    case.check("out", out[:, ::4])


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 5, 7), (3, 1, 4), (1, 6, 1)])
def test_convolution_added_to_the_stream(size):
    """At inference the gate comes from sums before the convolution it gates, borders included."""
    block = ChannelAttentionConv(12, 4, 3).double()
    stream, x = torch.randn(2, size[0], 12, *size[1:], dtype=torch.float64)
    want = stream + 0.5 * block(x)
    torch.testing.assert_close(block.onto(stream, x, 0.5), want)
    with torch.no_grad():
        torch.testing.assert_close(block.onto(stream, x, 0.5), want)


def test_parameter_counts():
    for name, count in (
        ("small_x4", 9_621_183),
        ("x1", 20_477_083),
        ("x3", 20_809_435),
        ("large_x2", 40_698_863),
    ):
        model = timm.create_model(f"vh_hat_{name}", device="meta")
        assert sum(p.numel() for p in model.parameters()) == count
        assert model.scale == int(name[-1])


# ---- sizes


@pytest.mark.parametrize("size", [(1, 1), (7, 50), (3, 4), (9, 2), (16, 16)])
def test_any_size(size):
    model = tiny()
    x = torch.rand(2, 3, *size)
    out = model(x)
    assert out.shape == (2, 3, 2 * size[0], 2 * size[1])
    # The same as padding by hand: reflect as far as possible, then repeat.
    for axis, side in ((2, size[0]), (3, size[1])):
        missing = -side % 4
        mirrored = min(missing, side - 1)
        mirror, repeat = ((0, n, 0, 0) if axis == 3 else (0, 0, 0, n) for n in (mirrored, missing - mirrored))
        x = F.pad(F.pad(x, mirror, mode="reflect"), repeat, mode="replicate")
    torch.testing.assert_close(out, model(x)[:, :, : out.shape[2], : out.shape[3]])


def test_contiguity_does_not_matter():
    model = tiny()
    x = torch.rand(1, 3, 8, 12)
    want = model(x)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), want)
    torch.testing.assert_close(model(x.transpose(2, 3).contiguous().transpose(2, 3)), want)


# ---- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_half_precision(dtype, how):
    model = tiny()
    x = torch.rand(1, 3, 12, 16)
    want = model(x)
    if how == "autocast":
        with torch.autocast("cpu", dtype):
            out = model(x)
        assert out.dtype == torch.float32
    else:
        out = model.to(dtype)(x.to(dtype))
        assert out.dtype == dtype
    assert ((out - want).norm() / want.norm()).item() < (2e-2 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_activations_stay_finite(dtype):
    """A residual stream beyond 65504 and logits of hundreds: where float16 gave black blotches."""
    model = tiny()
    with torch.no_grad():
        for group in model.groups:
            for block in (*group.blocks, group.overlap):
                block.mixer.qkv.weight.mul_(10)
    model.groups[0].register_forward_pre_hook(lambda module, args: (args[0] * 1e6,))
    x = torch.rand(1, 3, 8, 8)
    streams = []
    model.groups[0].overlap.register_forward_hook(lambda m, i, o: streams.append(o))
    want = model(x)
    assert streams[0].abs().max() > 65504
    for grad in (True, False):
        with torch.autocast("cpu", dtype), torch.set_grad_enabled(grad):
            out = model(x)
        # bfloat16 has float32's range
        assert streams.pop().dtype == (torch.float32 if grad or dtype == torch.float16 else dtype)
        assert torch.isfinite(out).all()
        assert ((out - want).norm() / want.norm()).item() < 0.1


def test_bfloat16_errs_no_more_than_the_peer():
    """Our stream is bfloat16 within a group and float32 over groups, the peer's bfloat16 throughout."""
    ours, theirs = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        peer = spandrel_model(upscale=2, depths=(6, 6, 6), num_heads=(2, 2, 2)).eval()
        for p in peer.parameters():
            torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.2)
        model, x = visionhybrid.load(peer.state_dict()), torch.rand(1, 3, 16, 16)
        with torch.inference_mode():
            want = peer(x)
            with torch.autocast("cpu", torch.bfloat16):
                ours.append(((model(x) - want).norm() / want.norm()).item())
                theirs.append(((peer(x) - want).norm() / want.norm()).item())
    assert sum(ours) < 1.1 * sum(theirs)


# ---- training


def test_gradients_reach_every_parameter():
    model = tiny(drop_path_rate=0.0, drop_rate=0.1).train()
    out = model(torch.rand(2, 3, 9, 12))
    out.backward(torch.randn_like(out))
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias moves all logits of a query alike, which no softmax sees; everything else must move.
    assert not [name for name in still if not name.endswith("qkv.bias")]


def test_checkpointing_changes_nothing():
    model = tiny(drop_path_rate=0.0).train()
    x, grads = torch.rand(1, 3, 8, 8), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_drop_path_rates_rise_linearly_and_spare_the_overlap():
    model = HAT(**TINY, drop_path_rate=0.3)
    rates = [block.drop_path.drop_prob for group in model.groups for block in group.blocks]
    assert rates == pytest.approx([0, 0.15, 0.3])
    assert not hasattr(model.groups[0].overlap, "drop_path")


def test_x4_starts_from_x2():
    x2, x4 = tiny(scale=2), tiny(scale=4)
    report = warm_start(x4, x2.state_dict())
    assert report.new == ("tail.up.1.weight", "tail.up.1.bias")
    assert not report.reshaped
    assert not report.unused
    assert all(torch.equal(x4.state_dict()[key], value) for key, value in x2.state_dict().items())
    report = warm_start(tiny(scale=3), x2.state_dict())
    assert sorted(report.reshaped) == ["tail.up.0.bias", "tail.up.0.weight"]


# ---- compilation and export


def test_compiles_without_a_break():
    model = tiny()
    x = torch.rand(1, 3, 8, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # The compiler takes operators apart and adds in another order, so bits may differ: pixels up to 46 by 2e-5 with torch 2.11,
    # relative 4e-7, as far as either is from float64.
    want = model(x)
    assert ((compiled(x) - want).norm() / want.norm()).item() < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(compiled(x)).all()


@pytest.mark.parametrize("side", [8, 9], ids=["example of whole windows", "example to be padded"])
def test_exports_with_free_size_and_without_own_operators(side):
    """One graph for every size above a window (4), whatever the example's was."""
    model = tiny(depths=(2,), num_heads=(2,))
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model, (torch.rand(2, 3, side, side + 4),), dynamic_shapes=({0: free, 2: free, 3: free},)
    )
    assert "visionhybrid" not in str(program.graph)
    run = program.module()
    for size in ((1, 3, 8, 12), (3, 3, 5, 9), (2, 3, 20, 7)):
        x = torch.rand(*size)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)


def test_onnx_gives_the_same_image():
    onnxruntime = pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    pytest.importorskip("onnxscript", reason="the export extra is not installed")
    model = tiny(depths=(2,), num_heads=(2,))
    x = torch.rand(1, 3, 7, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of its own deprecations
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    buffer = io.BytesIO()
    program.save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue())
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(x), rtol=1e-3, atol=1e-4)


# ---- timm's view


def test_made_by_timm():
    kwargs = dict(depths=[1, 1], num_heads=[6, 6])
    model = timm.create_model("vh_hat_small_x2", **kwargs).eval()
    assert model(torch.rand(1, 3, 5, 18)).shape == (1, 3, 10, 36)
    assert (model.num_classes, model.in_chans, model.scale, model.multiple_of) == (0, 3, 2, 16)
    grey = timm.create_model("vh_hat_small_x1", in_chans=1, **kwargs).eval()
    assert grey(torch.rand(1, 1, 5, 18)).shape == (1, 1, 5, 18)
    assert grey.mean.abs().sum() == 0
    features = timm.create_model("vh_hat_small_x2", features_only=True, out_indices=(0, 1), **kwargs).eval()
    assert features.feature_info.channels() == [144, 144]
    assert [f.shape for f in features(torch.rand(1, 3, 5, 18))] == [(1, 144, 5, 18)] * 2
    with pytest.raises(ValueError, match="num_classes must be 0"):
        timm.create_model("vh_hat_small_x2", num_classes=10, **kwargs)
    with pytest.raises(TypeError, match="wrong_word"):
        timm.create_model("vh_hat_small_x2", wrong_word=1)


def test_intermediates_and_pruning():
    model = tiny()
    x = torch.rand(1, 3, 6, 9)
    final, taps = model.forward_intermediates(x)
    assert [t.shape for t in (final, *taps)] == [(1, 16, 6, 9)] * 3
    (last,) = model.forward_intermediates(x, 1, intermediates_only=True)
    assert torch.equal(last, taps[1])
    (first,) = model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)
    assert torch.equal(first, taps[0])
    with pytest.raises(ValueError, match="norm=False"):
        model.forward_intermediates(x, norm=True)
    assert model.prune_intermediate_layers([0]) == [0]
    assert torch.equal(model.forward_intermediates(x, intermediates_only=True)[0], taps[0])
    assert len(model.groups) == 1


def test_meta_device_then_real():
    with torch.device("meta"):
        model = HAT(**TINY)
    assert all(t.device.type == "meta" for t in (*model.parameters(), *model.buffers()))
    model.bfloat16()(torch.rand(1, 3, 7, 9, device="meta", dtype=torch.bfloat16))
    model.to_empty(device="cpu").float().init_weights()
    assert all(torch.isfinite(t).all() for t in (*model.parameters(), *model.buffers()))
    torch.testing.assert_close(model.mean.flatten(), torch.tensor(hat.RGB_MEAN))
    assert model(torch.rand(1, 3, 7, 9)).shape == (1, 3, 28, 36)


# ---- wrong use


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(scale=5), "scale must be 3 or a power of 2, got 5"),
        (dict(key_window_size=7), "even number, got 7 and 4"),
        (dict(num_heads=(3, 3)), "multiple of num_heads, got 16 and 3"),
        (dict(depths=(1,)), "need one length, got 1 and 2"),
        (dict(shift=4), "shift goes from 0 to below window_size 4, got 4"),
        (dict(img_range=0), "img_range must be positive, got 0"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        HAT(**{**TINY, **options})


def test_wrong_input():
    with pytest.raises(ValueError, match=r"input must be \(B, 3, H, W\), got \(1, 1, 8, 8\)"):
        tiny()(torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"padded input must be \(8, 8\), got \(12, 8\)"):
        tiny(position_size=8)(torch.rand(1, 3, 12, 8))
