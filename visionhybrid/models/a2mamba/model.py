"""`A2Mamba`: blocks of a mixer and a convolutional MLP on the shared skeleton."""

# No `from __future__ import annotations`: TorchScript reads the annotations.

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d
from torch import Tensor, nn

from visionhybrid.models.a2mamba.keys import (
    checkpoint_filter_fn as checkpoint_filter_fn,  # timm looks for it here
)
from visionhybrid.models.a2mamba.keys import tokens_of
from visionhybrid.models.a2mamba.mixer import GlobalMixer, StateSpaceMixer
from visionhybrid.models.backbone import Backbone, LayerFn, Spec, Stage
from visionhybrid.models.layers import (
    ConvMlp,
    ConvNorm,
    ConvPosition,
    ConvStem,
    RotaryGrid,
    fold_after,
    require_entries,
)

RESIDUALS = ("plain", "layer_scale", "residual_scale")


class ChannelScale(nn.Module):
    """y = weight * x + bias per channel of (B, C, H, W); both are learnt, the bias from 0."""

    def __init__(self, dim: int, *, init: float, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.constant_(self.weight, self.init)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])


class Block(nn.Module):
    """Conv position, mixer, conv position, MLP: (B, dim, H, W), the shape stays.

    Args:
        residual: "plain": x + f(x); "layer_scale": x + scale(f(x)); "residual_scale": scale(x) + f(x).
        scale_init: what the weights of the scales start from.
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: LayerFn,
        hidden: int,
        residual: str = "plain",
        scale_init: float = 1.0,
        drop_path: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.cpe1 = ConvPosition(dim, **dd)
        self.norm1 = LayerNorm2d(dim, **dd)
        self.mixer = mixer(dim, **dd)
        self.cpe2 = ConvPosition(dim, **dd)
        self.norm2 = LayerNorm2d(dim, **dd)
        self.mlp = ConvMlp(dim, hidden=hidden, **dd)
        self.drop_path = DropPath(drop_path)
        self.scales_skip = residual == "residual_scale"
        plain = residual == "plain"
        self.scale1 = nn.Identity() if plain else ChannelScale(dim, init=scale_init, **dd)
        self.scale2 = nn.Identity() if plain else ChannelScale(dim, init=scale_init, **dd)

    def reparameterize(self) -> None:
        """Fold scales of branches into the projections before them."""
        if not self.scales_skip:
            self.scale1 = _absorb(self.mixer.proj, self.scale1)
            self.scale2 = _absorb(self.mlp.fc2, self.scale2)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        x = self.cpe1(x)
        y = self.mixer(self.norm1(x), position)
        x = self.scale1(x) + self.drop_path(y) if self.scales_skip else x + self.drop_path(self.scale1(y))
        x = self.cpe2(x)
        y = self.mlp(self.norm2(x))
        return self.scale2(x) + self.drop_path(y) if self.scales_skip else x + self.drop_path(self.scale2(y))


def _absorb(conv: nn.Module, scale: nn.Module) -> nn.Module:
    if isinstance(scale, ChannelScale):
        fold_after(conv, scale.weight.double(), scale.bias.double())
        return nn.Identity()
    return scale


class A2Mamba(Backbone):
    """A2Mamba, as classifier and as backbone.

    Args:
        in_chans, num_classes, global_pool, drop_rate, drop_path_rate: see `Backbone`.
        img_size: side or (height, width) for which the last stage's table of biases is made; every size runs.
        depths, dims, num_heads, kernel_sizes, mlp_ratios: of each stage. The heads are even in number, their dims multiples of
            4. `kernel_sizes` are the sides of the attention windows.
        residual: of each stage, "plain", "layer_scale" or "residual_scale", see `Block`.
        scale_init: of each stage, what weights of those scales start from.
        proj_dim: width of the final projection, which stands in the place of a final norm.
    Raises:
        ValueError: not four entries, an unknown residual, or heads that do not divide the width.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | Sequence[int] = 224,
        depths: Sequence[int] = (2, 2, 10, 2),
        dims: Sequence[int] = (48, 96, 256, 448),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_sizes: Sequence[int] = (11, 9, 7, 7),
        mlp_ratios: Sequence[float] = (4.0, 4.0, 3.0, 3.0),
        residual: Sequence[str] = ("plain",) * 4,
        scale_init: Sequence[float] = (1.0, 1.0, 1e-6, 1e-6),
        proj_dim: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        require_entries(
            "A2Mamba", 4, depths=depths, dims=dims, num_heads=num_heads, kernel_sizes=kernel_sizes
        )
        require_entries("A2Mamba", 4, mlp_ratios=mlp_ratios, residual=residual, scale_init=scale_init)
        for how in residual:
            if how not in RESIDUALS:
                raise ValueError(f"A2Mamba: residual must be one of {', '.join(RESIDUALS)}, got {how!r}")
        stages = []
        for i, dim in enumerate(dims):
            kind = StateSpaceMixer if i < 3 else partial(GlobalMixer, tokens=tokens_of(img_size))
            block = partial(
                Block,
                mixer=partial(kind, num_heads=num_heads[i], kernel_size=kernel_sizes[i]),
                hidden=int(mlp_ratios[i] * dim),
                residual=residual[i],
                scale_init=scale_init[i],
            )
            down = dict(downsample=partial(ConvNorm, dim=dim, stride=2, bias=False), stride=2) if i else {}
            position = partial(_rotary, num_heads=num_heads[i])
            stages.append(Stage(blocks=(block,) * depths[i], position=position, **down))
        half = dims[0] // 2
        spec = Spec(
            stem=partial(ConvStem, dims=(half, half, dims[0], dims[0]), strides=(2, 1, 2, 1), bias=False),
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
