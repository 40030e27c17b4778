"""Small modules and folds that any system may use, and what makes a convolutional network quick on a CPU.

A batch norm in eval mode is y = a x + d per channel, a = weight / sqrt(running_var + eps), d = bias - a running_mean. The folds
move a and d into a neighbouring linear map; they compute in float64 and keep the dtype and device of what they change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.weak import WeakTensorKeyDictionary

from visionhybrid.kernels.precision import widened
from visionhybrid.models.rematerialize import LeanConv2d


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


def absorb_after(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """Fold `norm`, which follows `conv`, into it if it is a batch norm; returns what takes the norm's place."""
    if isinstance(norm, _BatchNorm):
        fold_after(conv, *scale_shift(norm))
        return nn.Identity()
    return norm


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
    """torch's, for a place where no neighbour can absorb it: `timm.utils.reparameterize_model` calls `fuse`. A leaf for torch.fx."""

    def fuse(self) -> Affine:
        return Affine(self)


# ---- what constructors check


def require_entries(who: str, count: int, **values: Sequence[Any]) -> None:
    """ValueError, naming it, if one of the sequences (one entry a stage, say) has not `count` entries."""
    for name, value in values.items():
        if len(value) != count:
            raise ValueError(f"{who}: {name} needs {count} entries, got {list(value)}")


# ---- parts of hybrids of convolution and attention (RAVLT, MALA, A2Mamba)


class ConvNorm(nn.Module):
    """Convolution, batch norm, activation: (B, dim_in, H, W) -> (B, dim, H / stride, W / stride), sides rounded up."""

    def __init__(
        self,
        dim_in: int,
        dim: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        bias: bool = True,
        act: type[nn.Module] = nn.Identity,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.conv = nn.Conv2d(dim_in, dim, kernel_size, stride, kernel_size // 2, bias=bias, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.act = act()

    def reparameterize(self) -> None:
        self.norm = absorb_after(self.conv, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(channels_last(x))))


class ConvStem(nn.Sequential):
    """3x3 `ConvNorm`s, GELU between: (B, in_chans, H, W) -> (B, dims[-1], H / s, W / s), s the product of `strides`."""

    def __init__(
        self, in_chans: int, *, dims: Sequence[int], strides: Sequence[int], bias: bool = True, **dd: Any
    ) -> None:
        widths = (in_chans, *dims)
        acts = [nn.GELU] * (len(dims) - 1) + [nn.Identity]
        super().__init__(
            *(
                ConvNorm(widths[i], dims[i], stride=strides[i], bias=bias, act=acts[i], **dd)
                for i in range(len(dims))
            )
        )
        self.dim = dims[-1]


class ConvPosition(nn.Conv2d):
    """x plus a depthwise convolution of it, which tells each pixel where it is: (B, dim, H, W), the shape stays."""

    def __init__(self, dim: int, *, kernel_size: int = 3, **dd: Any) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return x + self._conv_forward(x, self.weight, self.bias)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """One convolution for both: the sum is one more on the middle tap. Used by `timm.utils.reparameterize_model`."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            padding=self.padding,
            groups=self.groups,
            device="meta",
        )
        middle = torch.zeros_like(self.weight)
        middle[:, :, self.kernel_size[0] // 2, self.kernel_size[1] // 2] = 1
        conv.weight, conv.bias = nn.Parameter(self.weight + middle), self.bias
        return conv.train(self.training)


class ConvMlp(nn.Module):
    """Pointwise to `hidden`, GELU, `ConvPosition`, pointwise back: (B, dim, H, W), the shape stays."""

    def __init__(self, dim: int, *, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1, **dd)
        self.act = nn.GELU()
        self.dwconv = ConvPosition(hidden, **dd)
        self.fc2 = nn.Conv2d(hidden, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dwconv(self.act(self.fc1(x))))


@register_notrace_module
class RotaryGrid(nn.Module):
    """Angles of the pixels of a map for `rotate`: (B, C, H, W) -> (2, H * W, head_dim / 2), cosines and sines.

    The first half of the pairs turns by row * w_m, the second by column * w_m, w_m = base^(-m / (M - 1)) for m = 0 ... M - 1 and
    M = head_dim / 4: both ends count, unlike in most rotary embeddings. Nothing is stored: made anew in float32 for each map.
    """

    def __init__(self, head_dim: int, *, base: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"RotaryGrid: head_dim must be a multiple of 4, got {head_dim}")
        self.count, self.base = head_dim // 4, base

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2], x.shape[3]
        kind = widened(x)
        pace = self.base ** -torch.linspace(0, 1, self.count, dtype=kind, device=x.device)
        rows = torch.arange(H, dtype=kind, device=x.device)[:, None, None] * pace
        columns = torch.arange(W, dtype=kind, device=x.device)[:, None] * pace
        angles = torch.cat([rows.expand(H, W, self.count), columns.expand(H, W, self.count)], -1).flatten(
            0, 1
        )
        return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of (..., N, D) by the angles of `table` (2, N, D / 2); the dtype stays."""
    cos, sin = table[0], table[1]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)


