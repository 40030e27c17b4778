"""The selective scan: the published implementations' numbers, directions, extremes, errors, memory."""

import functools
import platform

import pytest
import torch
from golden import list_cases, load_case

from visionhybrid.kernels import compiler, dispatch, why
from visionhybrid.kernels.selective_scan import arguments, eager, selective_scan

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(compiler.missing() is not None, reason=str(compiler.missing()))
)
BACKENDS = ("reference", "eager", NATIVE)
CASES = [name for name in list_cases() if name.startswith(("scan_", "scanstate_"))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_extensions(name, backend):
    case = load_case(name)
    inputs = {key: case.input(key).requires_grad_() for key in case.facts["inputs"] if key != "g"}
    out = selective_scan(
        inputs["u"],
        inputs["delta"],
        -inputs["A_log"].exp(),
        inputs["B"],
        inputs.get("C"),
        inputs.get("Dskip"),
        delta_bias=inputs.get("delta_bias"),
        delta_softplus=case.facts["kwargs"]["delta_softplus"],
        backend=backend,
    )
    out.backward(case.input("g").to(out.dtype))
    results = {"y" if "C" in inputs else "states": out} | {f"d{key}": x.grad for key, x in inputs.items()}
    for key, got in results.items():
        # Long cases store every third token.
        thinned = got.ndim > 2 and got.shape[-1] != case.outputs[key].shape[-1]
        case.check(key, got[..., ::3] if thinned else got)


def problem(batch=2, channels=6, length=37, N=2, groups=2, dtype=torch.float64):
    def draw(*shape):
        return torch.randn(*shape, dtype=dtype)

    return dict(
        u=draw(batch, channels, length),
        delta=draw(batch, channels, length),
        A=-draw(channels, N).exp(),
        B=draw(batch, groups, N, length),
        C=draw(batch, groups, N, length),
        D=draw(channels),
        delta_bias=draw(channels),
        delta_softplus=True,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_direction_for_each_group(backend):
    """Reversed is flipped, scanned, flipped; and groups do not touch."""
    given = problem(dtype=torch.float32)

    def flipped(x):
        return x.flip(-1) if isinstance(x, torch.Tensor) and x.ndim > 2 else x

    forward = selective_scan(**given, backend=backend)
    backward = selective_scan(**{k: flipped(x) for k, x in given.items()}, backend=backend).flip(-1)
    mixed = selective_scan(**given, reverse=(False, True), backend=backend)
    torch.testing.assert_close(mixed[:, :3], forward[:, :3])
    torch.testing.assert_close(mixed[:, 3:], backward[:, 3:])


@pytest.mark.parametrize("name", [name for name in list_cases() if name.startswith("segman_ss2d_")])
def test_four_scans_of_a_map_in_one_call(name):
    """SegMAN's cross-scan: rows, columns, and both from the end. Values and every gradient."""
    case = load_case(name)
    weights = {key: value.requires_grad_() for key, value in case.state_dict().items()}
    x = case.input("x").requires_grad_()
    rank = weights["dt_projs_weight"].shape[2]
    walks = torch.stack([x.flatten(2), x.mT.flatten(2)] * 2, 1)  # (B, 4, C, L)
    parts = torch.einsum("bgcl,gdc->bgdl", walks, weights["x_proj_weight"].view(4, rank + 2, -1))
    delta, B, C = parts.split([rank, 1, 1], 2)
    y = selective_scan(
        walks.flatten(1, 2),
        torch.einsum("bgrl,gcr->bgcl", delta, weights["dt_projs_weight"]).flatten(1, 2),
        -weights["A_logs"].exp(),
        B,
        C,
        weights["Ds"],
        delta_bias=weights["dt_projs_bias"].flatten(),
        delta_softplus=True,
        reverse=[False, False, True, True],
    ).view_as(walks)
    rows, columns = y[:, 0] + y[:, 2], y[:, 1] + y[:, 3]
    y = rows + columns.unflatten(2, x.mT.shape[2:]).mT.flatten(2)
    case.check("y", y)
    y.backward(case.input("g"))
    case.check("dx", x.grad)
    for key, value in weights.items():
        case.check(f"d:{key}", value.grad)


def test_one_group_may_be_left_out_of_the_shape():
    given = problem(groups=1)
    short = given | dict(B=given["B"][:, 0], C=given["C"][:, 0])
    torch.testing.assert_close(selective_scan(**given), selective_scan(**short))


@pytest.mark.parametrize("chunk", [1, 100, 10**9])
def test_chunks_do_not_show(chunk, monkeypatch):
    given = problem(batch=3)
    leaves = [x.requires_grad_() for x in given.values() if isinstance(x, torch.Tensor)]
    cotangent = torch.randn(3, 6, 37, dtype=torch.float64)
    want = selective_scan(**given, reverse=(True, False), backend="reference")
    want = [want, *torch.autograd.grad(want, leaves, cotangent)]
    monkeypatch.setattr(eager, "CHUNK", chunk)
    got = selective_scan(**given, reverse=(True, False))
    got = [got, *torch.autograd.grad(got, leaves, cotangent)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("length", [15, 16, 17, 512, 1100])
@pytest.mark.parametrize("backend", ["eager", NATIVE])
def test_blocks_do_not_show(backend, length):
    """Lengths about those of a vector and of the blocks, in both directions, with and without an output."""
    given = problem(length=length, dtype=torch.float32) | dict(reverse=(False, True))
    for call in (given, given | dict(C=None, D=None)):
        leaves = [x.requires_grad_() for x in call.values() if isinstance(x, torch.Tensor)]
        results = []
        for name in (backend, "reference"):
            torch.manual_seed(1)
            out = selective_scan(**call, backend=name)
            cotangent = torch.randn(out.shape).to(out.dtype)
            results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
        for got, want in zip(*results, strict=True):
            assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("backend", ["eager", NATIVE])
def test_half_precision_keeps_large_states(backend):
    """Slow decay over 4000 tokens: states near 4000 and increments near 1 that a half-precision state would lose."""
    u = torch.ones(1, 1, 4000)
    given = dict(delta=torch.ones(1, 1, 4000), A=torch.full((1, 1), -1e-5), B=torch.ones(1, 1, 1, 4000))
    half = {k: x if k == "A" else x.bfloat16() for k, x in given.items()}
    states = selective_scan(u.bfloat16(), **half, backend=backend)
    assert states.dtype == torch.float32
    torch.testing.assert_close(
        states.double(), selective_scan(u, **given, backend="reference"), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("backend", ["eager", NATIVE])
def test_extreme_steps(backend):
    """softplus far below zero is 0 and passes the state on; far above it forgets; nothing overflows."""
    given = problem(dtype=torch.float32)
    given["delta"] = 100 * given["delta"]
    leaves = [x.requires_grad_() for x in given.values() if isinstance(x, torch.Tensor)]
    got, want = (selective_scan(**given, backend=name) for name in (backend, "reference"))
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    for grad in torch.autograd.grad(got, leaves, torch.randn_like(got)):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("backend", ["eager", NATIVE])
def test_what_fills_the_last_block_is_no_token(backend):
    """A step of 0 there, whatever the bias: here it would be -300, and its decay infinite."""
    given = problem(dtype=torch.float32) | dict(delta_softplus=False)
    given["delta"], given["delta_bias"] = 0.1 * given["delta"] + 300, torch.full((6,), -300.0)
    leaves = [x.requires_grad_() for x in given.values() if isinstance(x, torch.Tensor)]
    out = selective_scan(**given, backend=backend)
    for grad in torch.autograd.grad(out, leaves, torch.randn_like(out)):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("backend", ["eager", NATIVE])
def test_not_a_number_stays_one(backend):
    """From its token on, in its channel alone."""
    given = problem(dtype=torch.float32)
    given["delta"][0, 1, 20] = torch.nan
    lost = selective_scan(**given, backend=backend).isnan()
    assert lost[0, 1, 20:].all()
    assert lost.sum() == 17


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_none(backend):
    given = problem(batch=0, dtype=torch.float32)
    assert selective_scan(**given, backend=backend).shape == (0, 6, 37)


def test_compiled_code_is_asked_for(monkeypatch):
    """By name, or for "auto" by the environment; without a compiler the reason names what is missing."""
    given = problem(dtype=torch.float32)
    monkeypatch.setattr(compiler, "COMPILER", ["c++"])
    assert why("selective_scan", **given)["eager"] == "chosen"
    monkeypatch.setattr(dispatch, "NATIVE", True)
    assert why("selective_scan", **given)["native"] == "chosen"
    assert "float64" in why("selective_scan", **problem())["native"]
    monkeypatch.setattr(compiler, "COMPILER", None)
    assert why("selective_scan", **given)["eager"] == "chosen"
    with pytest.raises(
        ValueError, match=r"backend 'native' cannot run this call: needs a C\+\+ compiler: none of"
    ):
        selective_scan(**given, backend="native")


@pytest.mark.skipif(compiler.missing() is not None, reason=str(compiler.missing()))
def test_it_is_compiled_once_and_a_failure_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "op" / "native.cpp"
    source.parent.mkdir()
    source.write_text('extern "C" int answer() { return 42; }')
    assert compiler.library(source).answer() == 42
    compiler.library.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(compiler, "FLAGS", [*compiler.FLAGS, "-DOTHER"])
        assert compiler.library(source).answer() == 42
    compiler.library.cache_clear()
    assert len(list((tmp_path / "visionhybrid").iterdir())) == 2
    assert compiler.library(source).answer() == 42
    assert len(list((tmp_path / "visionhybrid").iterdir())) == 2
    source.write_text("no C++")
    compiler.library.cache_clear()
    with pytest.raises(RuntimeError, match=r"op: cannot compile .*native.cpp, use backend='eager'.* error: "):
        compiler.library(source)


@pytest.mark.skipif(
    compiler.missing() is not None or platform.machine() != "x86_64", reason="needs a compiler for x86"
)
@pytest.mark.parametrize("without", ["-mno-avx512f", "-mno-avx"])
def test_narrower_vectors(without, monkeypatch):
    """Compiled as for a CPU without the widest: values and gradients of small and of extreme steps, and what is no number."""
    monkeypatch.setattr(compiler, "FLAGS", [*compiler.FLAGS, without])
    monkeypatch.setattr(compiler, "library", functools.cache(compiler.library.__wrapped__))
    for size in (1, 100):
        given = problem(length=100, dtype=torch.float32) | dict(reverse=(False, True))
        given["delta"] *= size
        leaves = [x.requires_grad_() for x in given.values() if isinstance(x, torch.Tensor)]
        results = []
        for backend in ("native", "reference"):
            out = selective_scan(**given, backend=backend)
            results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
        for got, want in zip(*results, strict=True):
            assert (got - want).norm() <= 1e-5 * want.norm()
    with torch.no_grad():
        given["delta"][0, 1, 20] = torch.nan
        assert selective_scan(**given, backend="native").isnan().sum() == 80


def test_the_reference_has_second_derivatives():
    given = problem(batch=1, channels=2, length=3, N=1, groups=1)
    leaves = {k: x.requires_grad_() for k, x in given.items() if isinstance(x, torch.Tensor)}
    assert torch.autograd.gradgradcheck(
        lambda *x: selective_scan(
            **dict(zip(leaves, x, strict=True)), delta_softplus=True, backend="reference"
        ),
        tuple(leaves.values()),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(u=torch.randn(6, 37)), r"u must be \(batch, channels, length\).*got torch.float32 \(6, 37\)"),
        (dict(u=torch.randn(2, 6, 0)), r"u must be .*not empty, got torch.float32 \(2, 6, 0\)"),
        (dict(delta=torch.randn(2, 6, 36)), r"delta must be \(2, 6, 37\).*got \(2, 6, 36\)"),
        (dict(A=torch.randn(5, 2)), r"A must be \(6, N\).*got \(5, 2\)"),
        (dict(B=torch.randn(2, 4, 2, 37)), r"B must be .*groups dividing 6, got \(2, 4, 2, 37\)"),
        (dict(C=torch.randn(2, 2, 3, 37)), r"C must be \(2, 2, 2, 37\).*got \(2, 2, 3, 37\)"),
        (dict(C=None), "D adds to the output; without C"),
        (dict(D=torch.randn(5)), r"D must be \(6,\).*got \(5,\)"),
        (dict(delta=torch.randn(2, 6, 37).half()), "delta must be torch.float32 beside u of torch.float32"),
        (dict(reverse=(True,) * 3), r"reverse needs one value a group \(2\), got 3"),
    ],
)
def test_bad_input_names_it(change, message):
    with pytest.raises(ValueError, match=f"selective_scan: {message}"):
        arguments(**problem(dtype=torch.float32) | change)
