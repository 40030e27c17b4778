"""The blocks of Next-ViT: NCB (convolution) and NTB (attention beside convolution), and how each folds its batch norms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, make_divisible
from timm.models import register_notrace_function
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visionhybrid.models.layers import (
    DeployedConv2d,
    TokenLinear,
    absorb_after,
    channels_last,
    fold_before,
    scale_shift,
    set_bias,
)
from visionhybrid.models.rematerialize import LeanConv2d


class ConvNormAct(nn.Module):
    """3x3 convolution, batch norm, ReLU: (B, C, H, W) -> (B, dim, H / stride, W / stride), sides rounded up."""

    def __init__(self, dim_in: int, dim: int, *, stride: int = 1, **dd: Any) -> None:
        super().__init__()
        self.conv = LeanConv2d(dim_in, dim, 3, stride, 1, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.act = nn.ReLU(inplace=True)

    def reparameterize(self) -> None:
        self.norm = absorb_after(self.conv, self.norm)
        self.conv, self.act = _join(self.conv, self.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(channels_last(x))))


class Stem(nn.Sequential):
    """Four convolutions with strides 2, 1, 1, 2: (B, in_chans, H, W) -> (B, dim, H / 4, W / 4), sides rounded up."""

    def __init__(self, in_chans: int, *, dims: Sequence[int], **dd: Any) -> None:
        widths = (in_chans, *dims, dims[-1])
        super().__init__(
            *(
                ConvNormAct(widths[i], widths[i + 1], stride=stride, **dd)
                for i, stride in enumerate((2, 1, 1, 2))
            )
        )
        self.dim = dims[-1]


class PatchEmbed(nn.Module):
    """2x2 mean (stride 2 only), 1x1 convolution, batch norm; the identity where neither size nor width changes."""

    def __init__(self, dim_in: int, dim: int, *, stride: int = 1, **dd: Any) -> None:
        super().__init__()
        # Edge windows average the pixels that exist.
        pool = partial(nn.AvgPool2d, 2, 2, ceil_mode=True, count_include_pad=False)
        identity = stride != 2 and dim_in == dim
        self.pool = pool() if stride == 2 else nn.Identity()
        self.conv = nn.Identity() if identity else LeanConv2d(dim_in, dim, 1, bias=False, **dd)
        self.norm = nn.Identity() if identity else nn.BatchNorm2d(dim, **dd)

    def reparameterize(self) -> None:
        self.norm = absorb_after(self.conv, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.pool(x)))


class MHCA(nn.Module):
    """Multi-head convolutional attention: grouped 3x3 convolution, batch norm, ReLU, pointwise mix. Keeps the shape."""

    def __init__(self, dim: int, *, head_dim: int = 32, **dd: Any) -> None:
        super().__init__()
        self.group_conv3x3 = LeanConv2d(dim, dim, 3, 1, 1, groups=dim // head_dim, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.act = nn.ReLU(inplace=True)
        self.projection = LeanConv2d(dim, dim, 1, bias=False, **dd)

    def reparameterize(self) -> None:
        self.norm = absorb_after(self.group_conv3x3, self.norm)
        self.group_conv3x3, self.act = _join(self.group_conv3x3, self.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.act(self.norm(self.group_conv3x3(x))))


class Mlp(nn.Module):
    """Pointwise: dim -> ratio * dim (a multiple of 32) -> dim, ReLU between. Keeps the shape."""

    def __init__(self, dim: int, *, ratio: float, drop: float = 0.0, **dd: Any) -> None:
        super().__init__()
        hidden = make_divisible(dim * ratio, 32)
        self.fc1 = LeanConv2d(dim, hidden, 1, **dd)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Conv2d(hidden, dim, 1, **dd)

    def reparameterize(self) -> None:
        self.fc1, self.act = _join(self.fc1, self.act)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """With `shortcut`, for deployed models in eval mode only, the sum of both; it may be written over the shortcut."""
        x = self.drop(self.act(self.fc1(x)))
        if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript looks into one that asks more than this
            if shortcut is not None:
                return self.fc2(x, shortcut)
        return self.drop(self.fc2(x))


class NCB(nn.Module):
    """Next convolution block: (B, dim_in, H, W) -> (B, dim, H / stride, W / stride)."""

    def __init__(
        self,
        dim_in: int,
        *,
        dim: int,
        stride: int = 1,
        drop_path: float = 0.0,
        drop: float = 0.0,
        head_dim: int = 32,
        mlp_ratio: float = 3.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"NCB: the width must be a multiple of head_dim {head_dim}, got {dim}")
        self.dim = dim
        self.patch_embed = PatchEmbed(dim_in, dim, stride=stride, **dd)
        self.mhca = MHCA(dim, head_dim=head_dim, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.mlp = Mlp(dim, ratio=mlp_ratio, drop=drop, **dd)
        self.drop_path = DropPath(drop_path)

    def reparameterize(self) -> None:
        self.norm = _absorb_before(self.mlp.fc1, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = x + self.drop_path(self.mhca(x))
        if not torch.jit.is_scripting():  # noqa: SIM102
            if isinstance(self.mlp.fc2, DeployedConv2d) and not self.training:
                return self.mlp(self.norm(x), x)
        return x + self.drop_path(self.mlp(self.norm(x)))


@register_notrace_function
def pool_tokens(x: Tensor, run: int) -> Tensor:
    """(B, N, C) -> (B, max(1, N // run), C): means of `run` consecutive tokens; what is left over at the end is dropped.

    Fewer tokens than `run` give their one mean.
    """
    n = x.shape[1]
    if n < run:
        return x.mean(1, keepdim=True)
    return F.avg_pool1d(x.transpose(1, 2), run).transpose(1, 2)


class EMHSA(nn.Module):
    """Attention with fewer keys: (B, N, C) -> (B, N, C). Keys and values see means of sr^2 consecutive tokens."""

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 32,
        sr_ratio: int = 1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.run = sr_ratio**2
        self.q = TokenLinear(dim, dim, **dd)
        self.k = TokenLinear(dim, dim, **dd)
        self.v = TokenLinear(dim, dim, **dd)
        self.proj = TokenLinear(dim, dim, **dd)
        self.norm = nn.BatchNorm1d(dim, **dd) if sr_ratio > 1 else nn.Identity()
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        kv = x
        if self.run > 1:
            kv = pool_tokens(x, self.run).transpose(1, 2).contiguous()  # (B, C, M)
            # In torch 2.11 the norm's result has another layout than compilers think unless it is given this one, and the
            # attention below, fused for the layout they think of, would be wrong.
            kv = self.norm(kv).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            self._heads(self.q(x)),
            self._heads(self.k(kv)),
            self._heads(self.v(kv)),
            dropout_p=self.attn_drop if self.training else 0.0,
            scale=self.scale,
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))

    def _heads(self, x: Tensor) -> Tensor:
        # Only with a head's channels side by side is the attention fused, which keeps no weights for the backward pass.
        return x.contiguous().unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, N, head_dim)


class NTB(nn.Module):
    """Next transformer block: (B, dim_in, H, W) -> (B, dim, H / stride, W / stride).

    Attention makes `mix` of the width, MHCA of a projection of its result the rest; both then share one MLP.
    """

    def __init__(
        self,
        dim_in: int,
        *,
        dim: int,
        stride: int = 1,
        drop_path: float = 0.0,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        head_dim: int = 32,
        sr_ratio: int = 1,
        mix: float = 0.75,
        mlp_ratio: float = 2.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.dim = dim
        attn_dim = make_divisible(int(dim * mix), 32)
        conv_dim = dim - attn_dim
        if conv_dim <= 0 or attn_dim % head_dim or conv_dim % head_dim:
            raise ValueError(
                f"NTB: mix {mix} splits width {dim} into {attn_dim} + {conv_dim}; both must be multiples of head_dim {head_dim}"
            )
        self.patch_embed = PatchEmbed(dim_in, attn_dim, stride=stride, **dd)
        self.norm1 = nn.BatchNorm2d(attn_dim, **dd)
        self.e_mhsa = EMHSA(
            attn_dim, head_dim=head_dim, sr_ratio=sr_ratio, attn_drop=attn_drop, proj_drop=drop, **dd
        )
        self.projection = PatchEmbed(attn_dim, conv_dim, **dd)
        self.mhca = MHCA(conv_dim, head_dim=head_dim, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.mlp = Mlp(dim, ratio=mlp_ratio, drop=drop, **dd)
        # Each branch is dropped in proportion to the width it makes.
        self.mhsa_drop_path = DropPath(drop_path * mix)
        self.mhca_drop_path = DropPath(drop_path * (1 - mix))
        self.mlp_drop_path = DropPath(drop_path)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold norm1 into q, both norms into k and v; fold the scale into q; drop k's bias, move v's into proj."""
        if isinstance(self.norm1, nn.Identity):
            return
        attn = self.e_mhsa
        scale, shift = scale_shift(self.norm1)
        fold_before(attn.q, scale, shift)
        if isinstance(attn.norm, _BatchNorm):
            # The mean of a full run commutes with a map per channel.
            scale2, shift2 = scale_shift(attn.norm)
            scale, shift = scale2 * scale, scale2 * shift + shift2
        fold_before(attn.k, scale, shift)
        fold_before(attn.v, scale, shift)
        self.norm1, attn.norm = nn.Identity(), nn.Identity()
        attn.q.weight.mul_(attn.scale)
        attn.q.bias.mul_(attn.scale)
        attn.scale = 1.0
        # A constant along the softmax axis has no effect, and its weights sum to 1.
        attn.k.bias = None
        set_bias(attn.proj, attn.proj.bias.double() + attn.proj.weight.double() @ attn.v.bias.double())
        attn.v.bias = None
        self.norm2 = _absorb_before(self.mlp.fc1, self.norm2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        tokens = self.norm1(x).flatten(2).transpose(1, 2)  # (B, N, C), raster order
        attended = self.e_mhsa(tokens).transpose(1, 2).reshape(x.shape)
        x = x + self.mhsa_drop_path(attended)
        y = self.projection(x)
        y = y + self.mhca_drop_path(self.mhca(y))
        x = torch.cat([x, y], dim=1)
        if not torch.jit.is_scripting():  # noqa: SIM102
            if isinstance(self.mlp.fc2, DeployedConv2d) and not self.training:
                return self.mlp(self.norm2(x), x)
        return x + self.mlp_drop_path(self.mlp(self.norm2(x)))


def _absorb_before(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """Fold `norm`, which stands before `layer`, into it; returns what takes the norm's place."""
    if isinstance(norm, _BatchNorm):
        fold_before(layer, *scale_shift(norm))
        return nn.Identity()
    return norm


def _join(conv: nn.Module, act: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A convolution and the ReLU after it as one module, and what takes the ReLU's place."""
    return (DeployedConv2d.of(conv, relu=True), nn.Identity()) if isinstance(act, nn.ReLU) else (conv, act)
