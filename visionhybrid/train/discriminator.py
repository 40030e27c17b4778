"""The U-Net discriminator of Real-ESRGAN (arXiv:2107.10833), used by HAT's real-world stage.

Keys are those of the published discriminators (`net_d_*.pth` of Real-ESRGAN and HAT load strictly), which is why the older
form of spectral normalisation is used.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm


class UNetDiscriminator(nn.Module):
    """A logit for every pixel: (B, C, H, W) -> (B, 1, H, W); H and W multiples of 8.

    Three strided convolutions down, three up after bilinear enlarging, each joined by addition to its equal on the way down.
    """

    def __init__(self, in_chans: int = 3, width: int = 64) -> None:
        super().__init__()
        w = width
        self.conv0 = nn.Conv2d(in_chans, w, 3, padding=1)
        self.conv1 = _normed(w, 2 * w, 4, stride=2)
        self.conv2 = _normed(2 * w, 4 * w, 4, stride=2)
        self.conv3 = _normed(4 * w, 8 * w, 4, stride=2)
        self.conv4 = _normed(8 * w, 4 * w, 3)
        self.conv5 = _normed(4 * w, 2 * w, 3)
        self.conv6 = _normed(2 * w, w, 3)
        self.conv7 = _normed(w, w, 3)
        self.conv8 = _normed(w, w, 3)
        self.conv9 = nn.Conv2d(w, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] % 8 or x.shape[-1] % 8:
            raise ValueError(f"UNetDiscriminator: sides must be multiples of 8, got {tuple(x.shape[-2:])}")
        skips = [_act(self.conv0(x))]
        for down in (self.conv1, self.conv2):
            skips.append(_act(down(skips[-1])))
        x = _act(self.conv3(skips[-1]))
        for up in (self.conv4, self.conv5, self.conv6):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = _act(up(x)) + skips.pop()
        return self.conv9(_act(self.conv8(_act(self.conv7(x)))))


def _normed(given: int, width: int, kernel: int, stride: int = 1) -> nn.Module:
    return spectral_norm(nn.Conv2d(given, width, kernel, stride, padding=1, bias=False))


def _act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)
