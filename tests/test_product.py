"""`F.linear` by oneDNN: its values, gradients of both orders, and where it steps aside."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from visionhybrid.kernels import product
from visionhybrid.kernels.product import linear
from visionhybrid.mixers.projection import Projection


@pytest.fixture
def used(monkeypatch):
    """Counts the calls of oneDNN's operator; where PyTorch's own product is the faster one, it is taken all the same."""
    if not product.HAS_ONEDNN:
        pytest.skip("this PyTorch has no oneDNN")
    calls = []
    whole = product._product
    monkeypatch.setattr(product, "_FASTER", True)
    monkeypatch.setattr(product, "_product", lambda *args: calls.append(1) or whole(*args))
    return calls


def operands(*shape, outs, bias=True, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(*shape, requires_grad=True)
    weight = torch.randn(outs, shape[-1], requires_grad=True)
    return x, weight, torch.randn(outs, requires_grad=True) if bias else None


def gradients(function, tensors, cotangent):
    """The result, its gradients, and gradients of a sum of squares of these."""
    known = [t for t in tensors if t is not None]
    out = function(*tensors)
    first = torch.autograd.grad(out, known, cotangent, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first[:2]), known[:2])
    return [out, *first, *second]


@pytest.mark.parametrize(
    ("shape", "outs", "bias"),
    [((7, 5), 3, True), ((2, 13, 24), 17, False), ((2, 3, 1, 8), 40, True), ((1, 1, 1), 1, True)],
)
def test_values_and_gradients_of_both_orders(used, shape, outs, bias):
    tensors = operands(*shape, outs=outs, bias=bias)
    cotangent = torch.randn(*shape[:-1], outs)
    wanted = gradients(
        F.linear,
        [t if t is None else t.detach().double().requires_grad_() for t in tensors],
        cotangent.double(),
    )
    for got, exact in zip(gradients(linear, tensors, cotangent), wanted, strict=True):
        assert got.shape == exact.shape
        assert got.dtype == torch.float32
        assert (got - exact).norm() <= 1e-5 * exact.norm()
    assert len(used) >= 3


def test_strided_operands_and_sums_in_place(used):
    x, weight, bias = operands(6, 4, 10, outs=5)
    mixed = x.transpose(0, 1)
    out = linear(mixed, weight, bias)
    out.add_(1)  # as LinFusion does with the output of its networks
    (got,) = torch.autograd.grad(out.square().sum(), weight)
    (wanted,) = torch.autograd.grad((F.linear(mixed, weight, bias) + 1).square().sum(), weight)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)
    assert used


def test_a_backward_pass_under_autocast_keeps_the_type(used):
    x, weight, _ = operands(6, 4, outs=5, bias=False)
    out = linear(x, weight, None)
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = torch.autograd.grad(out, weight, torch.ones_like(out))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, x.sum(0).expand(5, 4))
    assert len(used) == 3


def test_only_wanted_gradients_are_computed(used):
    x, weight, _ = operands(6, 4, outs=5, bias=False)
    linear(x.detach(), weight, None).sum().backward()
    assert len(used) == 2
    used.clear()
    linear(x, weight.detach(), None).sum().backward()
    assert len(used) == 2


# PyTorch's forward mode scripts its rules when it is first used
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_where_it_steps_aside(used, monkeypatch):
    layer, x = Projection(6, 5), torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    for other in (x[0], x[:0]):
        assert torch.equal(layer(other), F.linear(other, layer.weight, layer.bias))
    layer.double()(x.double())
    layer.to(torch.bfloat16)(x.bfloat16())
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x)
    layer.float()
    mapped = torch.func.vmap(layer)(x)
    torch.testing.assert_close(mapped, F.linear(x, layer.weight, layer.bias))
    _, tangent = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(tangent, F.linear(x, layer.weight))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        assert torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent is not None
    with monkeypatch.context() as patch:
        patch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
        layer(x)
    assert layer.to("meta")(x.to("meta")).shape == (3, 5)
    assert not used


def test_exported_it_is_pytorchs_own():
    program = torch.export.export(Projection(6, 5), (torch.randn(3, 6),))
    assert not any(
        "mkldnn" in str(node.target) or "_Linear" in str(node.target) for node in program.graph.nodes
    )


def test_operations_are_counted_as_those_of_linear(used):
    def count(function):
        tensors = operands(2, 7, 6, outs=5)
        with FlopCounterMode(display=False) as counter:
            function(*tensors).sum().backward()
        return counter.get_total_flops()

    assert count(linear) == count(F.linear) == 3 * 2 * 14 * 6 * 5
    assert used


def test_a_projection_is_a_linear_layer(used):
    ours, theirs = Projection(6, 5), nn.Linear(6, 5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    assert used
