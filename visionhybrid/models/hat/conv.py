"""The convolution branch of HAT's blocks (CAB)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionhybrid.kernels.precision import wide, widened
from visionhybrid.kernels.window_attention.bands import suits


class ChannelAttentionConv(nn.Module):
    """A narrow pair of 3x3 convolutions, then a gate per channel from the image's mean. (B, C, H, W) -> same."""

    def __init__(self, dim: int, conv_dim: int, gate_dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, conv_dim, 3, padding=1, **dd)
        self.conv2 = nn.Conv2d(conv_dim, dim, 3, padding=1, **dd)
        self.fc1 = nn.Conv2d(dim, gate_dim, 1, **dd)
        self.fc2 = nn.Conv2d(gate_dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self._parts(x)
        return x * gate

    def onto(self, stream: Tensor, x: Tensor, scale: float) -> Tensor:
        """stream + scale * self(x), in new memory."""
        # float16 has no room for weights times `scale`.
        if suits(x) and x.dtype != torch.float16:
            return stream + self._folded(x, scale)
        x, gate = self._parts(x)
        return torch.addcmul(stream, x, gate.to(stream.dtype), value=scale)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map and its gate, (B, C, 1, 1), whose product is the result."""
        x = self.conv2(F.gelu(self.conv1(x)))
        mean = x.mean((2, 3), keepdim=True, dtype=widened(x)).to(x.dtype)
        return x, self.fc2(F.relu(self.fc1(mean))).sigmoid()

    def _folded(self, x: Tensor, scale: float) -> Tensor:
        """scale * self(x) in one pass: what a convolution has as its mean follows from sums of its input, so the gate is known
        before the second convolution and goes into the weights.
        """
        x = F.gelu(self.conv1(x))
        with torch.autocast("cpu", enabled=False):
            weight, bias = wide(self.conv2.weight), wide(self.conv2.bias)
            mean = F.linear(
                _sums_under_weights(wide(x)).flatten(1) / x[0, 0].numel(), weight.flatten(1), bias
            )
            mean = mean[:, :, None, None]
            for fc, act in ((self.fc1, F.relu), (self.fc2, torch.sigmoid)):
                mean = act(F.conv2d(mean, wide(fc.weight), wide(fc.bias)))
            maps = []
            for image, gate in zip(x.split(1), scale * mean, strict=True):
                w, b = (weight * gate[..., None]).to(x.dtype), (bias * gate.flatten()).to(x.dtype)
                maps.append(F.conv2d(image, w, b, padding=1))
        return maps[0] if len(maps) == 1 else torch.cat(maps)


def _sums_under_weights(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 3, 3): sums over the pixels that each weight of a 3x3 convolution with zero padding 1 meets."""
    rows = x.sum(3)
    columns = torch.stack([rows - x[..., -1], rows, rows - x[..., 0]], 3)
    whole = columns.sum(2)
    return torch.stack([whole - columns[:, :, -1], whole, whole - columns[:, :, 0]], 2)
