"""The convolution branch of HAT's blocks (CAB)."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionhybrid.kernels.precision import wide, widened
from visionhybrid.kernels.window_attention.bands import suits
from visionhybrid.models.hat.layers import conv_onto


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
            with torch.autocast("cpu", enabled=False):
                images = zip(stream.split(1), x.split(1), strict=True)
                sums = [self._folded(one, image, scale) for one, image in images]
                return sums[0] if len(sums) == 1 else torch.cat(sums)
        x, gate = self._parts(x)
        return torch.addcmul(stream, x, gate.to(stream.dtype), value=scale)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map and its gate, (B, C, 1, 1), whose product is the result."""
        x = self.conv2(F.gelu(self.conv1(x)))
        mean = x.mean((2, 3), keepdim=True, dtype=widened(x)).to(x.dtype)
        return x, self.fc2(F.relu(self.fc1(mean))).sigmoid()

    def _folded(self, stream: Tensor, x: Tensor, scale: float) -> Tensor:
        """`onto` of one image in one pass over the stream: the mean of a convolution follows from sums of its input, so the gate is
        known before the second convolution and goes into the weights.
        """
        hidden = F.gelu(self._hidden(x))
        weight, bias = wide(self.conv2.weight), wide(self.conv2.bias)
        mean = F.linear(_sums_under_weights(hidden).flatten(1) / x[0, 0].numel(), weight.flatten(1), bias)
        gate = F.relu(F.linear(mean, wide(self.fc1.weight).flatten(1), wide(self.fc1.bias)))
        gate = F.linear(gate, wide(self.fc2.weight).flatten(1), wide(self.fc2.bias)).sigmoid()[0] * scale
        weight, bias = (weight * gate[:, None, None, None]).to(x.dtype), (bias * gate).to(x.dtype)
        return conv_onto(stream, hidden.to(x.dtype, memory_format=torch.channels_last), weight, bias)

    def _hidden(self, x: Tensor) -> Tensor:
        """The first convolution of one image, in float32 or wider."""
        weight, bias = self.conv1.weight.to(x.dtype), wide(self.conv1.bias)
        C, H, W = x.shape[1:]
        if x.dtype != torch.bfloat16 or 9 * len(weight) > C:
            return wide(F.conv2d(x, weight, bias.to(x.dtype), padding=1))
        # Few channels leave a convolution's lanes idle; one product with all nine taps does not (in bfloat16 it takes 0.45 of the
        # time for 144 -> 6). Then its shifted planes are added.
        planes = torch.mm(weight.permute(2, 3, 0, 1).reshape(-1, C), x[0].flatten(1)).view(3, 3, -1, H, W)
        out = bias[:, None, None].expand(-1, H + 2, W + 2).contiguous()
        for row, column in product(range(3), range(3)):
            out[:, 2 - row :, 2 - column :][:, :H, :W] += planes[row, column]
        return out[None, :, 1:-1, 1:-1]


def _sums_under_weights(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 3, 3): sums over the pixels that each weight of a 3x3 convolution with zero padding 1 meets."""
    rows = x.sum(3)
    columns = torch.stack([rows - x[..., -1], rows, rows - x[..., 0]], 3)
    whole = columns.sum(2)
    return torch.stack([whole - columns[:, :, -1], whole, whole - columns[:, :, 0]], 2)
