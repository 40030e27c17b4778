"""Training with less memory: activations made again in the backward pass instead of being kept from the forward pass.

A batch norm keeps its input for its own gradient, and the convolution after it keeps the norm's result: the same map twice. Here
the convolution (and a ReLU between) keeps nothing and asks for the result again, which costs a pass or two over memory.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn
from torch.autograd.graph import Node

# Autograd's names of a batch norm, PyTorch's own and cuDNN's, and theirs of the number under the root.
_NORMS = {"NativeBatchNormBackward0": "_saved_eps", "CudnnBatchNormBackward0": "_saved_epsilon"}


@register_notrace_function
def rematerialize(y: Tensor, x: Tensor) -> Tensor:
    """Let the convolution that has just made `y` of `x` not keep `x`, if `x` is a batch norm's result or a ReLU of one.

    `x` is then made again from the norm's input by the operators that made it, so gradients are the same to the bit. Anything else
    is left as it is: norms in eval mode or with frozen or missing weights, other layers, a graph that is compiled or traced (compilers
    choose by themselves), and tensors that somebody else takes care of (`torch.utils.checkpoint`, offloading).

    Args:
        y: result of `F.conv2d`, with no operator after it, of any shape.
        x: the very tensor that the convolution was given.

    Returns:
        `y`.
    """
    if not torch.jit.is_scripting():
        _rematerialize(y, x)
    return y


def _rematerialize(y: Tensor, x: Tensor) -> None:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or y.grad_fn is None or x.grad_fn is None:
        return
    relu = x.grad_fn if x.grad_fn.name() == "ReluBackward0" else None
    norm = x.grad_fn if relu is None else relu.next_functions[0][0]
    if y.grad_fn.name() == "ConvolutionBackward0" and _trains(norm):
        again = _Again(norm, relu=relu is not None)
        # A saved tensor takes hooks once: an error says that somebody else has come first.
        with contextlib.suppress(RuntimeError):
            y.grad_fn._raw_saved_input.register_hooks(_dtype, again)
            if relu is not None:
                relu._raw_saved_result.register_hooks(_dtype, again)


def _trains(node: Node | None) -> bool:
    """Whether `node` is that of a batch norm in training mode with trained weights."""
    return (
        node is not None
        and node.name() in _NORMS
        and node._saved_training
        and all(hasattr(parameter, "variable") for parameter, _ in node.next_functions[1:3])
    )


def _dtype(tensor: Tensor) -> torch.dtype:
    """What the graph keeps of a tensor: under autocast it may have been cast for its user alone."""
    return tensor.dtype


class _Again:
    """A batch norm's result, or its ReLU, in some dtype, from what the norm's `node` keeps."""

    def __init__(self, node: Node, *, relu: bool) -> None:
        self.node, self.relu = node, relu
        # Copies: FSDP takes the parameters themselves away between the passes.
        self.weight, self.bias = (
            parameter.variable.detach().clone() for parameter, _ in node.next_functions[1:3]
        )

    @torch.no_grad()
    def __call__(self, dtype: torch.dtype) -> Tensor:
        x, eps = self.node._saved_input, getattr(self.node, _NORMS[self.node.name()])
        # By the statistics of the batch; the running ones have had theirs.
        out = F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=eps)
        return (out.relu_() if self.relu else out).to(dtype)


class LeanConv2d(nn.Conv2d):
    """A convolution that does not keep a batch norm's result, or its ReLU, for the backward pass, see `rematerialize`."""

    def forward(self, x: Tensor) -> Tensor:
        return rematerialize(self._conv_forward(x, self.weight, self.bias), x)
