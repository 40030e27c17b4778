"""Next-ViT: convolution blocks (NCB), each stage closed by one with attention (NTB). arXiv:2207.05501.

Official code: bytedance/Next-ViT@922e771 (Apache-2.0). Keys are timm's (`stages.{s}.blocks.{b}`, `mlp.fc1`, `head.fc`), so timm's
weights load as they are. What the code does and the paper does not say, kept because every published weight needs it:

- the keys and values of an NTB are means over runs of sr^2 *consecutive tokens in raster order*, which wrap over row ends, not
  over sr x sr windows; the last N mod sr^2 tokens are left out;
- a "patch embedding" stands in every block; it is the identity unless the block strides or changes the width;
- MHCA is a grouped 3x3 convolution, a norm, a ReLU and a pointwise mix, of an input that is not normed.

Different here: where a map has fewer than sr^2 tokens (the official code raises) their mean is the one key, so every image size
works; the segmentation backbone's fourth norm is the final `norm` (the official forward fails there).
Published top-1, 224 / 384: small 82.5 / 83.6, base 83.2 / 84.3, large 83.6 / 84.7; ssld_6m 84.8 / 85.8, 85.1 / 86.1, 85.4 / 86.4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, make_divisible
from timm.models import register_notrace_function
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visionhybrid.models.backbone import Backbone, Spec, Stage, no_layer
from visionhybrid.models.checkpoint import rename
from visionhybrid.models.layers import (
    BatchNorm2d,
    DeployedConv2d,
    TokenLinear,
    channels_last,
    fold_after,
    fold_before,
    scale_shift,
    set_bias,
)
from visionhybrid.models.registry import System, Weights, register


class ConvNormAct(nn.Module):
    """3x3 convolution, batch norm, ReLU: (B, C, H, W) -> (B, dim, H / stride, W / stride), sides rounded up."""

    def __init__(self, dim_in: int, dim: int, *, stride: int = 1, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, 3, stride, 1, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.act = nn.ReLU(inplace=True)

    def reparameterize(self) -> None:
        self.norm = _absorb_after(self.conv, self.norm)
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
        self.conv = nn.Identity() if identity else nn.Conv2d(dim_in, dim, 1, bias=False, **dd)
        self.norm = nn.Identity() if identity else nn.BatchNorm2d(dim, **dd)

    def reparameterize(self) -> None:
        self.norm = _absorb_after(self.conv, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.pool(x)))


class MHCA(nn.Module):
    """Multi-head convolutional attention: grouped 3x3 convolution, batch norm, ReLU, pointwise mix. Keeps the shape."""

    def __init__(self, dim: int, *, head_dim: int = 32, **dd: Any) -> None:
        super().__init__()
        self.group_conv3x3 = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim // head_dim, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.act = nn.ReLU(inplace=True)
        self.projection = nn.Conv2d(dim, dim, 1, bias=False, **dd)

    def reparameterize(self) -> None:
        self.norm = _absorb_after(self.group_conv3x3, self.norm)
        self.group_conv3x3, self.act = _join(self.group_conv3x3, self.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.act(self.norm(self.group_conv3x3(x))))


class Mlp(nn.Module):
    """Pointwise: dim -> ratio * dim (a multiple of 32) -> dim, ReLU between. Keeps the shape."""

    def __init__(self, dim: int, *, ratio: float, drop: float = 0.0, **dd: Any) -> None:
        super().__init__()
        hidden = make_divisible(dim * ratio, 32)
        self.fc1 = nn.Conv2d(dim, hidden, 1, **dd)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Conv2d(hidden, dim, 1, **dd)

    def reparameterize(self) -> None:
        self.fc1, self.act = _join(self.fc1, self.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


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
        self.norm = _absorb_before([self.mlp.fc1], self.norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = x + self.drop_path(self.mhca(x))
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
            kv = self.norm(pool_tokens(x, self.run).transpose(1, 2)).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            self._heads(self.q(x)),
            self._heads(self.k(kv)),
            self._heads(self.v(kv)),
            dropout_p=self.attn_drop if self.training else 0.0,
            scale=self.scale,
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, N, head_dim)


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
        self.norm2 = _absorb_before([self.mlp.fc1], self.norm2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        tokens = self.norm1(x).flatten(2).transpose(1, 2)  # (B, N, C), raster order
        attended = self.e_mhsa(tokens).transpose(1, 2).reshape(x.shape)
        x = x + self.mhsa_drop_path(attended)
        y = self.projection(x)
        y = y + self.mhca_drop_path(self.mhca(y))
        x = torch.cat([x, y], dim=1)
        return x + self.mlp_drop_path(self.mlp(self.norm2(x)))


def _absorb_after(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """Fold `norm`, which follows `conv`, into it; returns what takes the norm's place."""
    if isinstance(norm, _BatchNorm):
        fold_after(conv, *scale_shift(norm))
        return nn.Identity()
    return norm


