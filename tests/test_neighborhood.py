"""Neighbourhood attention against NATTEN's published numbers and against its own definition."""

import pytest
import torch
from golden import list_cases, load_case
from hypothesis import given, settings
from hypothesis import strategies as st

from visionhybrid.kernels.neighborhood_attention import (
    neighborhood_aggregate,
    neighborhood_attention,
    neighborhood_scores,
)

BACKENDS = ("reference", "eager", "triton")
UNFUSED = [name for name in list_cases() if name.startswith("na2d_")]
FUSED = [name for name in list_cases() if name.startswith("na2dfused_")]
GENERAL = [name for name in list_cases() if name.startswith("gna_") and name != "gna_masks_a"]


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_()


def close(got: torch.Tensor, want: torch.Tensor, rel: float) -> None:
    error = ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()
    assert error <= rel, f"relative error {error:.2e} above {rel:.0e}"


@pytest.mark.parametrize(
    ("name", "backend"),
    # 42 groups of a dilation are slow in Triton's interpreter; other cases have dilations too.
    [(name, b) for b in BACKENDS for name in UNFUSED if b != "triton" or "d6x7" not in name],
)
def test_halves_equal_natten(name, backend):
    case = load_case(name)
    options = dict(
        kernel_size=case.facts["kwargs"]["kernel_size"],
        dilation=case.facts["kwargs"]["dilation"],
        backend=backend,
    )
    q, k, v = (leaf(case.input(n)) for n in "qkv")
    rpb = leaf(case.input("rpb")) if case.facts["kwargs"]["rpb"] else None
    attn = neighborhood_scores(q, k, rpb=rpb, **options)
    case.check("attn", attn)
    attn.backward(case.input("g_attn").to(attn.dtype))
    case.check("dq", q.grad)
    case.check("dk", k.grad)
    if rpb is not None:
        case.check("drpb", rpb.grad)
    prob = leaf(case.input("logits").softmax(-1))
    out = neighborhood_aggregate(prob, v, **options)
    case.check("out", out)
    out.backward(case.input("g_out").to(out.dtype))
    case.check("dprob", prob.grad)
    case.check("dv", v.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUSED)
