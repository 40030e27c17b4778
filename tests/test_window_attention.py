"""Window attention: every backend against the float64 definition, the published numbers, and PyTorch's tools."""

import pytest
import torch
from golden import load_case
from hypothesis import given, settings
from hypothesis import strategies as st

from visionhybrid.kernels import dispatch
from visionhybrid.kernels.dispatch import pick, why
from visionhybrid.kernels.window_attention import BACKENDS, arguments, eager, grid, window_attention
from visionhybrid.kernels.window_attention.bands import suits
from visionhybrid.models.checkpoint import rename
from visionhybrid.models.hat import BLOCK_RULES, WindowAttention, table_from_official

# H, W, heads, D, E, options
SHAPES = {
    "plain": (8, 12, 3, 5, 7, dict(window_size=4)),
    "shifted": (8, 12, 3, 5, 7, dict(window_size=4, shift=2)),
    "one window high": (4, 8, 2, 8, 8, dict(window_size=4, shift=2)),
    "one window, shifted": (5, 5, 1, 3, 3, dict(window_size=5, shift=2)),
    "overlapping": (8, 12, 3, 5, 7, dict(window_size=4, key_window_size=6)),
    "rectangles": (6, 8, 2, 4, 4, dict(window_size=(3, 4), key_window_size=(5, 8))),
    "rows only": (6, 8, 2, 4, 4, dict(window_size=(3, 4), shift=(1, 0))),
    "single tokens": (3, 2, 2, 4, 1, dict(window_size=1)),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FAST = [name for name in BACKENDS if name != "reference"]


def err(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


def draw(shape, dtype, with_bias=True, size=1.0):
    H, W, heads, D, E, options = shape
    qk = (size * torch.randn(2, H, W, 2, heads, D)).to(dtype)
    v = torch.randn(2, H, W, heads, E).to(dtype)
    args = arguments(*qk.unbind(3), v, **options)
    (wh, ww), (eh, ew) = args[4:6]
    bias = torch.randn(heads, wh * ww, eh * ew, dtype=dtype if dtype == torch.float64 else torch.float32)
    # q and k are strided views of one tensor, as out of a joint projection
    return (*(t.detach() for t in qk.unbind(3)), v, bias if with_bias else None), options


def run(inputs, options, backend, cotangent):
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    out = window_attention(*leaves, backend=backend, **options)
    wanted = [t for t in leaves if t is not None]
    return out, torch.autograd.grad(out, wanted, cotangent.to(out.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("backend", FAST)
def test_value_and_gradients_against_the_definition(backend, name, dtype):
    inputs, options = draw(SHAPES[name], dtype)
    args = arguments(*inputs, **options)
    if reason := BACKENDS[backend].unsupported(*args):
        pytest.skip(reason)
    cotangent = torch.randn(inputs[2].shape).to(dtype)
    want, want_grads = run(inputs, options, "reference", cotangent)
    got, grads = run(inputs, options, backend, cotangent)
    assert want.dtype == torch.float64
    assert got.dtype == dtype
    limit = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}[dtype]
    assert err(got, want) < limit
    for have, need, leaf in zip(grads, want_grads, inputs, strict=True):
        assert have.dtype == leaf.dtype
        if need.abs().max() > 1e-9:  # a window of one token: the logits have no slope
            assert err(have, need) < 2 * limit
        else:
            assert have.abs().max() < 1e-2


@pytest.mark.parametrize("name", ["plain", "shifted", "overlapping"])
def test_without_bias(name):
    inputs, options = draw(SHAPES[name], torch.float32, with_bias=False)
    cotangent = torch.randn(inputs[2].shape)
    want, want_grads = run(inputs, options, "reference", cotangent)
    got, grads = run(inputs, options, "eager", cotangent)
    assert err(got, want) < 1e-6
    assert all(err(a, b) < 2e-6 for a, b in zip(grads, want_grads, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    window=st.integers(1, 5),
    extra=st.sampled_from([0, 2, 4]),
    shift=st.integers(0, 4),
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 3, 24, 30]),
)
def test_drawn_shapes(rows, columns, window, extra, shift, heads, dim):
    options = dict(window_size=window)
    options |= dict(key_window_size=window + extra) if extra else dict(shift=shift % window)
    inputs, _ = draw((rows * window, columns * window, heads, dim, dim, options), torch.float32)
    want = window_attention(*inputs, backend="reference", **options)
    assert err(window_attention(*inputs, **options), want) < 1e-6
    assert err(eager.whole_map(*arguments(*inputs, **options)), want) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_far_outside_the_range_of_exp(dtype):
    """Without a row maximum these overflow or vanish: the second, careful path."""
    inputs, options = draw(SHAPES["shifted"], dtype, size=20.0)
    q, k, v, bias = inputs
    for offset in (0.0, 3e3, -3e3):
        out = window_attention(q, k, v, bias + offset, **options)
        assert torch.isfinite(out).all()
        if (
            dtype != torch.bfloat16
        ):  # logits of several hundred in bfloat16 have no digits left after the point
            limit = {torch.float64: 1e-12, torch.float32: 1e-3, torch.float16: 2e-3}[dtype]
            assert err(out, window_attention(q, k, v, bias + offset, backend="reference", **options)) < limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 2])
