"""Every operator, every backend, every dtype against the float64 definition; then what PyTorch asks of an operator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import OPERATORS
from samples import Operator, Sample
from torch._inductor import config as inductor
from torch.utils.checkpoint import checkpoint

from visionhybrid.kernels import compiler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = [
    pytest.param(op, backend, id=f"{op}-{backend}")
    for op in OPERATORS
    for backend in OPERATORS[op].module.BACKENDS
    if backend != "reference"
]
# Eager computes in float32 and rounds once, so in half precision its error is the rounding of the result.
LIMITS = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float64: 1e-11}


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _cases():
    """All samples on all backends in all dtypes; of the slow interpreter's, half precision on the second sample alone."""
    for op, operator in OPERATORS.items():
        for backend in operator.module.BACKENDS:
            for i, name in enumerate(operator.samples):
                for dtype in DTYPES:
                    interpreted = backend == "triton" and DEVICE == "cpu"
                    if backend != "reference" and (not interpreted or dtype == torch.float32 or i == 1):
                        yield pytest.param(
                            op, name, backend, dtype, id=f"{op}-{name}-{backend}-{str(dtype)[6:]}"
                        )


def run(operator: Operator, sample: Sample, dtype, backend, cotangents=None, device="cpu"):
    """Outputs, gradients by input name, and the cotangents (drawn here unless given)."""
    inputs = sample.cast(dtype, device)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in sample.options.items()}
    outs = operator.call(inputs, backend=backend, **options)
    outs = outs if isinstance(outs, tuple) else (outs,)
    differentiable = [out for out in outs if out.requires_grad]
    if cotangents is None:
        cotangents = [torch.randn_like(out) for out in differentiable]
    grads = torch.autograd.grad(
        differentiable,
        list(inputs.values()),
        [c.to(device, out.dtype) for c, out in zip(cotangents, differentiable, strict=True)],
    )
    for (name, x), grad in zip(inputs.items(), grads, strict=True):
        assert grad.dtype == x.dtype, f"gradient of {name}: {grad.dtype}, input {x.dtype}"
    return outs, dict(zip(inputs, grads, strict=True)), cotangents


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 error; absolute where the truth is zero."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    norm = want.norm().item()
    return ((got - want).norm() / (norm or 1.0)).item()


@pytest.mark.parametrize(("op", "name", "backend", "dtype"), list(_cases()))
def test_equals_the_definition(op, name, backend, dtype):
    check(OPERATORS[op], OPERATORS[op].samples[name](), backend, dtype)


def check(operator: Operator, sample: Sample, backend: str, dtype: torch.dtype) -> None:
    device = DEVICE if backend == "triton" else "cpu"
    if reason := operator.why_not(sample.cast(dtype, device), backend, **sample.options):
        pytest.skip(reason)
    # The definition sees the rounded inputs and cotangents: what is measured is the computation.
    rounded = Sample(
        inputs={k: x.detach().double() for k, x in sample.cast(dtype).items()}, options=sample.options
    )
    outs, grads, cotangents = run(operator, sample, dtype, backend, device=device)
    truth, true_grads, _ = run(operator, rounded, torch.float64, "reference", cotangents)
    limit = LIMITS[dtype]
    for i, (out, want) in enumerate(zip(outs, truth, strict=True)):
        assert error(out, want) <= limit, f"output {i}: {error(out, want):.1e}"
    for key, grad in grads.items():
        assert error(grad, true_grads[key]) <= 3 * limit, (
            f"gradient of {key}: {error(grad, true_grads[key]):.1e}"
        )


