"""HAT, a Hybrid Attention Transformer for image restoration. arXiv:2205.04437 (CVPR 2023), extended in 2309.05239.

Official code: XPixelGroup/HAT@1638a9a `hat/archs/hat_arch.py` (Apache-2.0). A trunk of groups; each group is a run of blocks
(window attention beside a convolution branch with channel attention, then an MLP), one block whose queries see larger,
overlapping key windows, a convolution and a skip. What the code does and the paper does not say, kept because every published
weight needs it:

- the overlapping attention pads with zeros after the projection: keys outside the image take part with logit `bias`;
- its bias index is key minus query with a constant that makes it negative, and wraps around as Python indices do;
- shifted windows shift and mask even where the map is one window high;
- stochastic depth spares the convolution branch, and the overlapping block altogether;
- channel attention averages over the whole padded image; the result is not clamped; the input is not added to it.

Different here: both bias tables are stored as (heads, rows, columns) of key minus query, the overlapping one rolled to its
plain order, so nothing gathers with negative indices; masks and index tables are no buffers; any input size works; attention
never holds more than a window's weights; the residual stream stays in float32 under 16-bit weights or autocast.
Published PSNR on Y, Urban100 x4: HAT-S 27.87, HAT 27.97, with ImageNet pre-training HAT 28.37, HAT-L 28.60.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from visionhybrid.kernels.window_attention import window_attention
from visionhybrid.models.checkpoint import rename
from visionhybrid.models.registry import System, Weights, register
from visionhybrid.models.restorer import Restorer, working_dtype

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, as EDSR's authors measured it


class Linear(nn.Linear):
    """A linear layer on (B, H, W, C). On CPU it runs as a 1x1 convolution: oneDNN's is 3 x MKL's product on AMD CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_exporting():
            return super().forward(x)
        # Rows become the batch: of a batch of one, PyTorch runs a 1x1 convolution elsewhere if it has a single thread.
        rows = x.flatten(0, 1)[:, None].permute(0, 3, 1, 2)  # (B * H, C, 1, W)
        y = F.conv2d(rows, self.weight[:, :, None, None], self.bias)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:3], -1)


