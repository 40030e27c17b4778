"""Perceptual loss: L1 between the features that VGG19 computes of two images.

Features are taken before the ReLU after conv1_2, conv2_2, conv3_4, conv4_4 and conv5_4, as in ESRGAN (arXiv:1809.00219) and
HAT's real-world stage. The weights (torchvision's ImageNet VGG19, `vgg19-dcbb9e9d.pth`) are read from a file, never fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionhybrid.models.checkpoint import containers, files

FILE = "vgg19-dcbb9e9d.pth"
URL = f"https://download.pytorch.org/models/{FILE}"
# Convolutions of each of VGG19's five sections; a max pooling by 2 stands between them.
SECTIONS = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)
# Of the last convolution of each section.
WEIGHTS = (0.1, 0.1, 1.0, 1.0, 1.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Perceptual(nn.Module):
    """sum_i WEIGHTS[i] * mean |f_i(output) - f_i(truth)| for (B, 3, H, W) in [0, 1], H and W at least 16.

    Args:
        state: torchvision's state dict of VGG19, or its `features.*` part.
    Raises: ValueError: a tensor is missing or has another shape.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.sections = nn.ModuleList()
        # place: index in torchvision's `features`, where conv, ReLU and pooling take one each
        given, place = 3, 0
        for widths in SECTIONS:
            section = nn.ModuleList()
            for width in widths:
                section.append(_convolution(state, f"features.{place}", given, width))
                given, place = width, place + 2
            self.sections.append(section)
            place += 1
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, output: Tensor, truth: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(truth)
        pairs = zip(WEIGHTS, self.features(output), wanted, strict=True)
        return torch.stack([weight * F.l1_loss(a, b) for weight, a, b in pairs]).sum()

    def features(self, x: Tensor) -> list[Tensor]:
        """The output of the last convolution of each section."""
        x = (x.float() - self.mean) / self.std
        taken = []
        for section in self.sections:
            x = F.max_pool2d(x, 2) if taken else x
            *inner, last = section.children()
            for conv in inner:
                x = F.relu(conv(x))
            taken.append(last(x))
            x = F.relu(taken[-1])
        return taken


def load(path: str | Path = "") -> Perceptual:
    """The loss with the weights in the file `path`, by default the one in torch's hub cache.

    Raises: ValueError: there is no such file (says where to get it), or it holds other weights.
    """
    path = Path(path) if path else Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if not path.is_file():
        raise ValueError(f"perceptual loss: {path} does not exist; get {URL} and name it with vgg=FILE")
    return Perceptual(containers.unwrap(files.read(path).content).state)


def _convolution(state: Mapping[str, Tensor], name: str, given: int, width: int) -> nn.Conv2d:
    conv = nn.Conv2d(given, width, 3, padding=1, device="meta").to_empty(device="cpu")
    for leaf, parameter in conv.named_parameters():
        key = f"{name}.{leaf}"
        if key not in state or state[key].shape != parameter.shape:
            found = tuple(state[key].shape) if key in state else "nothing"
            raise ValueError(
                f"perceptual loss: VGG19's {key} must be {tuple(parameter.shape)}, found {found}"
            )
        with torch.no_grad():
            parameter.copy_(state[key])
    return conv