def test_fused_equals_natten(name, backend):
    case = load_case(name)
    options = {key: case.facts["kwargs"][key] for key in ("kernel_size", "stride", "dilation")}
    q, k, v = (leaf(case.input(n).movedim(3, 1)) for n in "qkv")
    causal = case.facts["kwargs"]["is_causal"]
    out, lse = neighborhood_attention(q, k, v, causal=causal, return_lse=True, backend=backend, **options)
    case.check("out", out.movedim(1, 3))
    case.check("lse", lse.movedim(1, 3))
    out.backward(case.input("g").movedim(3, 1).to(out.dtype))
    for name, x in dict(dq=q, dk=k, dv=v).items():
        case.check(name, x.grad.movedim(1, 3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GENERAL)
def test_generalised_equals_natten(name, backend):
    case = load_case(name)
    options = {key: case.facts["kwargs"][key] for key in ("kernel_size", "stride", "dilation")}
    q, k, v = (case.input(n).movedim(-2, 1) for n in "qkv")
    out = neighborhood_attention(
        q, k, v, causal=case.facts["kwargs"]["is_causal"], backend=backend, **options
    )
    case.check("out", out.movedim(1, -2).reshape(case.outputs["out"].shape))


@pytest.mark.parametrize("index", range(5))
def test_masks_equal_natten(index):
    case = load_case("gna_masks_a")
    config = case.facts["kwargs"]["configs"][index]
    shape = config["shape"]
    q, k, v = case.input("qkv")[index][:, :, : torch.Size(shape).numel()].unsqueeze(1)
    maps = [x.unflatten(2, shape) for x in (q, k, v)]
    options = {key: config[key] for key in ("kernel_size", "stride", "dilation")}
    out = neighborhood_attention(*maps, causal=config["is_causal"], **options)
    case.check(f"out{index}", out.flatten(2, -2)[0])


@settings(max_examples=25, deadline=None)
@given(data=st.data(), dims=st.integers(1, 3), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_eager_equals_definition(data, dims, dtype):
    """Any shape, window, dilation, stride: output and all gradients, strided inputs, with and without bias."""
    torch.manual_seed(0)
    top = {1: 40, 2: 13, 3: 6}[dims]
    spatial = [data.draw(st.integers(1, top)) for _ in range(dims)]
    kernel = [data.draw(st.integers(1, 7)) for _ in range(dims)]
    options = dict(
        kernel_size=kernel,
        dilation=[data.draw(st.integers(1, 4)) for _ in range(dims)],
        stride=[data.draw(st.integers(1, k)) for k in kernel],
        causal=[data.draw(st.booleans()) for _ in range(dims)],
    )
    width, value_width = data.draw(st.sampled_from([1, 5, 8])), data.draw(st.sampled_from([3, 8]))
    q, k = (torch.randn(2, *spatial, 2, width).movedim(-2, 1).to(dtype) for _ in range(2))
    v = torch.randn(2, *spatial, 2, value_width).movedim(-2, 1).to(dtype)
    rpb = torch.randn(2, *[2 * size - 1 for size in kernel]) if data.draw(st.booleans()) else None
    cotangent = torch.randn(2, 2, *spatial, value_width)
    beside = data.draw(st.integers(0, 3))
    extra = [torch.randn(2, beside, 2, d).transpose(1, 2).to(dtype) for d in (width, value_width)]
    grads = {}
    for backend, wide in (("reference", torch.float64), ("eager", dtype)):
        leaves = [leaf(x.to(wide)) for x in (q, k, v, *(extra if beside else ()))]
        named = dict(extra=tuple(leaves[3:]) or None)
        if rpb is not None:
            leaves.append(leaf(rpb))
            named["rpb"] = leaves[-1]
        out = neighborhood_attention(*leaves[:3], backend=backend, **named, **options)
        grads[backend] = [out, *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]
    for got, want in zip(grads["eager"], grads["reference"], strict=True):
        # A gradient that vanishes (one key per query) is compared on the scale of the cotangent.
        error = (got.double() - want.double()).norm() / want.double().norm().clamp(
            min=cotangent.norm() * 1e-2
        )
        assert error <= (2e-5 if dtype == torch.float32 else 2e-2)


def test_gradients_by_finite_differences():
    q, k, v = (torch.randn(1, 2, 5, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    rpb = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    options = dict(kernel_size=3, dilation=(1, 2))
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: neighborhood_attention(q, k, v, rpb=b, **options), (q, k, v, rpb)
    )
    assert torch.autograd.gradcheck(
        lambda q, k, b: neighborhood_scores(q, k, rpb=b, kernel_size=3, scale=0.7), (q, k, rpb)
    )
    extra = [torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(
        lambda q, k, v, *x: neighborhood_attention(q, k, v, extra=x, **options), (q, k, v, *extra)
    )
    weights = torch.rand(1, 2, 5, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, v: neighborhood_aggregate(w, v, **options), (weights, v))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operators_are_registered_whole():
    q, k, v = (torch.randn(1, 2, 5, 6, 4, requires_grad=True) for _ in range(3))
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    weights = torch.rand(1, 2, 5, 6, 9, requires_grad=True)
    ops = torch.ops.visionhybrid
    extra = [torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(2)]
    for bias, pair, steps in ((rpb, extra, [1, 1]), (None, [None, None], [2, 1])):
        args = (q, k, v, bias, *pair, [3, 3], [1, 2], steps, [0, 1], 0.5)
        torch.library.opcheck(ops.neighborhood_attention, args)
    torch.library.opcheck(ops.neighborhood_scores, (q, k, rpb, [3, 3], [1, 1], 0.5))
    torch.library.opcheck(ops.neighborhood_aggregate, (weights, v, [3, 3], [1, 1]))


def test_small_chunks_change_nothing(monkeypatch):
    from visionhybrid.kernels.neighborhood_attention import tiled

    q, k, v = (torch.randn(2, 2, 40, 30, 8) for _ in range(3))
    want = neighborhood_attention(q, k, v, kernel_size=5)
    monkeypatch.setattr(tiled, "BUDGET", 1)
    close(neighborhood_attention(q, k, v, kernel_size=5), want, 1e-6)


def test_one_table_for_all_heads():
    """An expanded table, here a disc, gives what its copies give; its gradient is that of every head."""
    q, k, v, cotangent = (torch.randn(2, 3, 9, 11, 4) for _ in range(4))
    at = torch.arange(-4, 5)
    disc = torch.zeros(9, 9).masked_fill(at[:, None] ** 2 + at**2 >= 9, float("-inf"))
    shared = leaf(disc[None])
    each = leaf(disc.expand(3, 9, 9).clone())
    outs = [neighborhood_attention(q, k, v, kernel_size=5, rpb=x) for x in (shared.expand(3, 9, 9), each)]
    close(outs[0], outs[1], 1e-6)
    grads = [torch.autograd.grad(out, x, cotangent)[0] for out, x in zip(outs, (shared, each), strict=True)]
    close(grads[0], grads[1].sum(0, keepdim=True), 1e-5)


def test_compiles_without_a_break():
    q, k, v = (torch.randn(1, 2, 9, 8, 4, requires_grad=True) for _ in range(3))
    fn = torch.compile(
        lambda q, k, v: neighborhood_attention(q, k, v, kernel_size=3).sin(),
        fullgraph=True,
        backend="aot_eager",
    )
    got = torch.autograd.grad(fn(q, k, v), (q, k, v), torch.ones(1, 2, 9, 8, 4))
    want = torch.autograd.grad(
        neighborhood_attention(q, k, v, kernel_size=3).sin(), (q, k, v), torch.ones(1, 2, 9, 8, 4)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.randn(2, 5, 4)), "1 to 3 spatial axes"),
        (dict(k=torch.randn(1, 2, 5, 6, 3)), r"k must match q"),
        (dict(v=torch.randn(1, 2, 5, 5, 4)), r"v must match q"),
        (dict(k=torch.randn(1, 2, 5, 6, 4).half()), "one dtype"),
        (dict(kernel_size=(3, 3, 3)), "kernel_size needs 2 positive integers"),
        (dict(dilation=0), "dilation needs 2 positive integers"),
        (dict(stride=4), "stride must not exceed kernel_size"),
        (dict(causal=[True]), "causal needs 2 values"),
        (dict(rpb=torch.zeros(2, 3, 3)), "rpb must be"),
        (dict(extra=(torch.zeros(1, 2, 3, 5),) * 2), "extra must be keys"),
        (dict(backend="tritn"), "no backend 'tritn' here; have reference, eager"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = (
        dict(zip("qkv", (torch.randn(1, 2, 5, 6, 4) for _ in range(3)), strict=True), kernel_size=3) | change
    )
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**arguments)


def test_autocast_rounds_inputs_and_nothing_else():
    q, k, v = (torch.randn(1, 2, 14, 14, 16) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        got = neighborhood_attention(q, k, v, kernel_size=5)
    rounded = [x.bfloat16() for x in (q, k, v)]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, neighborhood_attention(*rounded, kernel_size=5))


def test_second_derivative_is_refused():
    q, k, v = (torch.randn(1, 1, 5, 5, 4, requires_grad=True) for _ in range(3))
    (grad,) = torch.autograd.grad(neighborhood_attention(q, k, v, kernel_size=3).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="neighborhood_attention: second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("spatial", "options"),
    [
        ((6, 7), dict(kernel_size=(3, 3), dilation=(1, 2))),
        ((6, 5), dict(kernel_size=(4, 2), stride=(3, 2), causal=(False, True))),
        ((40,), dict(kernel_size=5)),
    ],
    ids=str,
)
def test_triton_walks_over_small_tiles(spatial, options, monkeypatch):
    """In the interpreter a tile holds most of a map; tiles of 16 tokens show every edge of a walk."""
    from visionhybrid.kernels.neighborhood_attention.triton import launch

    monkeypatch.setattr(launch, "TOKENS", 16)
    kernel = (
        options["kernel_size"] if isinstance(options["kernel_size"], tuple) else (options["kernel_size"],)
    )
    leaves = [leaf(torch.randn(1, 1, *spatial, d)) for d in (8, 8, 20)]
    leaves.append(leaf(torch.randn(1, *(2 * k - 1 for k in kernel))))
    leaves += [leaf(torch.randn(1, 1, 19, d)) for d in (8, 20)]
    cotangent = torch.randn(1, 1, *spatial, 20)
    results = {}
    for backend in ("reference", "triton"):
        out = neighborhood_attention(
            *leaves[:3], rpb=leaves[3], extra=(leaves[4], leaves[5]), backend=backend, **options
        )
        results[backend] = out, *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))
    for got, want in zip(results["triton"], results["reference"], strict=True):
        close(got, want, 1e-5)