@pytest.mark.parametrize("op", OPERATORS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_drawn_shapes(op, data):
    check(OPERATORS[op], data.draw(OPERATORS[op].drawn)(), "eager", torch.float32)


@pytest.mark.parametrize(("op", "backend"), FAST)
def test_gradcheck(op, backend):
    operator, sample = OPERATORS[op], OPERATORS[op].small()
    if reason := operator.why_not(sample.cast(torch.float64), backend, **sample.options):
        pytest.skip(reason)
    inputs = sample.cast(torch.float64)

    def call(*tensors):
        return operator.call(dict(zip(inputs, tensors, strict=True)), backend=backend, **sample.options)

    assert torch.autograd.gradcheck(call, tuple(inputs.values()), fast_mode=False)


@pytest.mark.parametrize(("op", "backend"), FAST)
def test_strided_inputs_and_expanded_cotangents(op, backend):
    operator = OPERATORS[op]
    sample = operator.small()
    inputs = sample.cast(torch.float32, DEVICE if backend == "triton" else "cpu")
    if reason := operator.why_not(inputs, backend, **sample.options):
        pytest.skip(reason)
    strided = {name: torch.stack([x, x.detach()], -1)[..., 0] for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    results = []
    for leaves in (inputs, strided):
        outs = operator.call(leaves, backend=backend, **sample.options)
        outs = [out for out in (outs if isinstance(outs, tuple) else (outs,)) if out.requires_grad]
        cotangents = [torch.full((), 0.7, device=out.device).to(out.dtype).expand_as(out) for out in outs]
        results.append([*outs, *torch.autograd.grad(outs, list(inputs.values()), cotangents)])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own, on its copies
@pytest.mark.parametrize("op", OPERATORS)
def test_opcheck(op):
    for function, args in OPERATORS[op].ops():
        torch.library.opcheck(function, args)


def first(op):
    """The operator as a function of its inputs, an inputs-to-outputs module, and fresh inputs."""
    operator = OPERATORS[op]
    sample = operator.small()

    class Call(torch.nn.Module):
        def forward(self, **inputs):
            return operator.call(inputs, backend="eager", **sample.options)

    return Call(), sample


@pytest.mark.parametrize("op", OPERATORS)
def test_compiles_without_a_break(op):
    call, sample = first(op)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (call, compiled):
        inputs = sample.cast(torch.float32)
        outs = function(**inputs)
        loss = sum((out * out).sum() for out in (outs if isinstance(outs, tuple) else (outs,)))
        results.append(torch.autograd.grad(loss, list(inputs.values())))
    for compiled_grad, grad in zip(*reversed(results), strict=True):
        torch.testing.assert_close(compiled_grad, grad)


@pytest.mark.skipif(compiler.missing() is not None, reason=str(compiler.missing()))
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # inductor's own
def test_inductor_generates_code_around_every_operator():
    """All in one graph, forward and backward: what stands between operators becomes C++, what they are stays a call."""
    calls = {op: first(op) for op in OPERATORS}
    inputs = {op: sample.cast(torch.float32) for op, (_, sample) in calls.items()}
    leaves = [x for given in inputs.values() for x in given.values()]

    def every(inputs):
        outs = [call(**inputs[op]) for op, (call, _) in calls.items()]
        outs = [out for some in outs for out in (some if isinstance(some, tuple) else (some,))]
        return [out for out in outs if out.requires_grad]

    cotangents = [torch.randn_like(out) for out in every(inputs)]
    with inductor.patch(compile_threads=1):
        results = []
        for function in (every, torch.compile(every, fullgraph=True, backend="inductor")):
            outs = function(inputs)
            results.append((*outs, *torch.autograd.grad(outs, leaves, cotangents)))
    for compiled, plain in zip(*reversed(results), strict=True):
        torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("op", OPERATORS)
def test_exports(op):
    call, sample = first(op)
    inputs = {name: x.detach() for name, x in sample.cast(torch.float32).items()}
    program = torch.export.export(call, (), inputs)
    torch.testing.assert_close(program.module()(**inputs), call(**inputs))


@pytest.mark.parametrize("op", OPERATORS)
def test_autocast_gives_its_dtype_and_keeps_the_sums(op):
    """As if the inputs had been cast by hand: autocast must not reach the arithmetic inside."""
    call, sample = first(op)
    inputs = sample.cast(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = call(**inputs)
        gradients = torch.autograd.grad(_total(got), list(inputs.values()))
    by_hand = sample.cast(torch.bfloat16 if OPERATORS[op].autocasts else torch.float32)
    want = call(**by_hand)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for grad, x, y in zip(gradients, inputs.values(), by_hand.values(), strict=True):
        assert grad.dtype == x.dtype
        expected = torch.autograd.grad(_total(call(**by_hand)), y)[0]
        torch.testing.assert_close(grad, expected.to(grad.dtype), rtol=0, atol=0)


def _total(outs):
    return sum((out.float() ** 2).sum() for out in (outs if isinstance(outs, tuple) else (outs,)))


@pytest.mark.parametrize("op", OPERATORS)
def test_checkpointing_changes_nothing(op):
    call, sample = first(op)
    inputs = sample.cast(torch.float32)
    plain = torch.autograd.grad(_total(call(**inputs)), list(inputs.values()))
    saved = torch.autograd.grad(
        _total(checkpoint(call, use_reentrant=False, **inputs)), list(inputs.values())
    )
    for a, b in zip(plain, saved, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(("op", "backend"), FAST)
def test_second_derivatives_say_so(op, backend):
    operator = OPERATORS[op]
    sample = operator.small()
    inputs = sample.cast(torch.float32, DEVICE if backend == "triton" else "cpu")
    if reason := operator.why_not(inputs, backend, **sample.options):
        pytest.skip(reason)
    loss = _total(operator.call(inputs, backend=backend, **sample.options))
    (grad, *_) = torch.autograd.grad(loss, list(inputs.values()), create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{op}: second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("op", OPERATORS)
def test_an_unknown_backend_lists_the_known(op):
    operator = OPERATORS[op]
    with pytest.raises(ValueError, match=rf"{op}: no backend 'tritn' here; have reference, eager"):
        operator.call(operator.small().cast(torch.float32), backend="tritn", **operator.small().options)
