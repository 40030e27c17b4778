"""Convolutions that do not keep a batch norm's result: the same gradients to the bit, less memory, and when they stand aside."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from visionhybrid.bench.memory import live
from visionhybrid.models.rematerialize import LeanConv2d


def _network(conv: type[nn.Conv2d], *, relu: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    act = [nn.ReLU(inplace=True)] if relu else []
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8),
        *act,
        conv(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        conv(16, 2, 1),
    )


def _images() -> torch.Tensor:
    return torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()


def _kept(model: nn.Module, x: torch.Tensor) -> int:
    """How many of the graph's convolutions keep their input as it is."""
    count, nodes = 0, [model(x).grad_fn]
    while nodes:
        node = nodes.pop()
        if node.name() == "ConvolutionBackward0":
            # A place that has hooks takes no others.
            try:
                node._raw_saved_input.register_hooks(lambda tensor: tensor, lambda tensor: tensor)
                count += 1
            except RuntimeError:
                pass
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return count


def _gradients(model: nn.Module, *, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    x = _images()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = model(x)
    return list(torch.autograd.grad(y.float().square().sum(), [x, *model.parameters()]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [True, False])
def test_gradients_and_running_statistics_are_the_same_to_the_bit(relu, dtype):
    lean, plain = _network(LeanConv2d, relu=relu), _network(nn.Conv2d, relu=relu)
    assert _kept(copy.deepcopy(lean), _images()) == 1
    for ours, theirs in zip(_gradients(lean, dtype=dtype), _gradients(plain, dtype=dtype), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(lean.get_buffer(name), buffer, rtol=0, atol=0)


def test_a_graph_goes_back_twice_and_further():
    lean, plain = _network(LeanConv2d), _network(nn.Conv2d)
    found = []
    for model in (lean, plain):
        x = _images()
        loss = model(x).square().sum()
        (once,) = torch.autograd.grad(loss, x, retain_graph=True)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        torch.testing.assert_close(grad, once, rtol=0, atol=0)
        found.append(torch.autograd.grad(grad.square().sum(), [x, *model.parameters()], allow_unused=True))
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_less_is_kept():
    def network(conv: type[nn.Conv2d]) -> nn.Sequential:
        layers = ([conv(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)] for _ in range(8))
        return nn.Sequential(*(module for layer in layers for module in layer))

    def step(model: nn.Module) -> None:
        model(torch.ones(2, 8, 32, 32)).sum().backward()

    # Of a layer's two maps one is kept; beside them a few live at the turn.
    assert live(lambda: step(network(LeanConv2d))) < 0.7 * live(lambda: step(network(nn.Conv2d)))


def test_it_stands_aside():
    model, x = _network(LeanConv2d), _images()
    assert _kept(model, x) == 1
    assert _kept(copy.deepcopy(model).eval(), x) == 3
    frozen = copy.deepcopy(model)
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    assert _kept(frozen, x) == 3
    with torch.no_grad():
        assert model(x).grad_fn is None


def test_checkpointing_and_offloading_come_first():
    plain = _gradients(_network(nn.Conv2d))
    for reentrant in (True, False):
        model = _network(LeanConv2d)
        x = _images()
        y = checkpoint(model, x, use_reentrant=reentrant)
        y.square().sum().backward()
        for ours, theirs in zip([x.grad, *(p.grad for p in model.parameters())], plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    with save_on_cpu():
        offloaded = _gradients(_network(LeanConv2d))
    for ours, theirs in zip(offloaded, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_parameters_may_be_taken_away_between_the_passes():
    # As FSDP does: the norm's weights may not be there when the convolution after it wants the norm's result.
    model, plain = _network(LeanConv2d), _gradients(_network(nn.Conv2d))
    x, norm = _images(), model[1]
    loss = model(x).square().sum()
    before = [norm.weight.data.clone(), norm.bias.data.clone()]

    def fill(weight: torch.Tensor, bias: torch.Tensor) -> None:
        norm.weight.data.copy_(weight)  # autograd does not count what is done to .data
        norm.bias.data.copy_(bias)

    fill(torch.full((8,), torch.nan), torch.full((8,), torch.nan))
    node = loss.grad_fn
    while node.name() != "ReluBackward0":
        node = node.next_functions[0][0]
    node.register_hook(lambda *_: fill(*before))
    loss.backward()
    torch.testing.assert_close(x.grad, plain[0], rtol=0, atol=0)


def test_compilers_see_plain_convolutions():
    model, plain = _network(LeanConv2d), _gradients(_network(nn.Conv2d))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(_gradients(compiled), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
