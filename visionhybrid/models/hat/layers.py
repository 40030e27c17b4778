"""The layers of HAT that know precision and memory: linear, norm, and convolution of a residual stream in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionhybrid.kernels.product import HAS_ONEDNN
from visionhybrid.kernels.window_attention.bands import suits
from visionhybrid.models.layers import pointwise
from visionhybrid.models.restorer import working_dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer on (B, H, W, C), by `pointwise` on a CPU."""
    if x.device.type != "cpu" or torch.compiler.is_exporting():
        return F.linear(x, weight, bias)
    # Rows become the batch: of a batch of one, PyTorch runs a 1x1 convolution elsewhere if it has a single thread.
    return pointwise(x.flatten(0, 1), weight, bias).unflatten(0, x.shape[:2])


def gelu_of_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(linear(x)), (B, H, W, C); where no graph is made, by oneDNN's product that ends in GELU, which inductor uses too."""
    if not (suits(x) and _fuses(x.dtype)):
        return F.gelu(linear(x, weight, bias))
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")


def conv_onto(stream: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """stream + 3x3 convolution of x, where no graph is made; one pass if oneDNN adds."""
    if stream.dtype != x.dtype or not _fuses(x.dtype):
        return stream + F.conv2d(x, weight, bias, padding=1)
    one = [1, 1]
    return torch.ops.mkldnn._convolution_pointwise.binary(
        x, stream, weight, bias, one, one, one, 1, "add", 1.0, None, [], None
    )


def _fuses(dtype: torch.dtype) -> bool:
    # In float32 it is an eighth faster for the whole network, but its scratch memory raises the peak above half of the peers'.
    return HAS_ONEDNN and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def accumulate(x: Tensor, y: Tensor, alpha: float = 1.0) -> Tensor:
    """x + alpha * y; into x where nothing is kept for a backward pass: new memory costs more than the sum."""
    return torch.add(x, y, alpha=alpha) if torch.is_grad_enabled() else x.add_(y, alpha=alpha)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def ready(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """This layer as a function for many calls in `dtype` where no graph is made: what depends on weights is done once."""
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        if not _fuses(dtype):
            return lambda x: linear(x, weight, bias)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "none")


class LayerNorm(nn.LayerNorm):
    """Layer norm of a stream that may be wider than the weights."""

    def forward(self, x: Tensor) -> Tensor:
        # Weights wider than the stream (autocast) stay so.
        weight, bias = (p.to(torch.promote_types(p.dtype, x.dtype)) for p in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class StreamConv(nn.Conv2d):
    """3x3 convolution of the residual stream itself, (B, C, H, W), which no norm keeps within float16's range."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__(dim, dim, 3, padding=1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        kind = working_dtype(x, self.weight)
        if kind != torch.float16:
            return super().forward(x.to(kind))
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=1)