class LayerNorm(nn.LayerNorm):
    """Layer norm of a stream that may be wider than the weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        )


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
        # (heads, w, w, e, e): [a, b, i, j] is the table at (a + i, b + j), and query row y has a = w - 1 - y
        windows = self.bias_table.unfold(1, e, 1).unfold(2, e, 1)
        return windows.flip(1, 2).reshape(self.num_heads, w * w, e * e)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, H, W, 3, heads, D)
        out = window_attention(
            *qkv.unbind(3),
            self.bias(),
            window_size=self.window_size,
            key_window_size=self.key_window_size,
            shift=self.shift,
            scale=self.scale,
        )
        return self.drop(self.proj(out.flatten(3)))


class ChannelAttentionConv(nn.Module):
    """The convolution branch: narrow 3x3 pair, then a gate per channel from the image's mean. (B, C, H, W) -> same."""

    def __init__(self, dim: int, conv_dim: int, gate_dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, conv_dim, 3, padding=1, **dd)
        self.conv2 = nn.Conv2d(conv_dim, dim, 3, padding=1, **dd)
        self.fc1 = nn.Conv2d(dim, gate_dim, 1, **dd)
        self.fc2 = nn.Conv2d(gate_dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.gelu(self.conv1(x)))
        mean = x.mean((2, 3), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
        return x * self.fc2(F.relu(self.fc1(mean))).sigmoid()


class Mlp(nn.Module):
    def __init__(self, dim: int, mlp_dim: int, drop: float = 0.0, **dd: Any) -> None:
        super().__init__()
        self.fc1 = Linear(dim, mlp_dim, **dd)
        self.fc2 = Linear(mlp_dim, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


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
        x = x + self.drop_path(self.mixer(n))
        x = torch.add(x, self.conv(n.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), alpha=self.conv_scale)
        return x + self.drop_path(self.mlp(self.norm2(x).to(kind)))


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
        return x + self.mlp(self.norm2(x).to(kind))


class Group(nn.Module):
    """RHAG: blocks, the overlapping block, a convolution, a skip. (B, C, H, W) -> same."""

    def __init__(self, dim: int, *, blocks: Sequence[Any], overlap: Any, conv: bool, **dd: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(dim, **dd) for block in blocks)
        self.overlap = overlap(dim, **dd)
        self.conv = StreamConv(dim, **dd) if conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        t = x.permute(0, 2, 3, 1)
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


# ---- the authors' checkpoints

BLOCK_RULES = (
    (r"(norm[12]\.\w+)", r"\1"),
    (r"(?:attn\.)?relative_position_bias_table", r"mixer.bias_table"),
    (r"(?:attn\.)?((?:qkv|proj)\.\w+)", r"mixer.\1"),
    (r"(mlp\.fc[12]\.\w+)", r"\1"),
    (r"conv_block\.cab\.0\.(\w+)", r"conv.conv1.\1"),
    (r"conv_block\.cab\.2\.(\w+)", r"conv.conv2.\1"),
    (r"conv_block\.cab\.3\.attention\.1\.(\w+)", r"conv.fc1.\1"),
    (r"conv_block\.cab\.3\.attention\.3\.(\w+)", r"conv.fc2.\1"),
)


def _inner(key: str) -> str:
    return next(iter(rename({key: torch.empty(0)}, BLOCK_RULES)))


RULES = (
    (r"relative_position_index_(?:SA|OCA)", None),
    (r"conv_first\.(\w+)", r"stem.\1"),
    (r"patch_embed\.norm\.(\w+)", r"enter.norm.\1"),
    (r"absolute_pos_embed", r"enter.position"),
    (
        r"layers\.(\d+)\.residual_group\.(blocks\.\d+)\.(.+)",
        lambda m: f"groups.{m[1]}.{m[2]}.{_inner(m[3])}",
    ),
    (r"layers\.(\d+)\.residual_group\.overlap_attn\.(.+)", lambda m: f"groups.{m[1]}.overlap.{_inner(m[2])}"),
    (r"layers\.(\d+)\.conv\.(\w+)", r"groups.\1.conv.\2"),
    (r"norm\.(\w+)", r"merge.norm.\1"),
    (r"conv_after_body\.(\w+)", r"merge.conv.\1"),
    (r"conv_before_upsample\.0\.(\w+)", r"tail.before.\1"),
    (r"upsample\.(\d+)\.(\w+)", lambda m: f"tail.up.{int(m[1]) // 2}.{m[2]}"),
    (r"conv_last\.(\w+)", r"tail.last.\1"),
)
# Our key -> the authors', for `export_official`.
INVERSE = (
    (r"stem\.(\w+)", r"conv_first.\1"),
    (r"enter\.norm\.(\w+)", r"patch_embed.norm.\1"),
    (r"enter\.position", r"absolute_pos_embed"),
    (
        r"groups\.(\d+)\.(blocks\.\d+)\.mixer\.bias_table",
        r"layers.\1.residual_group.\2.attn.relative_position_bias_table",
    ),
    (r"groups\.(\d+)\.(blocks\.\d+)\.mixer\.(.+)", r"layers.\1.residual_group.\2.attn.\3"),
    (
        r"groups\.(\d+)\.(blocks\.\d+)\.conv\.conv([12])\.(\w+)",
        lambda m: f"layers.{m[1]}.residual_group.{m[2]}.conv_block.cab.{2 * int(m[3]) - 2}.{m[4]}",
    ),
    (
        r"groups\.(\d+)\.(blocks\.\d+)\.conv\.fc([12])\.(\w+)",
        lambda m: (
            f"layers.{m[1]}.residual_group.{m[2]}.conv_block.cab.3.attention.{2 * int(m[3]) - 1}.{m[4]}"
        ),
    ),
    (r"groups\.(\d+)\.(blocks\.\d+\..+)", r"layers.\1.residual_group.\2"),
    (
        r"groups\.(\d+)\.overlap\.mixer\.bias_table",
        r"layers.\1.residual_group.overlap_attn.relative_position_bias_table",
    ),
    (r"groups\.(\d+)\.overlap\.(?:mixer\.)?(.+)", r"layers.\1.residual_group.overlap_attn.\2"),
    (r"groups\.(\d+)\.conv\.(\w+)", r"layers.\1.conv.\2"),
    (r"merge\.norm\.(\w+)", r"norm.\1"),
    (r"merge\.conv\.(\w+)", r"conv_after_body.\1"),
    (r"tail\.before\.(\w+)", r"conv_before_upsample.0.\1"),
    (r"tail\.up\.(\d+)\.(\w+)", lambda m: f"upsample.{2 * int(m[1])}.{m[2]}"),
    (r"tail\.last\.(\w+)", r"conv_last.\1"),
)


def table_from_official(table: Tensor, window_size: int, key_window_size: int | None = None) -> Tensor:
    """A bias table as the authors store it, (offsets, heads), as ours: (heads, rows, columns) of key minus query.

    Inside windows theirs counts query minus key: reversed. For overlapping windows (`key_window_size` e given) theirs counts
    key minus query from a constant that is (e - 2) (w + e) too small and wraps around: rolled.
    """
    if key_window_size is None:
        plain = table.flip(0)
    else:
        plain = table.roll((key_window_size - 2) * (window_size + key_window_size), 0)
    side = math.isqrt(len(plain))
    return plain.t().reshape(-1, side, side).contiguous()


def table_to_official(table: Tensor, window_size: int, key_window_size: int | None = None) -> Tensor:
    """The inverse of `table_from_official`."""
    plain = table.flatten(1).t()
    if key_window_size is None:
        return plain.flip(0).contiguous()
    return plain.roll(-(key_window_size - 2) * (window_size + key_window_size), 0).contiguous()


def official_index(window_size: int, key_window_size: int | None = None) -> Tensor:
    """The authors' index buffer, (queries, keys) int64: SA, or OCA with its negative entries if `key_window_size` is given."""
    w, e = window_size, key_window_size or window_size
    query, key = torch.arange(w), torch.arange(e)
    if key_window_size is None:
        offset, step = query[:, None] - key + w - 1, 2 * w - 1
    else:
        offset, step = key - query[:, None] + w - e + 1, w + e - 1
    return (step * offset[:, None, :, None] + offset[None, :, None, :]).reshape(w * w, e * e)


def recognise(state: Mapping[str, Tensor]) -> bool:
    """HAT in the authors' layout or in ours; not SwinIR or DAT, which have neither branch nor overlapping block."""
    official = {
        "layers.0.residual_group.overlap_attn.relative_position_bias_table",
        "layers.0.residual_group.blocks.0.conv_block.cab.0.weight",
        "conv_last.weight",
    }
    ours = {"groups.0.overlap.mixer.bias_table", "groups.0.blocks.0.conv.conv1.weight", "tail.last.weight"}
    return official <= state.keys() or ours <= state.keys()


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' keys and tables as ours; ours unchanged.

    Raises:
        KeyError: a key that HAT does not have.
        ValueError: an index buffer that is not the authors', so the tables beside it would be read wrongly.
    """
    if not any(key.startswith("layers.") for key in state):
        return dict(state)
    converted = rename(state, RULES)
    w, e = _windows(state)
    for name, want in (("SA", official_index(w)), ("OCA", official_index(w, e))):
        have = state.get(f"relative_position_index_{name}")
        if have is not None and not torch.equal(have.cpu(), want):
            raise ValueError(
                f"relative_position_index_{name} is not the authors': these weights come from another HAT"
            )
    for key, value in converted.items():
        if key.endswith("bias_table"):
            converted[key] = table_from_official(value, w, e if ".overlap." in key else None)
        elif key == "enter.position":
            side = math.isqrt(value.shape[1])
            converted[key] = value.reshape(1, side, side, -1)
    return converted


def _windows(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Window sides w and e from the tables of a state dict in the authors' layout."""
    root = "layers.0.residual_group."
    w = (math.isqrt(len(state[f"{root}blocks.0.attn.relative_position_bias_table"])) + 1) // 2
    return w, math.isqrt(len(state[f"{root}overlap_attn.relative_position_bias_table"])) - w + 1


def export_official(model: HAT) -> dict[str, Tensor]:
    """The weights in the authors' layout, index buffers included: their code and spandrel load it strictly."""
    own = model.state_dict()
    mixer = model.groups[0].overlap.mixer
    w, e = mixer.window_size, mixer.key_window_size
    for key, value in own.items():
        if key.endswith("bias_table"):
            own[key] = table_to_official(value, w, e if ".overlap." in key else None)
        elif key == "enter.position":
            own[key] = value.flatten(1, 2)
    buffers = {
        "relative_position_index_SA": official_index(w),
        "relative_position_index_OCA": official_index(w, e),
    }
    return {**buffers, **rename(own, INVERSE)}


def _visible(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Every keyword that keys and shapes show. `state` has our keys."""
    groups = 1 + max(int(m[1]) for key in state if (m := re.match(r"groups\.(\d+)\.", key)))
    depths = [
        1 + max(int(m[1]) for key in state if (m := re.match(rf"groups\.{g}\.blocks\.(\d+)\.", key)))
        for g in range(groups)
    ]
    window = (state["groups.0.blocks.0.mixer.bias_table"].shape[1] + 1) // 2
    width = state["tail.last.weight"].shape[1]
    ups = [state[key].shape[0] // width for key in state if re.fullmatch(r"tail\.up\.\d+\.weight", key)]
    position = state.get("enter.position")
    return dict(
        in_chans=state["stem.weight"].shape[1],
        scale=math.prod(math.isqrt(r) for r in ups),
        dim=state["stem.weight"].shape[0],
        depths=depths,
        num_heads=[state[f"groups.{g}.overlap.mixer.bias_table"].shape[0] for g in range(groups)],
        window_size=window,
        key_window_size=state["groups.0.overlap.mixer.bias_table"].shape[1] - window + 1,
        conv_dim=state["groups.0.blocks.0.conv.conv1.weight"].shape[0],
        gate_dim=state["groups.0.blocks.0.conv.fc1.weight"].shape[0],
        mlp_dim=state["groups.0.blocks.0.mlp.fc1.weight"].shape[0],
        tail_dim=width,
        qkv_bias="groups.0.blocks.0.mixer.qkv.bias" in state,
        patch_norm="enter.norm.weight" in state,
        group_conv="merge.conv.weight" in state,
        position_size=0 if position is None else position.shape[1],
    )


# The authors' keywords that are ours under another name, and those that `_translated` turns into ours.
ALIASES = {
    "embed_dim": "dim",
    "upscale": "scale",
    "num_feat": "tail_dim",
    "compress_ratio": "compress_ratio",
    "squeeze_factor": "squeeze_factor",
    "overlap_ratio": "overlap_ratio",
    "mlp_ratio": "mlp_ratio",
    "resi_connection": "resi_connection",
    "ape": "ape",
    "img_size": "img_size",
    "patch_size": "patch_size",
    "upsampler": "upsampler",
    "attn_drop_rate": "attn_drop_rate",
    "use_checkpoint": "use_checkpoint",
}
UNSEEN = ("conv_scale", "shift", "qk_scale", "img_range", "drop_rate", "drop_path_rate", "num_classes")


def _translated(name: str, value: Any, seen: Mapping[str, Any]) -> dict[str, Any]:
    """One keyword of the authors' constructor as ours; `seen` gives the widths that their ratios refer to."""
    only = {
        "patch_size": 1,
        "upsampler": "pixelshuffle",
        "attn_drop_rate": 0,
        "use_checkpoint": False,
    }
    if name in only:
        if value != only[name]:
            raise ValueError(f"{name} must be {only[name]!r}, got {value!r}")
        return {}
    if name == "img_size":
        side = value if isinstance(value, int) else value[0]
        if side < seen["window_size"]:
            raise ValueError(f"img_size must be at least the window {seen['window_size']}, got {value}")
        table = {"position_size": side} if seen["position_size"] else {}
        # The authors' blocks do not shift where the nominal image is one window.
        return table | ({"shift": 0} if side == seen["window_size"] else {})
    if name == "ape":
        return {} if bool(value) == bool(seen["position_size"]) else {"position_size": 0 if not value else -1}
    if name == "resi_connection":
        if value not in ("1conv", "identity"):
            raise ValueError(f"resi_connection must be '1conv' or 'identity', got {value!r}")
        return {"group_conv": value == "1conv"}
    if name == "overlap_ratio":
        return {"key_window_size": seen["window_size"] + int(seen["window_size"] * value)}
    dim = seen["dim"]
    widths = {
        "compress_ratio": ("conv_dim", lambda: dim // value),
        "squeeze_factor": ("gate_dim", lambda: dim // value),
        "mlp_ratio": ("mlp_dim", lambda: int(dim * value)),
    }
    ours, width = widths[name]
    return {ours: width()}


def options(state: Mapping[str, Tensor], **given: Any) -> dict[str, Any]:
    """Keywords of `HAT` from keys and shapes; `given` (our names or the authors') where no shape shows them.

    Widths are kept instead of the authors' ratios, which the shapes do not determine. Not deducible, so by default as in every
    published weight: conv_scale 0.01, img_range 1, qk_scale None, shift half a window.

    Raises:
        ValueError: a given keyword contradicts the shapes, or has a value HAT cannot have.
    """
    seen = _visible(convert(state))
    chosen: dict[str, Any] = {}
    for name, value in given.items():
        name = ALIASES.get(name, name)
        known = name in seen or name in UNSEEN
        if not known and name not in ALIASES:
            raise ValueError(f"no option {name!r}; have {', '.join([*seen, *UNSEEN, *ALIASES])}")
        for ours, wanted in ({name: value} if known else _translated(name, value, seen)).items():
            wanted = list(wanted) if isinstance(wanted, tuple) else wanted
            if ours in seen and wanted != seen[ours]:
                means = "" if ours == name else f" (that is {ours} {wanted})"
                raise ValueError(
                    f"{name}={value!r}{means} contradicts the weights, which have {ours} {seen[ours]}"
                )
            chosen[ours] = wanted
    if not chosen.get("qk_scale", True):
        chosen["qk_scale"] = None  # the authors write `qk_scale or head_dim ** -0.5`
    return seen | chosen


# ---- names

_SIZES = {
    "small": dict(dim=144, conv_dim=6, gate_dim=6, mlp_dim=288),
    "": dict(),
    "large": dict(depths=[6] * 12, num_heads=[6] * 12),
}


def _name(size: str, scale: int) -> str:
    return "_".join(["vh_hat", *([size] if size else []), f"x{scale}"])


VARIANTS = {
    _name(size, scale): dict(scale=scale, **kw) for size, kw in _SIZES.items() for scale in (1, 2, 3, 4)
}
_CFG = dict(
    input_size=(3, 64, 64),
    pool_size=None,
    num_classes=0,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    first_conv="stem",
    license="apache-2.0",
    origin_url="https://github.com/XPixelGroup/HAT",
    paper_ids="arXiv:2309.05239",
)
_WHERE = "https://github.com/XPixelGroup/HAT#how-to-test (Google Drive or Baidu; fetched by hand)"
_CLEAN = "x{} of clean images that were reduced by MATLAB's bicubic; not for noise, blur or JPEG artefacts"
_REAL = "x4 of real, degraded photographs{}; invents detail, so not for measuring fidelity"
# size, scale -> PSNR/SSIM on Y, as the README and HAT#113 quote them; see docs for where each number comes from.
_PSNR = {
    ("small", 4): {"Set5 PSNR on Y": 32.92, "Urban100 PSNR on Y": 27.87},
    ("", 4): {"Set5 PSNR on Y": 33.04, "Urban100 PSNR on Y": 27.97},
}


def _published() -> dict[str, Weights]:
    def weights(file: str, purpose: str, **kwargs: Any) -> Weights:
        return Weights(file=file, license="Apache-2.0", url=_WHERE, purpose=purpose, **kwargs)

    table = {}
    for scale in (2, 3, 4):
        for size, file in (("small", "HAT-S"), ("", "HAT")):
            table[f"{_name(size, scale)}.df2k"] = weights(
                f"{file}_SRx{scale}.pth", _CLEAN.format(scale), published=_PSNR.get((size, scale), {})
            )
        for size, file in (("", "HAT"), ("large", "HAT-L")):
            table[f"{_name(size, scale)}.in1k_df2k"] = weights(
                f"{file}_SRx{scale}_ImageNet-pretrain.pth", _CLEAN.format(scale)
            )
    table["vh_hat_x4.real_gan"] = weights("Real_HAT_GAN_SRx4.pth", _REAL.format(""))
    table["vh_hat_x4.real_gan_sharper"] = weights(
        "Real_HAT_GAN_SRx4_sharper.pth", _REAL.format(", sharper than real_gan")
    )
    return table


WEIGHTS = _published()
CFGS = {
    **{key: {**_CFG, "description": weights.purpose} for key, weights in WEIGHTS.items()},
    **{
        _name(size, 1): {**_CFG, "description": "same resolution: denoising, JPEG artefacts; none published"}
        for size in _SIZES
    },
}
SYSTEM = System(
    name="hat",
    task="restoration",
    build=HAT,
    recognise=recognise,
    options=options,
    convert=convert,
    paper="arXiv:2309.05239",
    source="XPixelGroup/HAT@1638a9a",
    license="Apache-2.0",
    aliases=ALIASES,
    purpose="HAT: super-resolution and restoration with window attention, channel attention and overlapping windows.",
)
# The last six groups at most: HAT and HAT-S have six, HAT-L twelve.
register(
    SYSTEM,
    VARIANTS,
    CFGS,
    feature_cfg=dict(feature_cls="getter", out_indices=(0, 1, 2, 3, 4, 5)),
    weights=WEIGHTS,
)
