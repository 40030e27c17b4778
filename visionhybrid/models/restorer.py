"""The skeleton of every trunk-and-tail restorer: shallow convolution, groups of blocks, a tail that makes the image.

    f = stem((pad(x) - mean) * img_range)
    f = f + merge(groups(enter(f)))
    y = crop(tail(f) / img_range + mean)

A system gives factories and keeps its blocks to itself; there are no options for a particular paper here. What the skeleton
owns is what all of them need alike: any image size, the pixel range, precision, checkpointing, and timm's view of a model.
A restorer of another shape (a U-Net, say) is its own `nn.Module` with `scale`, `in_chans`, `multiple_of`, and may use `padded`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LayerFn = Callable[..., nn.Module]
HALF = (torch.float16, torch.bfloat16)


def working_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The type in which a product with `weight` runs: autocast's, else the weight's own."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def padded(x: Tensor, multiple_of: int) -> Tensor:
    """(B, C, H, W) extended at the bottom and right to multiples of `multiple_of`.

    The extension mirrors the image without its border pixel as far as there are pixels to mirror, and repeats the last of
    them beyond that. Written as a gather, it has no branch on the size: one exported graph serves every size.
    """
    for axis in (2, 3):
        side = x.shape[axis]
        target = (side + multiple_of - 1) // multiple_of * multiple_of
        index = torch.arange(target, device=x.device)
        index = torch.where(index < side, index, 2 * (side - 1) - index).clamp(min=0)
        x = x.index_select(axis, index)
    return x


def _cropped(x: Tensor, height: int, width: int) -> Tensor:
    """The upper left of (B, C, H, W), a view."""
    if not torch.compiler.is_exporting():
        return x.narrow(2, 0, height).narrow(3, 0, width)
    # A gather: whether a view is contiguous would be a branch on the size.
    x = x.index_select(2, torch.arange(height, device=x.device))
    return x.index_select(3, torch.arange(width, device=x.device))


class Restorer(nn.Module):
    """Image to image: (B, in_chans, H, W) in [0, 1] -> (B, in_chans, H * scale, W * scale), not clamped, any H, W >= 1.

    The stream between groups is kept in float32 when weights or autocast are 16 bits wide, so that sums over many blocks
    neither overflow (float16) nor lose small contributions (bfloat16); what works on it casts at its own entrance.

    Args:
        stem: fn(in_chans) -> module with `dim`, (B, in_chans, H, W) -> (B, dim, H, W); its weight is timm's `first_conv`.
        enter: fn(dim), before the first group.
        groups: each fn(dim) -> module on (B, dim, H, W); a group is what checkpointing recomputes and features tap.
        merge: fn(dim), after the last group; the stem's output is added to its result.
        tail: fn(dim, in_chans) -> module, (B, dim, H, W) -> (B, in_chans, H * scale, W * scale).
        multiple_of: the body needs sides that are multiples of this; smaller images are padded inside.
        mean, img_range: the network sees (x - mean) * img_range; one mean per channel.
        num_classes: 0; timm passes it to every model.
    """

    def __init__(
        self,
        *,
        stem: LayerFn,
        enter: LayerFn,
        groups: Sequence[LayerFn],
        merge: LayerFn,
        tail: LayerFn,
        scale: int,
        in_chans: int = 3,
        multiple_of: int = 1,
        mean: Sequence[float] = (0.0,),
        img_range: float = 1.0,
        num_classes: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if num_classes:
            raise ValueError(
                f"{type(self).__name__}: a restorer has no classes, num_classes must be 0, got {num_classes}"
            )
        if not img_range > 0:
            raise ValueError(f"{type(self).__name__}: img_range must be positive, got {img_range}")
        if len(mean) not in (1, in_chans):
            raise ValueError(f"{type(self).__name__}: mean needs 1 or {in_chans} values, got {len(mean)}")
        dd = {"device": device, "dtype": dtype}
        self.num_classes = 0
        self.scale, self.in_chans, self.multiple_of, self.img_range = scale, in_chans, multiple_of, img_range
        self._mean = tuple(mean)
        self.stem = stem(in_chans, **dd)
        dim = self.stem.dim
        self.enter = enter(dim, **dd)
        self.groups = nn.ModuleList(group(dim, **dd) for group in groups)
        self.merge = merge(dim, **dd)
        self.tail = tail(dim, in_chans, **dd)
        self.num_features = self.head_hidden_size = dim
        self.feature_info = [
            dict(num_chs=dim, reduction=1, module=f"groups.{i}") for i in range(len(self.groups))
        ]
        self.grad_checkpointing = False
        self.register_buffer("mean", torch.empty(1, len(mean), 1, 1, **dd), persistent=False)
        self.init_non_persistent_buffers()

    @torch.no_grad()
    def init_non_persistent_buffers(self) -> None:
        for channel, value in enumerate(self._mean):
            self.mean[:, channel] = value

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2] * self.scale, x.shape[3] * self.scale
        y = self.tail(self._features(x)[0])
        y = (y.float() if y.dtype in HALF else y) / self.img_range + self.mean
        return _cropped(y, H, W).to(x.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """What the tail works on, (B, num_features, H, W)."""
        return self._features(x)[0][:, :, : x.shape[2], : x.shape[3]]

    def _features(self, x: Tensor, last: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """Merged features and the output of each group, padded; groups after `last` do not run."""
        self._check(x)
        z = padded(x, self.multiple_of)
        z = ((z.float() if z.dtype in HALF else z) - self.mean) * self.img_range
        f = self.stem(z.to(x.dtype).contiguous(memory_format=torch.channels_last))
        f = f.float() if f.dtype in HALF else f
        taps = [self.enter(f)]
        for group in self.groups[: None if last is None else last + 1]:
            again = self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting()
            taps.append(checkpoint(group, taps[-1], use_reentrant=False) if again else group(taps[-1]))
        return f + self.merge(taps[-1]), taps[1:]

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"{type(self).__name__}: input must be (B, {self.in_chans}, H, W), got {tuple(x.shape)}"
            )

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the chosen groups, (B, num_features, H, W) each, and what the tail works on.

        Args:
            indices: groups to return: None all, n the last n, or positions. As in timm.
            norm: not offered: the norm after the last group belongs to the merging of features.
            stop_early: leave out the groups after the last one asked for; the first result then lacks them too.
        Raises:
            ValueError: `norm`, or another `output_fmt` than "NCHW".
        """
        if norm or output_fmt != "NCHW":
            raise ValueError(f"forward_intermediates: offers norm=False, 'NCHW'; got {norm}, {output_fmt!r}")
        take, last = feature_take_indices(len(self.groups), indices)
        final, taps = self._features(x, last if stop_early else None)
        final, *kept = (t[:, :, : x.shape[2], : x.shape[3]] for t in (final, *(taps[i] for i in take)))
        return kept if intermediates_only else (final, kept)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the groups after the last one in `indices`, and the tail; returns the positions that are kept."""
        take, last = feature_take_indices(len(self.groups), indices)
        dropped = last + 1 < len(self.groups)
        self.groups = self.groups[: last + 1]
        self.feature_info = self.feature_info[: last + 1]
        if prune_norm or dropped:
            self.merge = nn.Identity()
        if prune_head or dropped:
            self.tail, self.scale = nn.Identity(), 1
        return take

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the groups' inputs for the backward pass and run each group again there."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(stem=r"^stem|^enter", blocks=[(r"^groups\.(\d+)", None), (r"^merge|^tail", (99999,))])
