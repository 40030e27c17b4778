"""Training and validation pairs for restoration: "lq" is given to the network, "gt" is what it should say.

Every set has

    len(pairs)                  pictures
    pairs.sample(index, seed)   {"lq": (C, p, p), "gt": (C, p*scale, p*scale)}: a random crop, randomly oriented
    pairs.whole(index)          the whole picture, cropped to a multiple of the scale, always the same
    pairs.name(index)           what to call it

with float32 tensors in [0, 1]. Every random decision of `sample` comes from `seed` alone, whatever process asks and
whatever was asked before. `patch` is the side of the low-quality crop. A picture that cannot be used raises
`CorruptSample`; a set that cannot work raises ValueError when it is made. Blind restoration has its own sets with the
same four methods, in `data.realworld`.

Source: XPixelGroup/HAT@1638a9a hat/data/{imagenet_paired,realesrgan}_dataset.py for crops, enlarging and orientations.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from visionhybrid.data.crops import Orient, Sample, at_least, check_crop, draw_orientation, floating, oriented
from visionhybrid.data.degrade import Bicubic, Jpeg, Noise, apply
from visionhybrid.data.errors import CorruptSample
from visionhybrid.data.gallery import Folder, Gallery, Samples
from visionhybrid.data.resize import modcrop
from visionhybrid.data.scan import find_pictures, match_pairs
from visionhybrid.data.seeds import mix

Local = Bicubic | Noise | Jpeg


class Degraded:
    """Pairs made on the fly from good pictures by a local degradation (bicubic, noise, JPEG).

    With bicubic, the low-quality crop equals that crop of the whole picture reduced: at its borders the kernel sees the
    picture around it. JPEG compresses the crop itself, so that its blocks start at the corner, as in a file.

    Args:
        gallery: the good pictures.
        degradation: what to do to them; its `scale` is the scale of the pairs.
        patch: side of "lq" in `sample`.
        orient: "all" 8 orientations, "flip" (horizontal only) or "none", equally likely. Applied before degrading.
        enlarge: stretch pictures smaller than the crop, each side by itself, bilinearly (as HAT's ImageNet
            pre-training does); otherwise such a picture is a CorruptSample.
    """

    def __init__(
        self,
        gallery: Gallery,
        degradation: Local,
        patch: int = 64,
        *,
        orient: Orient = "all",
        enlarge: bool = False,
    ) -> None:
        if not isinstance(degradation, Local):
            raise ValueError(
                f"Degraded: needs Bicubic, Noise or Jpeg, got {degradation!r}; see RealWorld for SecondOrder"
            )
        check_crop(patch, degradation.scale, orient)
        self.gallery, self.degradation, self.patch = gallery, degradation, patch
        self.orient, self.enlarge = orient, enlarge

    @property
    def scale(self) -> int:
        return self.degradation.scale

    def __len__(self) -> int:
        return len(self.gallery)

    def name(self, index: int) -> str:
        return self.gallery.name(index)

    def sample(self, index: int, seed: int) -> Sample:
        rng, scale = random.Random(seed), self.scale
        truth = at_least(self.gallery.picture(index), scale, self.gallery.source(index))
        truth = modcrop(truth, scale)
        side = self.patch * scale
        if min(truth.shape[1:]) < side:
            truth = self._stretch(truth, side, index)
        truth = oriented(truth, draw_orientation(rng, self.orient))
        height, width = (n // scale for n in truth.shape[1:])
        top, left = rng.randint(0, height - self.patch), rng.randint(0, width - self.patch)
        margin = self.degradation.margin
        above, before = min(top, margin), min(left, margin)
        rows = slice((top - above) * scale, (top + self.patch + margin) * scale)
        columns = slice((left - before) * scale, (left + self.patch + margin) * scale)
        window = floating(truth[:, rows, columns])
        lq = self._degrade(window, rng.getrandbits(63), self.degradation)
        return {
            "lq": lq[:, above : above + self.patch, before : before + self.patch].contiguous(),
            "gt": window[:, above * scale :, before * scale :][:, :side, :side].contiguous(),
        }

    def whole(self, index: int) -> Sample:
        """As the benchmarks have it: the bicubic picture in 8 bits; other degradations with a seed that is the index."""
        truth = at_least(self.gallery.picture(index), self.scale, self.gallery.source(index))
        gt = floating(modcrop(truth, self.scale))
        degradation = self.degradation
        if isinstance(degradation, Bicubic) and truth.dtype == torch.uint8:
            degradation = replace(degradation, eight_bit=True)
        return {"lq": self._degrade(gt, mix("whole", index), degradation), "gt": gt}

    def _degrade(self, gt: Tensor, seed: int, degradation: Local) -> Tensor:
        plan = degradation.draw(seed, size=(gt.shape[1], gt.shape[2]))
        return apply(gt[None], plan)[0]

    def _stretch(self, truth: Tensor, side: int, index: int) -> Tensor:
        height, width = truth.shape[1:]
        if not self.enlarge:
            raise CorruptSample(
                self.gallery.source(index),
                f"{width}x{height} is smaller than the crop, {side}x{side}; enlarge stretches such",
            )
        size = (max(height, side), max(width, side))
        return F.interpolate(floating(truth)[None], size, mode="bilinear", align_corners=False)[0]


class DegradedFolder(Degraded):
    """`Degraded` on the pictures of a folder: `DegradedFolder("DF2K", Bicubic(4))`. See `Folder` for names and cache."""

    def __init__(
        self,
        high: str | Path,
        degradation: Local,
        patch: int = 64,
        *,
        names: str | Path | None = None,
        channels: int = 3,
        cache: int = 0,
        orient: Orient = "all",
        enlarge: bool = False,
    ) -> None:
        folder = Folder(high, names=names, channels=channels, cache=cache)
        super().__init__(folder, degradation, patch, orient=orient, enlarge=enlarge)


class Photographs(Degraded):
    """`Degraded` on the sample photographs: 18 to train on ("train"), 4 held out ("val"); see `data.samples`."""

    def __init__(
        self,
        scale: int = 2,
        patch: int = 64,
        split: str = "train",
        *,
        degradation: Local | None = None,
        channels: int = 3,
        orient: Orient = "all",
    ) -> None:
        if degradation is not None and degradation.scale != scale:
            raise ValueError(f"Photographs: the degradation has scale {degradation.scale}, not {scale}")
        # Some are smaller than a large crop; they are all wanted.
        super().__init__(
            Samples(split, channels=channels),
            degradation or Bicubic(scale),
            patch,
            orient=orient,
            enlarge=True,
        )


class PairedFolder:
    """Pairs read from two folders whose files match by folder and stem (see `match_pairs`).

    Args:
        low, high: folders of low-quality pictures and of their ground truth.
        scale: ground truth / low quality, per side. A ground truth up to scale - 1 pixels larger is cropped, at the
            right and the bottom; any other size is a CorruptSample.
        patch: side of "lq" in `sample`.
        names: list of pictures of `high` to use, in a file.
        channels, cache, orient: see `Folder` and `Degraded`. Half of the cache goes to either side.
    """

    def __init__(
        self,
        low: str | Path,
        high: str | Path,
        scale: int,
        patch: int = 64,
        *,
        names: str | Path | None = None,
        channels: int = 3,
        cache: int = 0,
        orient: Orient = "all",
    ) -> None:
        check_crop(patch, scale, orient)
        self.scale, self.patch, self.orient = scale, patch, orient
        self.high = Folder(high, names=names, channels=channels, cache=cache // 2)
        self.low = Folder(low, channels=channels, cache=cache // 2)
        self.low.files = [partner for _, partner in match_pairs(self.high.files, find_pictures(low), scale)]

    def __len__(self) -> int:
        return len(self.high)

    def name(self, index: int) -> str:
        return self.high.name(index)

    def sample(self, index: int, seed: int) -> Sample:
        rng = random.Random(seed)
        lq, gt = self._pair(index)
        height, width = lq.shape[1:]
        if min(height, width) < self.patch:
            raise CorruptSample(
                self.low.source(index), f"{width}x{height} is smaller than the patch, {self.patch}"
            )
        turn = draw_orientation(rng, self.orient)
        top, left = rng.randint(0, height - self.patch), rng.randint(0, width - self.patch)
        lq = lq[:, top : top + self.patch, left : left + self.patch]
        top, left, side = top * self.scale, left * self.scale, self.patch * self.scale
        gt = gt[:, top : top + side, left : left + side]
        return {"lq": floating(oriented(lq, turn)), "gt": floating(oriented(gt, turn))}

    def whole(self, index: int) -> Sample:
        lq, gt = self._pair(index)
        return {"lq": floating(lq), "gt": floating(gt)}

    def _pair(self, index: int) -> tuple[Tensor, Tensor]:
        lq, gt = self.low.picture(index), self.high.picture(index)
        wanted = [n * self.scale for n in lq.shape[1:]]
        if any(not 0 <= n - want < self.scale for n, want in zip(gt.shape[1:], wanted, strict=True)):
            (h, w), (truth_h, truth_w) = lq.shape[1:], gt.shape[1:]
            raise CorruptSample(
                self.high.source(index),
                f"{truth_w}x{truth_h} is not {self.scale} times its partner's {w}x{h}",
            )
        return lq, gt[:, : wanted[0], : wanted[1]]
