"""The modules of HAT; `visionhybrid.models.hat` tells what they keep and change of the authors' code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from visionhybrid.kernels.window_attention import window_attention
from visionhybrid.kernels.window_attention.bands import attention_in_bands, suits
from visionhybrid.models.hat.conv import ChannelAttentionConv
from visionhybrid.models.hat.layers import LayerNorm, Linear, StreamConv, accumulate, gelu_of_linear
from visionhybrid.models.restorer import Restorer, working_dtype

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, as EDSR's authors measured it


class WindowAttention(nn.Module):
    """Multi-head attention in windows of a channels-last map, (B, H, W, C) -> (B, H, W, C).

    `bias_table[head, w - 1 + dy, w - 1 + dx]` is the bias of the key at offset (dy, dx) from the query.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        *,
        key_window_size: int | None = None,
        shift: int = 0,
        qkv_bias: bool = True,
        scale: float | None = None,
        drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"HAT: dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads, self.window_size, self.shift, self.scale = num_heads, window_size, shift, scale
        self.key_window_size = key_window_size or window_size
        side = self.window_size + self.key_window_size - 1
        self.bias_table = nn.Parameter(torch.empty(num_heads, side, side, **dd))
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.drop = nn.Dropout(drop)

    def bias(self) -> Tensor:
        """(heads, queries, keys)."""
        w, e = self.window_size, self.key_window_size
        # (heads, w, w, e, e): [a, b, i, j] is the table at (a + i, b + j); query (y, x) has (a, b) = (w - 1 - y, w - 1 - x)
        windows = self.bias_table.unfold(1, e, 1).unfold(2, e, 1)
        return windows.reshape(self.num_heads, w * w, e * e).flip(1)

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """`onto`: a map to add the result to, in place where nothing is recorded."""
        if self.key_window_size == self.window_size and suits(x):
            before, after = self.qkv.ready(x.dtype), self.proj.ready(x.dtype)
            # Weights are cast once; autocast would do it for every row of windows, and round the float32 sums of float16.
            with torch.autocast("cpu", enabled=False):
                return attention_in_bands(
                    x,
                    before,
                    lambda y: self.drop(after(y)),
                    self.bias(),
                    num_heads=self.num_heads,
                    window_size=self.window_size,
                    shift=self.shift,
                    scale=self.scale,
                    onto=onto,
                )
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, H, W, 3, heads, D)
        out = window_attention(
            *qkv.unbind(3),
            self.bias(),
            window_size=self.window_size,
            key_window_size=self.key_window_size,
            shift=self.shift,
            scale=self.scale,
        )
        out = self.drop(self.proj(out.flatten(3)))
        return out if onto is None else accumulate(onto, out)


class Mlp(nn.Module):
    def __init__(self, dim: int, mlp_dim: int, drop: float = 0.0, **dd: Any) -> None:
        super().__init__()
        self.fc1 = Linear(dim, mlp_dim, **dd)
        self.fc2 = Linear(mlp_dim, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(gelu_of_linear(x, self.fc1.weight, self.fc1.bias))))


class HybridBlock(nn.Module):
    """HAB: x + attention(norm x) + conv_scale * convolution(norm x), then the MLP. (B, H, W, C) -> same."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        *,
        conv_dim: int,
        gate_dim: int,
        mlp_dim: int,
        shift: int = 0,
        conv_scale: float = 0.01,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        drop_path: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.conv_scale = conv_scale
        self.norm1 = LayerNorm(dim, **dd)
        self.mixer = WindowAttention(
            dim, num_heads, window_size, shift=shift, qkv_bias=qkv_bias, scale=qk_scale, drop=drop, **dd
        )
        self.conv = ChannelAttentionConv(dim, conv_dim, gate_dim, **dd)
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, mlp_dim, drop, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        kind = working_dtype(x, self.mixer.qkv.weight)
        n = self.norm1(x).to(kind)
        x = self.conv.onto(x.permute(0, 3, 1, 2), n.permute(0, 3, 1, 2), self.conv_scale).permute(0, 2, 3, 1)
        # `x` is this block's own memory from here on.
        x = accumulate(x, self.drop_path(self.mixer(n))) if self.training else self.mixer(n, onto=x)
        return accumulate(x, self.drop_path(self.mlp(self.norm2(x).to(kind))))


class OverlapBlock(nn.Module):
    """OCAB: attention of each window to a larger one around it, then an MLP. (B, H, W, C) -> same."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        key_window_size: int,
        *,
        mlp_dim: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, **dd)
        self.mixer = WindowAttention(
            dim,
            num_heads,
            window_size,
            key_window_size=key_window_size,
            qkv_bias=qkv_bias,
            scale=qk_scale,
            **dd,
        )
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, mlp_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        kind = working_dtype(x, self.mixer.qkv.weight)
        x = x + self.mixer(self.norm1(x).to(kind))
        return accumulate(x, self.mlp(self.norm2(x).to(kind)))