def test_bands_with_projections_equal_the_map(dtype, shift):
    """What inference on a CPU runs against the operator that training runs."""
    mixer = WindowAttention(12, 3, 4, shift=shift)
    for p in mixer.parameters():
        torch.nn.init.normal_(p, 0.0, 0.5)
    mixer.to(dtype)
    x = torch.randn(2, 8, 12, 12).to(dtype)
    assert not suits(x)
    want = mixer(x)
    with torch.no_grad():
        assert suits(x)
        out = mixer(x)
        with torch.device("meta"):
            assert not suits(torch.empty(1))
        onto = torch.ones(x.shape, dtype=torch.float64)
        assert mixer(x, onto) is onto
        assert torch.equal(onto, 1 + out.double())
    assert out.dtype == dtype
    assert err(out, want) < {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-6)
    if dtype == torch.float32:
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            assert err(mixer(x), want) < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_with_large_logits_between_them(dtype):
    """A logit of 100 between pieces weighs as much as 0 within them: minus 100 is not infinity."""
    (q, k, v, bias), options = draw(SHAPES["one window, shifted"], dtype)
    q, k = (torch.full_like(t, 8.0) for t in (q, k))
    bias = torch.where(bias > 0, 0.0, -100.0)
    want = window_attention(q, k, v, bias, backend="reference", scale=0.5, **options)
    assert err(window_attention(q, k, v, bias, scale=0.5, **options), want) < (
        1e-5 if dtype == torch.float32 else 0.1
    )


def test_gradcheck_and_second_derivative():
    q, k, v = (torch.randn(1, 4, 4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 4, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *t: window_attention(*t, window_size=2, key_window_size=4), (q, k, v, bias)
    )
    (slope,) = torch.autograd.grad(
        window_attention(q, k, v, window_size=2).square().sum(), q, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        slope.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own, on its copies
@pytest.mark.parametrize("name", ["shifted", "overlapping"])
def test_operator_is_registered_completely(name):
    inputs, options = draw(SHAPES[name], torch.float32)
    q, k, v, bias, window, reach, shift, scale = arguments(
        *(t.clone().requires_grad_() for t in inputs), **options
    )
    torch.library.opcheck(eager.OPERATOR, (q, k, v, bias, list(window), list(reach), list(shift), scale))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("case", "shift"), [("hat_window_attn_w8", 0), ("hat_window_attn_mask_w8", 4)])
def test_published_numbers(case, shift, backend, monkeypatch):
    monkeypatch.setattr(dispatch, "PREFERRED", backend)
    case = load_case(case)
    state = rename(case.state_dict(), BLOCK_RULES)
    state = {key.removeprefix("mixer."): value for key, value in state.items()}
    state["bias_table"] = table_from_official(state["bias_table"], 8)
    mixer = WindowAttention(48, 6, 8, shift=shift)
    mixer.load_state_dict(state)
    # The authors' block sees windows of the rolled map; ours rolls itself.
    H, W = case.facts["feature_map"]
    windows = case.input("x").view(-1, H // 8, W // 8, 8, 8, 48)
    x = windows.transpose(2, 3).reshape(-1, H, W, 48).roll((shift, shift), (1, 2))
    out = mixer(x).roll((-shift, -shift), (1, 2)).view(-1, H // 8, 8, W // 8, 8, 48).transpose(2, 3)
    case.check("out", out.reshape(-1, 64, 48)[:, ::4])
    if shift:
        edges = grid.masks((8, 8), (shift, shift), torch.device("cpu"), torch.float32)
        rows, columns = torch.arange(H // 8) == H // 8 - 1, torch.arange(W // 8) == W // 8 - 1
        torch.testing.assert_close(
            edges[rows.long()[:, None], columns.long()].flatten(0, 1), case.outputs["mask"]
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(window_size=3), "H must be a multiple of the window 3, got 8"),
        (dict(window_size=16), "H must be a multiple of the window 16, got 8"),
        (dict(key_window_size=5), "window_size plus an even number, got 5"),
        (dict(shift=4), r"shift must be in \[0, 4\), got 4"),
        (dict(shift=1, key_window_size=6), "exclude each other"),
        (dict(window_size=(4, 4, 4)), "must be an int or"),
        (dict(bias=torch.zeros(3, 16, 9)), r"bias must be .* = \(3, 16, 16\), got \(3, 16, 9\)"),
        (dict(k=torch.zeros(2, 8, 12, 3, 6)), "same head dim, got 5 and 6"),
        (dict(v=torch.zeros(2, 8, 12, 2, 7)), "differ in"),
        (dict(v=torch.zeros(2, 8, 12, 3, 7).half()), "one floating dtype"),
        (dict(v=torch.zeros(2, 8, 12, 3, 0)), "v is empty"),
        (dict(q=torch.zeros(2, 96, 3, 5)), "q must be"),
        (dict(backend="tritn"), "no backend 'tritn' here; have reference, eager"),
    ],
    ids=str,
)
def test_wrong_arguments(change, message, monkeypatch):
    # The plain function: in tests jaxtyping would be first to object.
    call = getattr(window_attention, "__wrapped__", window_attention)
    (q, k, v, bias), options = draw(SHAPES["plain"], torch.float32)
    given = dict(q=q, k=k, v=v, bias=bias) | options | change
    with pytest.raises(ValueError, match=message):
        call(**given)


def test_dispatch_tells_why():
    inputs, options = draw(SHAPES["plain"], torch.float32)
    said = why("window_attention", *inputs, **options)
    assert said["eager"] == "chosen"
    assert said["reference"] == "can run"
    with pytest.raises(ValueError, match="no operator 'windowattention'"):
        why("windowattention")


def test_dispatch_takes_the_last_that_can_run():
    class Able:
        unsupported = staticmethod(lambda *args: None)

    class Unable:
        unsupported = staticmethod(lambda *args: "needs a GPU")

    table = {"reference": Able, "eager": Able, "triton": Unable}
    assert pick("op", table, "auto", ()) is table["eager"]
    with pytest.raises(ValueError, match="backend 'triton' cannot run this call: needs a GPU"):
        pick("op", table, "triton", ())
    with pytest.raises(ValueError, match="no backend can run"):
        pick("op", {"reference": Able, "triton": Unable}, "auto", ())
