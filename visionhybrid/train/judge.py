"""A classifier that says what a generated picture shows."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from visionhybrid.models import checkpoint


class Judge:
    """The classifier in a file or run directory, fed as its checkpoint says: no crop, whatever the size of the images.

    Raises: ValueError: nothing there that is a classifier.
    """

    def __init__(self, path: str | Path) -> None:
        self.model = checkpoint.load(path)
        cfg = self.model.pretrained_cfg
        self.channels, *self.size = cfg["input_size"]
        self.mean, self.std = (torch.tensor(cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> class numbers (B,), on the CPU."""
        return self.model(self._prepared(images)).argmax(1)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> what the classifier decides by, (B, D), on the CPU."""
        return self.model.forward_head(self.model.forward_features(self._prepared(images)), pre_logits=True)

    def _prepared(self, images: Tensor) -> Tensor:
        images = images.float().clamp(0, 1)
        if images.shape[1] != self.channels:
            grey = images.mean(1, keepdim=True)
            images = grey.expand(-1, self.channels, -1, -1)
        if list(images.shape[2:]) != list(self.size):
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return (images - self.mean) / self.std