class Group(nn.Module):
    """RHAG: blocks, the overlapping block, a convolution, a skip. (B, C, H, W) -> same.

    Where no graph is made and products run in bfloat16, so does the stream inside a group: the convolution rounds it anyway, and
    the sum over groups stays in float32. On photographs it errs no more than the authors' layout, which has no wide sum at all.
    """

    def __init__(self, dim: int, *, blocks: Sequence[Any], overlap: Any, conv: bool, **dd: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(dim, **dd) for block in blocks)
        self.overlap = overlap(dim, **dd)
        self.conv = StreamConv(dim, **dd) if conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        t = x.permute(0, 2, 3, 1)
        if not torch.is_grad_enabled() and working_dtype(x, self.overlap.mixer.qkv.weight) == torch.bfloat16:
            t = t.to(torch.bfloat16)
        for block in self.blocks:
            t = block(t)
        return x + self.conv(self.overlap(t).permute(0, 3, 1, 2))


class Stem(nn.Conv2d):
    def __init__(self, in_chans: int, *, dim: int, **dd: Any) -> None:
        super().__init__(in_chans, dim, 3, padding=1, **dd)
        self.dim = dim


class Enter(nn.Module):
    """What stands before the first group: a norm, an absolute position table of one fixed size, dropout; each optional."""

    def __init__(self, dim: int, *, norm: bool, position_size: int, drop: float, **dd: Any) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, **dd) if norm else nn.Identity()
        self.position = (
            nn.Parameter(torch.empty(1, position_size, position_size, dim, **dd)) if position_size else None
        )
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.permute(0, 2, 3, 1))
        if self.position is not None:
            if x.shape[1:3] != self.position.shape[1:3]:
                raise ValueError(
                    f"HAT: with a position table the padded input must be {tuple(self.position.shape[1:3])}, "
                    f"got {tuple(x.shape[1:3])}"
                )
            x = x + self.position
        return self.drop(x).permute(0, 3, 1, 2)


class Merge(nn.Module):
    """What stands after the last group: norm and convolution. (B, C, H, W) -> same."""

    def __init__(self, dim: int, *, conv: bool, **dd: Any) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, **dd)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, **dd) if conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.conv(n.to(working_dtype(n, self.norm.weight)))


