"""`NextViT`: the blocks put together, and what detectors and segmenters ask of it in training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from visionhybrid.models.backbone import Backbone, Spec, Stage, no_layer
from visionhybrid.models.layers import BatchNorm2d, require_entries
from visionhybrid.models.nextvit.blocks import NCB, NTB, Stem
from visionhybrid.models.nextvit.keys import checkpoint_filter_fn as checkpoint_filter_fn  # for timm


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
        require_entries("NextViT", 4, depths=depths, dims=dims, strides=strides, sr_ratios=sr_ratios)
        require_entries("NextViT", 3, stem_chs=stem_chs, ntb_dims=ntb_dims)
        require_entries("NextViT", 2, mlp_ratios=mlp_ratios)
        if not set(strides) <= {1, 2}:
            raise ValueError(f"NextViT: strides are 1 or 2, got {list(strides)}")
        common = dict(drop=proj_drop_rate, head_dim=head_dim)
        ncb = partial(NCB, mlp_ratio=mlp_ratios[0], **common)
        ntb = partial(NTB, mlp_ratio=mlp_ratios[1], mix=mix_block_ratio, attn_drop=attn_drop_rate, **common)
        stages = []
        for i, letters in enumerate(_letters(depths)):
            blocks = {
                "C": partial(ncb, dim=dims[i]),
                "T": partial(ntb, dim=ntb_dims[max(i - 1, 0)], sr_ratio=sr_ratios[i]),
            }
            first, *others = (blocks[letter] for letter in letters)
            stages.append(
                Stage(
                    blocks=(partial(first, stride=strides[i]), *others),
                    norm=BatchNorm2d if extra_norm and i < 3 else no_layer,
                    stride=strides[i],
                )
            )
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


def _letters(depths: Sequence[int]) -> tuple[str, str, str, str]:
    """The blocks of each stage in their order: C for convolution (NCB), T for transformer (NTB)."""
    if min(depths) < 1 or depths[2] % 5:
        raise ValueError(f"NextViT: depths must be positive, the third a multiple of 5, got {list(depths)}")
    return (
        "C" * depths[0],
        "C" * (depths[1] - 1) + "T",
        "CCCCT" * (depths[2] // 5),
        "C" * (depths[3] - 1) + "T",
    )
