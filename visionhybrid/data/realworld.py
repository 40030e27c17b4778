"""Training and validation pairs for blind restoration: the same four methods as the sets in `data.pairs`.

Source: arXiv:2107.10833; XPixelGroup/HAT@1638a9a hat/data/realesrgan_dataset.py, hat/models/realhat{mse,gan}_model.py.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from visionhybrid.data.crops import Orient, Sample, at_least, check_crop, draw_orientation, floating, oriented
from visionhybrid.data.degrade import SecondOrder, reflect_pad, trace, unsharp_mask
from visionhybrid.data.gallery import Folder, Gallery
from visionhybrid.data.resize import modcrop
from visionhybrid.data.seeds import mix

Truth = Literal["plain", "sharp", "both"]


class RealWorld:
    """Pairs for blind restoration: a large piece is degraded by `SecondOrder`, then both sides are cropped together.

    Args:
        gallery: the good pictures; smaller ones than the piece are extended by reflection.
        degradation: the plan's distribution.
        patch: side of "lq".
        truth: "plain" ground truth, "sharp" (unsharp-masked, HAT's MSE stage), or "both": "gt" plain and "sharp" besides
            (its GAN stage). The published GAN code sharpens the cropped truth again because of its pool of pairs; here
            the piece is sharpened once, before cropping, so the borders of the crop see their surroundings.
        piece: side of the degraded piece.
        orient: the published runs flip only.
    """

    def __init__(
        self,
        gallery: Gallery,
        degradation: SecondOrder | None = None,
        patch: int = 64,
        *,
        truth: Truth = "plain",
        piece: int = 400,
        orient: Orient = "flip",
    ) -> None:
        self.degradation = degradation or SecondOrder()
        self.gallery, self.patch, self.truth = gallery, patch, truth
        self.orient, self.piece = orient, piece
        check_crop(patch, self.scale, orient)
        if truth not in get_args(Truth):
            raise ValueError(f"RealWorld: no truth {truth!r}; have {', '.join(get_args(Truth))}")
        if piece % self.scale or piece < patch * self.scale:
            raise ValueError(
                f"RealWorld: piece {piece} must be a multiple of {self.scale}, at least {patch * self.scale}"
            )

    @property
    def scale(self) -> int:
        return self.degradation.scale

    def __len__(self) -> int:
        return len(self.gallery)

    def name(self, index: int) -> str:
        return self.gallery.name(index)

    def sample(self, index: int, seed: int) -> Sample:
        rng, side = random.Random(seed), self.piece
        truth = oriented(self.gallery.picture(index), draw_orientation(rng, self.orient))
        for axis in (1, 2):
            truth = reflect_pad(truth, 0, max(0, side - truth.shape[axis]), axis)
        top, left = (rng.randint(0, n - side) for n in truth.shape[1:])
        piece = floating(truth[:, top : top + side, left : left + side])
        pair = self._pair(piece, rng.getrandbits(63))
        top, left = (rng.randint(0, n - self.patch) for n in pair["lq"].shape[1:])
        return {key: self._cut(x, top, left, 1 if key == "lq" else self.scale) for key, x in pair.items()}

    def whole(self, index: int) -> Sample:
        """The whole picture, degraded with a seed that is the index."""
        truth = at_least(self.gallery.picture(index), self.scale, self.gallery.source(index))
        return self._pair(floating(modcrop(truth, self.scale)), mix("whole", index))

    def _pair(self, gt: Tensor, seed: int) -> Sample:
        lq, sharp = gt[None], None
        for step, lq in trace(gt[None], self.degradation.draw(seed, size=(gt.shape[1], gt.shape[2]))):
            sharp = lq if step.name == "sharpen" else sharp
        pair = {"lq": lq[0], "gt": gt}
        if self.truth != "plain":
            sharp = unsharp_mask(gt[None]) if sharp is None else sharp
            pair["gt" if self.truth == "sharp" else "sharp"] = sharp[0]
        return pair

    def _cut(self, x: Tensor, top: int, left: int, scale: int) -> Tensor:
        side = self.patch * scale
        return x[:, top * scale : top * scale + side, left * scale : left * scale + side].contiguous()


class RealWorldFolder(RealWorld):
    """`RealWorld` on the pictures of a folder. See `Folder` for names and cache."""

    def __init__(
        self,
        high: str | Path,
        degradation: SecondOrder | None = None,
        patch: int = 64,
        *,
        names: str | Path | None = None,
        cache: int = 0,
        truth: Truth = "plain",
        piece: int = 400,
        orient: Orient = "flip",
    ) -> None:
        super().__init__(
            Folder(high, names=names, cache=cache),
            degradation,
            patch,
            truth=truth,
            piece=piece,
            orient=orient,
        )