def _absorb_before(layers: Sequence[nn.Module], norm: nn.Module) -> nn.Module:
    """Fold `norm`, which stands before each of `layers`, into them; returns what takes the norm's place."""
    if isinstance(norm, _BatchNorm):
        for layer in layers:
            fold_before(layer, *scale_shift(norm))
        return nn.Identity()
    return norm


def _join(conv: nn.Module, act: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A convolution and the ReLU after it as one module, and what takes the ReLU's place."""
    return (DeployedConv2d.of(conv, relu=True), nn.Identity()) if isinstance(act, nn.ReLU) else (conv, act)


class NextViT(Backbone):
    """Next-ViT, as classifier and as backbone of detectors and segmenters.

    Args:
        in_chans, num_classes, global_pool, drop_rate, drop_path_rate: see `Backbone`.
        depths: blocks of each stage; stage 2 counts in groups of five (four NCB, one NTB).
        stem_chs: widths of the stem's convolutions.
        dims: width of the NCBs of each stage. ntb_dims: of the NTBs of stages 1 to 3.
        strides: 1 or 2, of the first block of each stage.
        sr_ratios: an NTB's keys are means of sr^2 consecutive tokens; stage 0 has no NTB, its entry is not used.
        head_dim: channels of a head, and of a group of the 3x3 convolutions.
        mix_block_ratio: share of an NTB's width that attention makes.
        mlp_ratios: of NCB and NTB.
        proj_drop_rate, attn_drop_rate: dropout in MLPs and after attention; of attention weights.
        extra_norm: a batch norm after each stage, in the main path (the authors' segmentation backbone); the last is `norm`.
        final_norm: False leaves the final norm out (the authors' detection backbone).
        frozen_stages: k > 0 keeps the stem and the first k stages in eval mode and without gradients.
        norm_eval: batch norms keep their statistics while training; their weights still train.
    Raises:
        ValueError: lengths, depths or widths that make no model.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (3, 4, 10, 3),
        stem_chs: Sequence[int] = (64, 32, 64),
        dims: Sequence[int] = (96, 192, 384, 768),
        ntb_dims: Sequence[int] = (256, 512, 1024),
        strides: Sequence[int] = (1, 2, 2, 2),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        head_dim: int = 32,
        mix_block_ratio: float = 0.75,
        mlp_ratios: Sequence[float] = (3.0, 2.0),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        extra_norm: bool = False,
        final_norm: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        for name, value, length in (
            ("depths", depths, 4),
            ("stem_chs", stem_chs, 3),
            ("dims", dims, 4),
            ("ntb_dims", ntb_dims, 3),
            ("strides", strides, 4),
            ("sr_ratios", sr_ratios, 4),
            ("mlp_ratios", mlp_ratios, 2),
        ):
            if len(value) != length:
                raise ValueError(f"NextViT: {name} needs {length} entries, got {list(value)}")
        if min(depths) < 1 or depths[2] % 5:
            raise ValueError(
                f"NextViT: depths must be positive, the third a multiple of 5, got {list(depths)}"
            )
        kinds = (
            "C" * depths[0],
            "C" * (depths[1] - 1) + "T",
            "CCCCT" * (depths[2] // 5),
            "C" * (depths[3] - 1) + "T",
        )
        common = dict(drop=proj_drop_rate, head_dim=head_dim)
        stages = []
        for i, kind in enumerate(kinds):
            ncb = partial(NCB, dim=dims[i], mlp_ratio=mlp_ratios[0], **common)
            ntb = partial(
                NTB,
                dim=ntb_dims[max(i - 1, 0)],
                mlp_ratio=mlp_ratios[1],
                sr_ratio=sr_ratios[i],
                mix=mix_block_ratio,
                attn_drop=attn_drop_rate,
                **common,
            )
            blocks = [ncb if letter == "C" else ntb for letter in kind]
            blocks[0] = partial(blocks[0], stride=strides[i])
            norm = BatchNorm2d if extra_norm and i < len(kinds) - 1 else no_layer
            stages.append(Stage(blocks=tuple(blocks), norm=norm, stride=strides[i]))
        spec = Spec(
            stem=partial(Stem, dims=stem_chs),
            stages=tuple(stages),
            norm=BatchNorm2d if final_norm else no_layer,
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
        self.norm_eval = norm_eval
        self.frozen_stages = frozen_stages
        for part in self._frozen():
            part.requires_grad_(False)
        self.train()

    def _frozen(self) -> list[nn.Module]:
        return [self.stem, *self.stages[: self.frozen_stages]] if self.frozen_stages > 0 else []

    def train(self, mode: bool = True) -> NextViT:
        super().train(mode)
        still = [m for m in self.modules() if isinstance(m, _BatchNorm)] if self.norm_eval else []
        for part in (*still, *self._frozen()):
            part.eval()
        return self


# ---- checkpoints

# The authors' names of arguments.
AUTHORS = {
    "path_dropout": "drop_path_rate",
    "attn_drop": "attn_drop_rate",
    "drop": "proj_drop_rate",
    "with_extra_norm": "extra_norm",
}
PUBLISHED_DEPTHS = ((3, 4, 10, 3), (3, 4, 20, 3), (3, 4, 30, 3))


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' keys (classification; detection and segmentation under `backbone.`) or timm's -> ours, which are timm's.

    Of a whole detector or segmenter the neck and the heads are left out.
    """
    if any(key.startswith("backbone.") for key in state):
        state = {key[9:]: value for key, value in state.items() if key.startswith("backbone.")}
    if "features.0.mhca.group_conv3x3.weight" not in state:
        return dict(state)
    place = _places(state)
    if "norm.weight" in state and "extra_norm_list.3.weight" in state:
        # Two norms for the last stage: the one that was never trained goes.
        loser = "norm." if _untrained(state, "norm.") else "extra_norm_list.3."
        state = {key: value for key, value in state.items() if not key.startswith(loser)}
    return rename(
        state,
        (
            (r"(stem|norm)\.(.+)", r"\1.\2"),
            (r"features\.(\d+)\.mlp\.conv([12])\.(.+)", lambda m: f"{place[int(m[1])]}.mlp.fc{m[2]}.{m[3]}"),
            (r"features\.(\d+)\.(.+)", lambda m: f"{place[int(m[1])]}.{m[2]}"),
            (r"extra_norm_list\.([012])\.(.+)", r"stages.\1.norm.\2"),
            (r"extra_norm_list\.3\.(.+)", r"norm.\1"),
            (r"proj_head\.0\.(.+)", r"head.fc.\1"),
        ),
    )


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`convert` under the name and signature that timm expects."""
    return convert(state_dict)


def _places(state: Mapping[str, Tensor]) -> list[str]:
    """Our prefix of each of the authors' blocks, which they number through: the attention blocks show where stages end."""
    n = 1 + max(int(m[1]) for key in state if (m := re.match(r"features\.(\d+)\.", key)))
    ends = [j for j in range(n) if f"features.{j}.e_mhsa.q.weight" in state]
    if len(ends) < 3 or ends[-1] != n - 1:
        raise ValueError(f"blocks with attention must close three stages or more, got them at {ends} of {n}")
    # Stage 0 has no attention; stage 1 begins with the first block that strides or changes the width.
    embeds = (j for j in range(1, ends[0]) if f"features.{j}.patch_embed.conv.weight" in state)
    second = next(embeds, ends[0])
    starts = (0, second, ends[0] + 1, ends[-2] + 1)
    places = []
    for j in range(n):
        stage = max(i for i, start in enumerate(starts) if start <= j)
        places.append(f"stages.{stage}.blocks.{j - starts[stage]}")
    return places


def _untrained(state: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether the batch norm under `prefix` still has its initial weights."""
    return bool((state[prefix + "weight"] == 1).all() and (state[prefix + "bias"] == 0).all())


def _shape(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    if key not in state:
        raise ValueError(f"the checkpoint lacks {key}")
    return tuple(state[key].shape)


def recognise(state: Mapping[str, Tensor]) -> bool:
    """Whether these are keys of a Next-ViT: the authors', timm's or ours, deployed or not, alone or inside a detector."""
    keys = {key.removeprefix("backbone.") for key in state}
    first = {"features.0.mhca.group_conv3x3.weight", "stages.0.blocks.0.mhca.group_conv3x3.weight"}
    return "stem.0.conv.weight" in keys and not first.isdisjoint(keys)


def options(state: Mapping[str, Tensor], **given: Any) -> dict[str, Any]:
    """Keywords of `NextViT`, read from keys and shapes; `given` adds what shows in none, under our names or the authors'.

    Not to be seen are `strides` (the default is right for every published model) and, of other than the published depths,
    `sr_ratios`.

    Raises:
        ValueError: `given` contradicts a shape, or the sr ratios must be given and are not.
    """
    state = convert(state)
    given = {AUTHORS.get(name, name): value for name, value in given.items()}
    seen = _visible(state)
    # Those two stand for widths that are rounded: other values fit as well, and wrong ones fail when the weights load.
    for name in (seen.keys() & given.keys()) - {"mix_block_ratio", "mlp_ratios"}:
        if _plain(given[name]) != _plain(seen[name]):
            raise ValueError(f"{name} is {_plain(seen[name])} in this checkpoint, got {_plain(given[name])}")
    deployed = "stem.0.conv.bias" in state
    pooled = [
        f"stages.{i}.blocks.{depth - 1}.e_mhsa.norm.weight" in state for i, depth in enumerate(seen["depths"])
    ]
    if not {"sr_ratios"} & given.keys():
        if deployed or any(pooled):
            usual = tuple(seen["depths"]) in PUBLISHED_DEPTHS and (
                deployed or pooled == [False, True, True, False]
            )
            if not usual:
                raise ValueError(
                    "how many tokens the attention pools shows in no shape; pass sr_ratios=, such as (8, 4, 2, 1)"
                )
        else:
            seen["sr_ratios"] = [1, 1, 1, 1]
    return {**seen, **given, **({"deployed": True} if deployed else {})}


def _visible(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options that keys and shapes of a converted checkpoint show."""
    places = {
        (int(m[1]), int(m[2])) for key in state if (m := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", key))
    }
    depths = [sum(stage == i for stage, _ in places) for i in range(4)]

    def width(stage: int, block: int) -> int:
        return _shape(state, f"stages.{stage}.blocks.{block}.mlp.fc2.weight")[0]

    def ratio(stage: int, block: int) -> float:
        out, hidden = _shape(state, f"stages.{stage}.blocks.{block}.mlp.fc2.weight")[:2]
        return hidden / out

    ntb_dims = [width(i, depths[i] - 1) for i in (1, 2, 3)]
    attn_dims = [_shape(state, f"stages.{i}.blocks.{depths[i] - 1}.e_mhsa.q.weight")[0] for i in (1, 2, 3)]
    # A stage of one block has no NCB: its entry is not used.
    dims = [width(0, 0), *(width(i, 0) if depths[i] > 1 else attn_dims[i - 1] for i in (1, 2, 3))]
    classes = state["head.fc.weight"].shape[0] if "head.fc.weight" in state else 0
    return dict(
        in_chans=_shape(state, "stem.0.conv.weight")[1],
        num_classes=classes,
        depths=depths,
        stem_chs=[_shape(state, f"stem.{i}.conv.weight")[0] for i in range(3)],
        dims=dims,
        ntb_dims=ntb_dims,
        head_dim=_shape(state, "stages.0.blocks.0.mhca.group_conv3x3.weight")[1],
        mix_block_ratio=_mix(ntb_dims, attn_dims),
        mlp_ratios=[ratio(0, 0), ratio(1, depths[1] - 1)],
        extra_norm="stages.0.norm.weight" in state,
        final_norm="norm.weight" in state,
    )


def _mix(dims: Sequence[int], attn_dims: Sequence[int]) -> float:
    """The share that gives these attention widths; the widths are rounded, so several do: the plainest."""
    for mix in (0.75, 0.5, 0.25, *(i / 10 for i in range(1, 10)), *(i / 100 for i in range(1, 100))):
        if [make_divisible(int(dim * mix), 32) for dim in dims] == list(attn_dims):
            return mix
    raise ValueError(f"no mix_block_ratio gives attention widths {list(attn_dims)} of {list(dims)}")


def _plain(value: Any) -> Any:
    return [float(v) for v in value] if isinstance(value, (list, tuple)) else value


# ---- names

_DEPTHS = {"small": PUBLISHED_DEPTHS[0], "base": PUBLISHED_DEPTHS[1], "large": PUBLISHED_DEPTHS[2]}
_DROP_PATH = {"small": 0.1, "base": 0.2, "large": 0.2}
VARIANTS = {
    f"vh_nextvit_{size}": dict(depths=_DEPTHS[size], drop_path_rate=_DROP_PATH[size]) for size in _DEPTHS
}
DENSE = {
    **{f"{name}_det": {**kwargs, "final_norm": False} for name, kwargs in VARIANTS.items()},
    **{
        f"{name}_seg": {**kwargs, "extra_norm": True, "drop_path_rate": 0.2}
        for name, kwargs in VARIANTS.items()
    },
}

_CFG = dict(
    input_size=(3, 224, 224),
    pool_size=(7, 7),
    crop_pct=0.95,
    interpolation="bicubic",
    first_conv="stem.0.conv",
    classifier="head.fc",
    license="apache-2.0",
    origin_url="https://github.com/bytedance/Next-ViT",
    paper_ids="arXiv:2207.05501",
)
_AT_384 = dict(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)
_TAGS = {
    "bd_in1k": dict(description="ImageNet-1k, 300 epochs at 224"),
    "bd_in1k_384": dict(description="bd_in1k, fine-tuned 30 epochs at 384", **_AT_384),
    "bd_ssld_6m_in1k": dict(description="distilled (SSLD) on 6 million unlabelled images, then ImageNet-1k"),
    "bd_ssld_6m_in1k_384": dict(description="bd_ssld_6m_in1k, fine-tuned at 384", **_AT_384),
}
CFGS = {
    **{f"{name}.{tag}": {**_CFG, **cfg} for name in VARIANTS for tag, cfg in _TAGS.items()},
    **{name: {**_CFG, "num_classes": 0, "description": "backbone for dense prediction"} for name in DENSE},
}
# Top-1 as timm 1.0.31 measures it (crop 0.95 at 224, 1.0 at 384), in the order of _TAGS.
_TOP1 = {
    "vh_nextvit_small": (82.626, 84.036, 84.872, 85.966),
    "vh_nextvit_base": (83.498, 84.706, 85.186, 86.372),
    "vh_nextvit_large": (83.654, 84.930, 85.514, 86.544),
}
WEIGHTS = {
    f"{name}.{tag}": Weights(
        file="model.safetensors",
        hub=f"timm/{name.removeprefix('vh_')}.{tag}",
        license="Apache-2.0",
        purpose=f"classification: {cfg['description']}",
        published={"ImageNet-1K top-1 %": top1},
    )
    for name, row in _TOP1.items()
    for (tag, cfg), top1 in zip(_TAGS.items(), row, strict=True)
}

SYSTEM = System(
    name="nextvit",
    task="classification",
    build=NextViT,
    recognise=recognise,
    options=options,
    convert=convert,
    paper="arXiv:2207.05501",
    source="bytedance/Next-ViT@922e771",
    license="Apache-2.0",
    aliases=AUTHORS,
    purpose="Next-ViT: convolution blocks with attention at the end of each stage, made for fast deployment.",
)
_TAPS = dict(out_indices=(0, 1, 2, 3), flatten_sequential=True)
register(
    SYSTEM,
    VARIANTS,
    {key: cfg for key, cfg in CFGS.items() if key.split(".")[0] in VARIANTS},
    feature_cfg=_TAPS,
    weights=WEIGHTS,
)
# The getter keeps the model whole, so that `frozen_stages` and `norm_eval` hold in the extractor.
register(
    SYSTEM,
    DENSE,
    {key: CFGS[key] for key in DENSE},
    feature_cfg=dict(feature_cls="getter", **_TAPS),
)
