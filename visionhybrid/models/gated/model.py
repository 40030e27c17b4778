"""The blocks that RAVLT and MALA share, and the backbone made of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, LayerScale2d
from torch import Tensor, nn

from visionhybrid.kernels.linear_attention import linear_attention, plain
from visionhybrid.kernels.precision import autocasting
from visionhybrid.models.backbone import Backbone, LayerFn, Spec, Stage, no_layer
from visionhybrid.models.layers import (
    ConvMlp,
    ConvNorm,
    ConvPosition,
    ConvStem,
    RotaryGrid,
    fold_after,
    require_entries,
    rotate,
)

# ---- blocks


class GatedMixer(nn.Module):
    """(attention(q, k, v) + depthwise 5x5 of v) * gate, projected: (B, dim, H, W), the shape stays.

    A subclass writes `attend`. One projection makes queries, keys, values and the gate, which is used as it is.
    """

    def __init__(self, dim: int, *, num_heads: int, **dd: Any) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.qkvo = nn.Conv2d(dim, 4 * dim, 1, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.proj = nn.Conv2d(dim, dim, 1, **dd)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        """(B, heads, N, head_dim) each, and the table for `rotate`; returns the same shape."""
        raise NotImplementedError

    def heads(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, heads, N, head_dim), a view wherever the channels lie."""
        return x.flatten(2).unflatten(1, (-1, self.head_dim)).transpose(2, 3)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        q, k, v, gate = self.qkvo(x).chunk(4, 1)
        out = self.attend(self.heads(q), self.heads(k), self.heads(v), position)
        out = out.transpose(2, 3).reshape(x.shape)  # (B, C, H, W)
        return self.proj((out + self.lepe(v)) * gate)


def normalised(q: Tensor, k: Tensor, v: Tensor, position: Tensor, eps: float) -> Tensor:
    """sum_j w_ij v_j / (mean_j q_i . k_j + eps) / N of features q, k (B, heads, N, D); w_ij is q_i . k_j after `rotate`.

    In the type of its inputs, which a mixer has chosen: autocast has no say here.
    """
    rotated = rotate(q, position), rotate(k, position)
    if torch.jit.is_scripting():
        return plain.forward(q, k, v, rotated[0], rotated[1], None, "identity", "mean", eps, 1.0)
    return _normalised(q, k, v, rotated, eps)


def _normalised(q: Tensor, k: Tensor, v: Tensor, rotated: tuple[Tensor, Tensor], eps: float) -> Tensor:
    with torch.autocast(q.device.type, enabled=False) if autocasting(q) else nullcontext():
        return linear_attention(q, k, v, feature_map="identity", norm="fbla", eps=eps, rotated=rotated)


class SoftmaxMixer(GatedMixer):
    """`GatedMixer` with ordinary attention of rotated queries and keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(rotate(q, position), rotate(k, position), v)


class GatedBlock(nn.Module):
    """Conv position, then x + scale1 mixer(norm1(x)), then x + scale2 mlp(norm2(x)): (B, dim, H, W), the shape stays."""

    def __init__(
        self,
        dim: int,
        *,
        mixer: LayerFn,
        mlp_ratio: float,
        layer_scale: float | None,
        drop_path: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        scale = no_layer if layer_scale is None else partial(LayerScale2d, init_values=layer_scale)
        self.cpe = ConvPosition(dim, **dd)
        self.norm1 = LayerNorm2d(dim, **dd)
        self.mixer = mixer(dim, **dd)
        self.scale1 = scale(dim, **dd)
        self.norm2 = LayerNorm2d(dim, **dd)
        self.mlp = ConvMlp(dim, hidden=round(mlp_ratio * dim), **dd)
        self.scale2 = scale(dim, **dd)
        self.drop_path = DropPath(drop_path)

    def reparameterize(self) -> None:
        self.scale1 = _absorb_scale(self.mixer.proj, self.scale1)
        self.scale2 = _absorb_scale(self.mlp.fc2, self.scale2)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        x = self.cpe(x)
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x), position)))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


def _absorb_scale(conv: nn.Module, scale: nn.Module) -> nn.Module:
    if isinstance(scale, LayerScale2d):
        gamma = scale.gamma.detach().double()
        fold_after(conv, gamma, torch.zeros_like(gamma))
        return nn.Identity()
    return scale


# ---- the backbone


class GatedBackbone(Backbone):
    """Two stages of a linear mixer, two of softmax attention; a subclass names its `linear_mixer`.

    Args:
        in_chans, num_classes, global_pool, drop_rate, drop_path_rate: see `Backbone`.
        depths, dims, num_heads: of each stage; dims / num_heads must be multiples of 4.
        mlp_ratios: hidden over outer width of each stage's MLPs.
        layer_scale: what each stage's residual scales start from, None for a stage without.
        proj_dim: width of the final projection, which stands in the place of a final norm.
    Raises:
        ValueError: not four entries, or a head dim that cannot be rotated.
    """

    linear_mixer: LayerFn

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (3.5, 3.5, 3.5, 3.5),
        layer_scale: Sequence[float | None] = (1.0, 1.0, 1.0, 1.0),
        proj_dim: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        name = type(self).__name__
        require_entries(name, 4, depths=depths, dims=dims, num_heads=num_heads)
        require_entries(name, 4, mlp_ratios=mlp_ratios, layer_scale=layer_scale)
        stages = []
        for i, (depth, dim, heads) in enumerate(zip(depths, dims, num_heads, strict=True)):
            if dim % (4 * heads):
                raise ValueError(f"{name}: {heads} heads of a multiple of 4 channels do not fit width {dim}")
            mixer = partial(type(self).linear_mixer if i < 2 else SoftmaxMixer, num_heads=heads)
            block = partial(GatedBlock, mixer=mixer, mlp_ratio=mlp_ratios[i], layer_scale=layer_scale[i])
            down = partial(ConvNorm, dim=dim, stride=2) if i else no_layer
            position = partial(_rotary, num_heads=heads)
            stages.append(
                Stage(downsample=down, stride=2 if i else 1, position=position, blocks=(block,) * depth)
            )
        half = dims[0] // 2
        spec = Spec(
            stem=partial(ConvStem, dims=(half, half, half, dims[0]), strides=(2, 1, 1, 2)),
            stages=tuple(stages),
            norm=partial(ConvNorm, dim=proj_dim, kernel_size=1, act=nn.SiLU),
        )
        super().__init__(
            spec,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            device=device,
            dtype=dtype,
        )


def _rotary(dim: int, *, num_heads: int, device: Any = None, dtype: Any = None) -> RotaryGrid:
    return RotaryGrid(dim // num_heads)
