"""Training a restorer: super-resolution, denoising, JPEG repair, blind restoration by a pixel loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw
from torch import Tensor, nn

from visionhybrid.data import pairs, realworld
from visionhybrid.data.degrade import Bicubic, Jpeg, Noise
from visionhybrid.data.errors import CorruptSample
from visionhybrid.data.metrics import psnr, ssim
from visionhybrid.data.resize import imresize
from visionhybrid.infer.restoration import restore
from visionhybrid.train import start
from visionhybrid.train.config import ConfigError, Pictures, Restoration
from visionhybrid.train.losses import PIXEL_LOSSES
from visionhybrid.train.sampler import Sample, stack
from visionhybrid.train.task import Update, share, untold

SHEETS = 4  # pictures drawn at each validation
SHEET_SIDE = 192  # pixels of the ground truth shown


class Pairs(Protocol):
    """What `data.pairs` and `data.realworld` offer."""

    def __len__(self) -> int: ...
    def sample(self, index: int, seed: int) -> Sample: ...
    def whole(self, index: int) -> Sample: ...
    def name(self, index: int) -> str: ...


class Restore(start.Released):
    """See `task.Task`. Metrics over whole held-out pictures: psnr, ssim, and psnr_bicubic where the scale is above 1."""

    metric, higher_is_better = "psnr", True

    def __init__(self, config: Restoration) -> None:
        self.config = config
        data = config.data
        self.repeat = data.repeat
        self.train_set: Pairs = _training(data)
        self.held_out: Pairs | None = _held_out(data)
        self.notes: list[str] = []
        self._bicubic: dict[int, float] = {}

    def parts(self) -> dict[str, nn.Module]:
        model, data = self.config.model, self.config.data
        given = {} if data.channels == 3 else {"in_chans": data.channels}
        net = start.create(model, self.notes, **given)
        if getattr(net, "scale", None) != data.scale:
            raise ConfigError(
                f"data.scale is {data.scale}, but {model.name} has scale {getattr(net, 'scale', 'none')}"
            )
        return {"model": net}

    def collate(self, samples: list[Sample], seed: int) -> Sample:
        return stack(samples)

    def loss(
        self, part: str, parts: Mapping[str, nn.Module], batch: Sample
    ) -> tuple[Tensor, dict[str, Tensor]]:
        output = parts["model"](batch["lq"])
        return PIXEL_LOSSES[self.config.loss](output, batch["gt"]), {}

    def validate(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        limit: int | None = None,
        update: Update = untold,
    ) -> dict[str, float]:
        if self.held_out is None:
            return {}
        sums = torch.zeros(4, dtype=torch.float64)
        chosen = share(min(limit or len(self.held_out), len(self.held_out)), accelerator)
        for number, (index, weight) in enumerate(chosen):
            update(number / len(chosen))
            try:
                pair = self._whole(index)
            except CorruptSample as error:
                self.notes.append(f"held-out picture left out: {error}")
                continue
            output = restore(model, pair["lq"], tile=self.config.tile, progress=False)
            if output.shape != pair["gt"].shape:
                raise ValueError(
                    f"validate: the data are at x{self.config.data.scale}, the model made {tuple(output.shape)} "
                    f"of {tuple(pair['lq'].shape)}"
                )
            scored = [self._psnr(output, pair), self._ssim(output, pair), self._of_bicubic(index, pair)]
            sums += torch.tensor([*scored, 1.0]) * weight
        sums = accelerator.reduce(sums.float().to(accelerator.device), "sum").cpu()
        if not sums[3]:
            raise ValueError("no held-out picture could be read")
        names = ("psnr", "ssim", "psnr_bicubic")[: 3 if self.config.data.scale > 1 else 2]
        return dict(zip(names, (sums / sums[3]).tolist(), strict=False))

    def _whole(self, index: int) -> Sample:
        assert self.held_out is not None
        pair, side, scale = self.held_out.whole(index), self.config.data.held_out_crop, self.config.data.scale
        if side is None:
            return pair
        lq = pair["lq"]
        top, left = (max(0, (n - side) // 2) for n in lq.shape[1:])
        rows, columns = slice(top * scale, (top + side) * scale), slice(left * scale, (left + side) * scale)
        return {"lq": lq[:, top : top + side, left : left + side], "gt": pair["gt"][:, rows, columns]}

    def _psnr(self, output: Tensor, pair: Sample) -> float:
        border = self.config.data.scale if self.config.data.scale > 1 else 0
        return float(psnr(output, pair["gt"], crop_border=border, space=self.config.space))

    def _ssim(self, output: Tensor, pair: Sample) -> float:
        border = self.config.data.scale if self.config.data.scale > 1 else 0
        return float(ssim(output, pair["gt"], crop_border=border, space=self.config.space))

    def _of_bicubic(self, index: int, pair: Sample) -> float:
        if self.config.data.scale == 1:
            return 0.0
        if index not in self._bicubic:
            self._bicubic[index] = self._psnr(self._enlarged(pair["lq"]), pair)
        return self._bicubic[index]

    def _enlarged(self, lq: Tensor) -> Tensor:
        return imresize(lq, self.config.data.scale).clamp(0, 1)

    def samples(self, model: nn.Module, folder: Path) -> list[Path]:
        """One sheet for each of the first held-out pictures: bicubic (or the input), output, truth."""
        written = []
        for index in range(min(SHEETS, len(self.held_out or ()))):
            assert self.held_out is not None
            try:
                pair = self._shown(index)
            except CorruptSample:
                continue
            output = restore(model, pair["lq"], progress=False)
            first = self._enlarged(pair["lq"])
            columns = {"bicubic" if self.config.data.scale > 1 else "input": first, "output": output}
            scores = {name: f"{name} {self._psnr(image, pair):.2f} dB" for name, image in columns.items()}
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{self.held_out.name(index).replace('/', '_')}.png"
            _sheet([*columns.values(), pair["gt"]], [*scores.values(), "truth"]).save(path)
            written.append(path)
        return written

    def _shown(self, index: int) -> Sample:
        """The central part of a held-out picture."""
        pair, scale = self._whole(index), self.config.data.scale
        side = SHEET_SIDE // scale
        top, left = (max(0, (n - side) // 2) for n in pair["lq"].shape[1:])
        rows, columns = slice(top * scale, (top + side) * scale), slice(left * scale, (left + side) * scale)
        return {
            "lq": pair["lq"][:, top : top + side, left : left + side],
            "gt": pair["gt"][:, rows, columns],
        }

    def metadata(self) -> dict[str, Any]:
        data = self.config.data
        return {"task": "restoration", "scale": data.scale, "degradation": data.degradation}


def _sheet(images: list[Tensor], captions: list[str]) -> Image.Image:
    height, width = images[-1].shape[1:]
    sheet = Image.new("RGB", (len(images) * (width + 4), height + 16), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        sheet.paste(Image.fromarray(pixels.expand(-1, -1, 3).contiguous().numpy()), (i * (width + 4), 16))
        draw.text((i * (width + 4) + 2, 2), caption, fill="black")
    return sheet


def _degradation(data: Pictures) -> Any:
    if data.degradation == "bicubic":
        return Bicubic(data.scale)
    if data.scale != 1:
        raise ConfigError(f"data.scale: {data.degradation} keeps the size (scale 1), got {data.scale}")
    if data.degradation == "noise":
        if len(data.strength) not in (1, 2):
            raise ConfigError(f"data.strength: noise needs a sigma or a range of two, got {data.strength}")
        return Noise(data.strength[0] if len(data.strength) == 1 else (data.strength[0], data.strength[1]))
    return Jpeg(tuple(int(q) for q in data.strength) or Jpeg().quality)


def _training(data: Pictures) -> Pairs:
    shared = dict(channels=data.channels, orient=data.orient)
    stored = dict(names=data.names or None, cache=data.cache_mb * 2**20)
    if data.source == "samples":
        return pairs.Photographs(data.scale, data.patch, "train", degradation=_degradation(data), **shared)
    _named("data.high", data.high)
    if data.source == "pairs":
        _named("data.low", data.low)
        return pairs.PairedFolder(data.low, data.high, data.scale, data.patch, **stored, **shared)
    if data.degradation == "second_order":
        if data.scale != 4:
            raise ConfigError(f"data.scale: second_order is made for x4, got x{data.scale}")
        return realworld.RealWorldFolder(
            data.high, patch=data.patch, truth=data.truth, orient=data.orient, **stored
        )
    return pairs.DegradedFolder(
        data.high, _degradation(data), data.patch, enlarge=data.enlarge, **stored, **shared
    )


def _held_out(data: Pictures) -> Pairs | None:
    if data.source == "samples":
        return pairs.Photographs(
            data.scale, data.patch, "val", degradation=_degradation(data), channels=data.channels
        )
    if not data.held_out_high:
        return None
    if data.held_out_low:
        return pairs.PairedFolder(
            data.held_out_low, data.held_out_high, data.scale, data.patch, channels=data.channels
        )
    if data.degradation == "second_order":
        return realworld.RealWorldFolder(data.held_out_high, patch=data.patch)
    return pairs.DegradedFolder(data.held_out_high, _degradation(data), data.patch, channels=data.channels)


def _named(field: str, folder: str) -> None:
    if not folder:
        raise ConfigError(f"{field}: name a folder, as in {field}=/data/DF2K/HR")
