"""The skeleton of every classifier: stem, stages, norm, pooled head, and all that timm 1.0.31 asks of a model.

A system describes itself with factories (`Spec`, `Stage`) and subclasses `Backbone`; its blocks are its own. There are no
options for a particular paper here: a system that needs an `if` writes its own block instead. The contract is timm's
`tests/test_models.py`; `tests/timm_contract/` runs it.
"""

# No `from __future__ import annotations`: torch.fx puts the annotations of `forward` into the code it writes, as text.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates, get_device_dtype
from timm.models import checkpoint, reparameterize_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visionhybrid.models.layers import Affine, deploy_convolutions

# Every factory also takes `device` and `dtype`, so that a model can be made on any device, `meta` included.
LayerFn = Callable[..., nn.Module]


def no_layer(dim: int, device: Any = None, dtype: Any = None) -> nn.Module:
    """The factory of nothing: passes its input on."""
    return nn.Identity()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Blocks that share one resolution. A module that changes the width says so by an attribute `dim`."""

    blocks: tuple[LayerFn, ...]  # each: fn(dim, drop_path=p) -> module on (B, C, H, W)
    downsample: LayerFn = no_layer  # fn(dim) -> module; runs before the blocks
    # fn(dim) -> module on the stage's map; every block gets its output: block(x, position)
    position: LayerFn | None = None
    norm: LayerFn = no_layer  # fn(dim) -> module; runs after the blocks
    stride: int = 1  # side of the stage's input over side of its output


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A whole backbone."""

    stem: LayerFn  # fn(in_chans) -> module with `dim`
    stages: tuple[Stage, ...]
    norm: LayerFn  # fn(dim) -> module, before pooling
    stride: int = 4  # of the stem
    head: LayerFn = ClassifierHead  # fn(dim, num_classes, pool_type=, drop_rate=): pooling and classifier, as timm's heads


class StageLayers(nn.Module):
    """What a `Stage` describes: (B, C, H, W) -> (B, dim, H / stride, W / stride)."""

    def __init__(self, spec: Stage, dim: int, drop_path: list[float], **dd: Any) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = spec.downsample(dim, **dd)
        dim = getattr(self.downsample, "dim", dim)
        self.position = spec.position(dim, **dd) if spec.position else nn.Identity()
        self.blocks = nn.ModuleList()
        for block, rate in zip(spec.blocks, drop_path, strict=True):
            self.blocks.append(block(dim, drop_path=rate, **dd))
            dim = getattr(self.blocks[-1], "dim", dim)
        self.norm = spec.norm(dim, **dd)
        self.dim = getattr(self.norm, "dim", dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return self.norm(x)


class PositionedStageLayers(StageLayers):
    """The same for a stage with `position`: what it returns for the down-sampled map goes to each block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        position = self.position(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, position)
            else:
                x = block(x, position)
        return self.norm(x)


class Backbone(nn.Module):
    """Image classifier and feature extractor: (B, in_chans, H, W) -> (B, num_classes).

    Args:
        spec: the parts.
        in_chans: channels of the image.
        num_classes: 0 leaves the classifier out: pooled features come out.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none: maps come out).
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; block j of n has j / (n - 1) of it.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.stem = spec.stem(in_chans, **dd)
        dim, reduction = self.stem.dim, spec.stride
        depths = [len(stage.blocks) for stage in spec.stages]
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        self.stages = nn.Sequential()
        self.feature_info = []
        for i, (stage, rate) in enumerate(zip(spec.stages, rates, strict=True)):
            layers = PositionedStageLayers if stage.position else StageLayers
            self.stages.append(layers(stage, dim, rate, **dd))
            dim, reduction = self.stages[i].dim, reduction * stage.stride
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"stages.{i}"))
        self.norm = spec.norm(dim, **dd)
        self.num_features = getattr(self.norm, "dim", dim)
        self.head = spec.head(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights()

    # ---- weights

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Fresh values for every parameter and buffer, also after `to_empty` of a model made on the meta device.

        A module that has a method `init_weights` fills itself; of the others `init_layer` takes care.
        """
        for module in self.modules():
            if module is self:
                continue
            if hasattr(module, "init_weights"):
                module.init_weights()
            else:
                self.init_layer(module)
            if hasattr(module, "init_non_persistent_buffers"):
                module.init_non_persistent_buffers()

    @staticmethod
    def init_layer(module: nn.Module) -> None:
        """Convolutions and linears: normal, std 0.02 (cut at +-2, which never happens), bias 0. Others: their own defaults."""
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that a module lists in its `no_decay`; timm leaves biases and norms out by itself."""
        return {
            f"{name}.{parameter}"
            for name, module in self.named_modules()
            for parameter in getattr(module, "no_decay", ())
        }

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the stem, then one per block (`coarse`: per stage), then the head."""
        blocks = [
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.(?:downsample|position)", (0,)),  # with the stage's first block
            (r"^stages\.(\d+)\.norm", (99999,)),  # timm's word for: with the group before
            (r"^norm", (99999,)),
        ]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: recompute each block in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.no_grad()
    def deploy(self) -> "Backbone":
        """Fold every batch norm, in place, for inference; returns self in eval mode. Calling it again changes nothing.

        Blocks fold what they can (their `reparameterize`, which `timm.utils.reparameterize_model` finds too); a norm that no
        neighbour can absorb, such as the final one, becomes an `Affine`, so features keep their values as well as logits.
        Convolutions become `DeployedConv2d`, quicker on a CPU.
        The state dict of a deployed model has other keys, so it loads only into a deployed model.
        """
        self.eval()
        reparameterize_model(self, inplace=True)
        for module in list(self.modules()):
            for name, child in module.named_children():
                if isinstance(child, _BatchNorm):
                    setattr(module, name, Affine(child).eval())
        deploy_convolutions(self)
        return self

    # ---- classifier

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc  # pyright: ignore[reportReturnType]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier on the model's device and dtype; `global_pool` None keeps the pooling, "" removes it."""
        self.num_classes = num_classes
        self.head.reset(
            num_classes, pool_type=global_pool, in_features=self.num_features, **get_device_dtype(self)
        )
        self.head_hidden_size = self.head.num_features

    # ---- forward

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_features, h, w), after the final norm."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify; `pre_logits` stops before the classifier: (B, head_hidden_size)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The outputs of the stages, and the final features.

        Args:
            indices: None for all stages, n for the last n, or the stages themselves (negative from the end).
            norm: apply the final norm to the last stage's tap.
            stop_early: run no stage after the last one wanted.
            output_fmt: only "NCHW".
            intermediates_only: leave the final features out.
        Returns:
            (features, taps) or taps. The features are `forward_features(x)` if the last stage ran, else the last map.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"forward_intermediates: output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        final = len(self.stages) - 1
        intermediates: list[Tensor] = []
        x = self.stem(x)
        # TorchScript cannot slice a Sequential.
        stages = self.stages if torch.jit.is_scripting() or not stop_early else self.stages[: last + 1]
        ran = -1
        for i, stage in enumerate(stages):
            x = stage(x)
            ran = i
            if i in take:
                intermediates.append(self.norm(x) if norm and i == final else x)
        if intermediates_only:
            return intermediates
        if ran == final:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one wanted, in place; returns the absolute indices of the taps.

        Where stages are dropped the final norm and the classifier go too: they have another width.
        """
        take, last = feature_take_indices(len(self.stages), indices)
        cut = last + 1 < len(self.stages)
        self.stages = self.stages[: last + 1]
        if prune_norm or cut:
            self.norm = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take
