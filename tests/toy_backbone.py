"""A `Backbone` of toy blocks that uses each part of `Spec`."""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import LayerNorm2d
from torch import nn

from visionhybrid.models.backbone import Backbone, Spec, Stage


class Patches(nn.Conv2d):
    """A convolution over patches, as stem and to step down; it has a `dim`."""

    def __init__(self, dim_in, *, dim, side, **dd):
        super().__init__(dim_in, dim, side, side, **dd)
        self.dim = dim


class Grid(nn.Module):
    """A learnt gain per channel and, of the map's own rows, one number each."""

    no_decay = ("gain",)

    def __init__(self, dim, device=None, dtype=None):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(dim, 1, 1, device=device, dtype=dtype))
        self.register_buffer("step", torch.empty((), device=device, dtype=dtype), persistent=False)
        self.init_weights()

    def init_weights(self):
        nn.init.ones_(self.gain)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self):
        nn.init.constant_(self.step, 0.01)

    def forward(self, x):
        return torch.ones_like(x[:1, :1]).cumsum(2) * self.step * self.gain


class ToyBlock(nn.Module):
    def __init__(self, dim, *, drop_path, device=None, dtype=None):
        super().__init__()
        self.drop_path, self.fc, self.norm = (
            drop_path,
            nn.Conv2d(dim, dim, 1, device=device, dtype=dtype),
            nn.BatchNorm2d(dim, device=device, dtype=dtype),
        )

    def forward(self, x):
        return x + self.norm(self.fc(x)).relu()


class Placed(ToyBlock):
    def forward(self, x, position):
        return x + self.norm(self.fc(x + position)).relu()


def toy_backbone(depths=(1, 2, 1), dims=(8, 12, 16), head=None, **kwargs):
    stages = []
    for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        parts = dict(stride=2, downsample=partial(Patches, dim=dim, side=2)) if i else {}
        place = dict(blocks=(Placed,) * depth, position=Grid) if i == 1 else dict(blocks=(ToyBlock,) * depth)
        stages.append(Stage(norm=LayerNorm2d, **place, **parts))
    stem = partial(Patches, dim=dims[0], side=4)
    spec = Spec(stem=stem, stages=tuple(stages), norm=nn.BatchNorm2d, **(dict(head=head) if head else {}))
    return Backbone(spec, **kwargs)