# ---- speed on a CPU. oneDNN's convolutions take channels-last maps as they are, where (B, N, C) tokens are a view of a
# (B, C, H, W) map, and fuse a ReLU. The functions are leaves for torch.fx, because they look at their input.


@register_notrace_function
def channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) in channels-last memory on a CPU; as it is on other devices, where the user chooses."""
    if x.device.type != "cpu":
        return x
    return x.contiguous(memory_format=torch.channels_last)


@register_notrace_function
def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of tokens (B, N, C), on a CPU by a 1x1 convolution: oneDNN's is up to twice as fast as MKL's matrix product.

    `kernels.product` reaches the same library by another operator, at the same speed but with more scratch memory: a group of HAT-S
    at 128x128 makes the resident set grow by 285 MB with it, by 235 with this (medians of six processes). It serves where that does
    not matter: it asks first which library is quicker, and can be differentiated twice.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    y = F.conv2d(x.transpose(1, 2).unsqueeze(2), weight[:, :, None, None], bias)  # (B, C', 1, N)
    return y.squeeze(2).transpose(1, 2)


class TokenLinear(nn.Linear):
    """`nn.Linear` for tokens (B, N, C), see `pointwise`."""

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.bias)


@register_notrace_module
class DeployedConv2d(nn.Conv2d):
    """A convolution of a deployed model, and the ReLU after it if `relu`; with a `shortcut`, the sum of both.

    Eager inference on a CPU makes it one oneDNN call, with the weight in oneDNN's own layout. That second copy of the weight is
    made at the first call and again when the weight has changed; a change through `weight.data` goes unnoticed, use `copy_`.
    The sum is then written over the shortcut, which must be the caller's own. Everywhere else (autograd, autocast, TorchScript,
    tracing, compiling, other devices) it is the ordinary calls.
    """

    def __init__(self, *args: Any, relu: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.relu = relu

    @classmethod
    def of(cls, conv: nn.Conv2d, *, relu: bool = False) -> DeployedConv2d:
        """With `conv`'s own parameters, not copies."""
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias=False,
            device="meta",
            relu=relu,
        )
        new.weight, new.bias = conv.weight, conv.bias
        return new.train(conv.training)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        # Two ifs, because TorchScript looks into one that asks more than this.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if _fuses(x, self.weight) and (shortcut is None or self._adds(x, shortcut)):
                return self._fused(x, shortcut)
        x = self._conv_forward(x, self.weight, self.bias)
        if self.relu:
            x = F.relu(x)
        return x if shortcut is None else shortcut + x

    def _fused(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        how = self.padding, self.stride, self.dilation, self.groups
        weight = _packed(self.weight, how, x.shape)
        if shortcut is not None:
            return torch.ops.mkldnn._convolution_pointwise_.binary(
                shortcut, x, weight, self.bias, *how, "add", 1.0, None, [], None
            )
        act = "relu" if self.relu else "none"
        return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *how, act, [], "")

    def _adds(self, x: Tensor, shortcut: Tensor) -> bool:
        """Whether oneDNN can add the convolution of `x` to `shortcut` in place."""
        return (
            not self.relu
            and shortcut.dtype == x.dtype
            and not shortcut.requires_grad
            and shortcut.is_contiguous(memory_format=torch.channels_last)
        )


# oneDNN's fused operators are not public: where a torch has them not, the ordinary ones serve.
_HAS_FUSED = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name)
    for name in ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")
)
_PACKED = WeakTensorKeyDictionary()  # weight -> (state of the weight, the same in oneDNN's layout)


def _fuses(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's fused operator, which knows no autograd, autocast or tracing, may stand in for the ordinary ones."""
    return (
        _HAS_FUSED
        and x.device.type == "cpu"
        and weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


def _packed(weight: Tensor, how: tuple[Any, ...], shape: torch.Size) -> Tensor:
    """`weight` in oneDNN's layout for inputs of `shape` (right, if not quickest, for others)."""
    if weight.is_inference():  # its changes are not counted
        return weight
    state = (weight._version, weight.data_ptr(), weight.dtype)
    known = _PACKED.get(weight)
    if known is not None and known[0] == state:
        return known[1]
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), *how, list(shape))
    _PACKED[weight] = (state, packed)
    return packed


def deploy_convolutions(model: nn.Module) -> None:
    """Turn the plain convolutions of `model` into `DeployedConv2d`, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if (
                type(child) in (nn.Conv2d, LeanConv2d)
                and child.padding_mode == "zeros"
                and not isinstance(child.padding, str)
            ):
                setattr(module, name, DeployedConv2d.of(child))
