"""Small modules and folds that any system may use.

A batch norm in eval mode is y = a x + d per channel, a = weight / sqrt(running_var + eps), d = bias - a running_mean. The folds
move a and d into a neighbouring linear map; they compute in float64 and keep the dtype and device of what they change.
"""

from __future__ import annotations

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def scale_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(a, d) of a batch norm in eval mode, float64, each (C,).

    Raises:
        ValueError: `norm` is not a batch norm with running statistics, so it is no fixed map.
    """
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"scale_shift: need a batch norm with running statistics, got {norm}")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -scale * norm.running_mean.double()
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale, shift


@torch.no_grad()
def set_bias(layer: nn.Conv2d | nn.Linear, bias: Tensor) -> None:
    """Give `layer` this bias, whether it had one or not."""
    layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=layer.weight.requires_grad)


@torch.no_grad()
def fold_after(layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor) -> None:
    """Change `layer` in place so that it computes scale * layer(x) + shift, per output channel."""
    weight = layer.weight.double()
    layer.weight.copy_(weight * scale.view(-1, *[1] * (weight.dim() - 1)))
    set_bias(layer, shift if layer.bias is None else scale * layer.bias.double() + shift)


@torch.no_grad()
def fold_before(layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor) -> None:
    """Change `layer`, pointwise (linear or 1x1), in place so that it computes layer(scale * x + shift)."""
    weight = layer.weight.double().flatten(1)
    if weight.shape[1] != scale.numel():
        raise ValueError(
            f"fold_before: the layer must be pointwise on {scale.numel()} channels, got {tuple(layer.weight.shape)}"
        )
    bias = weight @ shift
    layer.weight.copy_((weight * scale).view_as(layer.weight))
    set_bias(layer, bias if layer.bias is None else bias + layer.bias.double())


class Affine(nn.Module):
    """y = weight * x + bias per channel of (B, C, H, W): a batch norm at inference that no neighbour could absorb."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        scale, shift = scale_shift(norm)
        like = norm.running_mean
        self.weight = nn.Parameter(scale.to(like))
        self.bias = nn.Parameter(shift.to(like))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])


@register_notrace_module
class BatchNorm2d(nn.BatchNorm2d):
    """torch's (a leaf for torch.fx as well), for a place where no neighbour can absorb it: `timm.utils.reparameterize_model` calls `fuse`."""

    def fuse(self) -> Affine:
        return Affine(self)