class Tail(nn.Module):
    """Convolution, pixel shuffles up to `scale`, convolution. (B, dim, H, W) -> (B, in_chans, H * scale, W * scale)."""

    def __init__(self, dim: int, in_chans: int, *, scale: int, width: int, **dd: Any) -> None:
        super().__init__()
        steps = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
        if math.prod(steps) != scale:
            raise ValueError(f"HAT: scale must be 3 or a power of 2, got {scale}")
        self.before = nn.Conv2d(dim, width, 3, padding=1, **dd)
        self.up = nn.ModuleList(nn.Conv2d(width, width * r * r, 3, padding=1, **dd) for r in steps)
        self.last = nn.Conv2d(width, in_chans, 3, padding=1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.before(x.to(working_dtype(x, self.before.weight))))
        for conv in self.up:
            x = F.pixel_shuffle(conv(x), math.isqrt(conv.out_channels // conv.in_channels))
        return self.last(x)


class HAT(Restorer):
    """The Hybrid Attention Transformer.

    Args:
        in_chans: 3 (RGB, its mean subtracted) or another number (no mean).
        scale: 1, 2, 3, 4, 8, ...; 1 keeps the resolution (denoising, JPEG artefacts).
        dim, depths, num_heads: width; blocks and heads of each group.
        window_size, key_window_size: sides of the windows, and of the overlapping key windows (their difference even).
        conv_dim, gate_dim: inner widths of the convolution branch and of its channel attention.
        mlp_dim, tail_dim: inner width of the MLPs; width of the tail.
        conv_scale: weight of the convolution branch.
        shift: of every second block; default half a window, 0 for none.
        qkv_bias, patch_norm, group_conv: the projections' bias, the norm before the first group, the convolutions after each.
        qk_scale: instead of head_dim ** -0.5.
        position_size: side of an absolute position table, which fixes the input size; 0 for none.
        img_range, drop_rate, drop_path_rate: pixel range inside; dropout; stochastic depth of the last block, linear before.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        scale: int = 4,
        dim: int = 180,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        num_heads: Sequence[int] = (6, 6, 6, 6, 6, 6),
        window_size: int = 16,
        key_window_size: int = 24,
        conv_dim: int = 60,
        gate_dim: int = 6,
        mlp_dim: int = 360,
        tail_dim: int = 64,
        conv_scale: float = 0.01,
        shift: int | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        patch_norm: bool = True,
        group_conv: bool = True,
        position_size: int = 0,
        img_range: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        num_classes: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if len(depths) != len(num_heads):
            raise ValueError(
                f"HAT: depths and num_heads need one length, got {len(depths)} and {len(num_heads)}"
            )
        if (key_window_size - window_size) % 2 or key_window_size < window_size:
            raise ValueError(
                f"HAT: key_window_size must be window_size plus an even number, got {key_window_size} and {window_size}"
            )
        shift = window_size // 2 if shift is None else shift
        if not 0 <= shift < window_size:
            raise ValueError(f"HAT: shift goes from 0 to below window_size {window_size}, got {shift}")
        total = sum(depths)
        rates = [drop_path_rate * i / max(total - 1, 1) for i in range(total)]
        shared = dict(window_size=window_size, mlp_dim=mlp_dim, qkv_bias=qkv_bias, qk_scale=qk_scale)
        groups = []
        for depth, heads in zip(depths, num_heads, strict=True):
            block = partial(
                HybridBlock,
                num_heads=heads,
                conv_dim=conv_dim,
                gate_dim=gate_dim,
                conv_scale=conv_scale,
                drop=drop_rate,
                **shared,
            )
            blocks = [partial(block, shift=shift * (i % 2), drop_path=rates.pop(0)) for i in range(depth)]
            overlap = partial(OverlapBlock, num_heads=heads, key_window_size=key_window_size, **shared)
            groups.append(partial(Group, blocks=blocks, overlap=overlap, conv=group_conv))
        super().__init__(
            stem=partial(Stem, dim=dim),
            enter=partial(Enter, norm=patch_norm, position_size=position_size, drop=drop_rate),
            groups=groups,
            merge=partial(Merge, conv=group_conv),
            tail=partial(Tail, scale=scale, width=tail_dim),
            scale=scale,
            in_chans=in_chans,
            multiple_of=window_size,
            mean=RGB_MEAN if in_chans == 3 else (0.0,),
            img_range=img_range,
            num_classes=num_classes,
            device=device,
            dtype=dtype,
        )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The authors' initialisation: normal 0.02 for linear layers and tables, PyTorch's own for convolutions."""
        if self.stem.weight.is_meta:  # nothing to fill, and timm would count each operation at length
            return
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.Conv2d, nn.LayerNorm)):
                module.reset_parameters()
            for table in (getattr(module, "bias_table", None), getattr(module, "position", None)):
                if table is not None and name:
                    trunc_normal_(table, std=0.02)
        self.init_non_persistent_buffers()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"enter.position", "*.bias_table"}
