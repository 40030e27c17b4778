"""`F.linear` by the quicker of the two libraries for matrix products that PyTorch brings for CPUs.

PyTorch gives float32 products to MKL, which runs AVX2 code on AMD's CPUs; oneDNN runs AVX-512 there. Rows of 384 to 1536
numbers on an EPYC 9005: 100 GFLOP/s a thread with MKL, 230 with oneDNN. Only the order of sums is another. For a comparison, inside
`torch.backends.mkldnn.flags(enabled=False)` everything is MKL's.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from visionhybrid.kernels.precision import autocasting

# Not public, but what inductor makes of `F.linear`; where a torch has it not, the ordinary product serves.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_FASTER = HAS_ONEDNN and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, (..., C), (C', C), (C',) -> (..., C'): `F.linear` with its gradients, of any order."""
    if not _suits(x, weight):
        return F.linear(x, weight, bias)
    # As rows: of more axes the operator returns a view, in which nobody may add anything.
    return _Linear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's operator, which knows no tracing, autocast, functorch or forward mode, may stand in."""
    return (
        _FASTER
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.dim() > 1
        and x.numel() > 0
        and weight.numel() > 0
        and not autocasting(x)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._get_mkldnn_enabled()
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """Of rows (N, C) and (C', C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        # In the type of the forward pass, as PyTorch's own, even if autocast is on meanwhile. By `linear` again, which
        # differentiates where a graph of the gradient is asked for.
        with torch.autocast("cpu", enabled=False):
            dx = linear(grad, weight.mT, None) if wanted[0] else None
            dweight = linear(grad.mT, x.mT, None) if wanted[1] else None
        return dx, dweight, grad.sum(0) if wanted[2] else None


if HAS_ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * prod(x) * weight[0]
