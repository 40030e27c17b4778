"""Training a classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image, ImageDraw
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from visionhybrid.data.classification import LabelledImages, Mix, Source, open_splits
from visionhybrid.data.errors import CorruptSample
from visionhybrid.train import start
from visionhybrid.train.config import Classification, ConfigError
from visionhybrid.train.sampler import Sample, stack
from visionhybrid.train.task import Update, left_out, share, untold


class Classify(start.Released):
    """See `task.Task`. Metrics: top1 and top5 in percent, loss (cross entropy without smoothing)."""

    metric, higher_is_better = "top1", True

    def __init__(self, config: Classification) -> None:
        self.config = config
        data, augment = config.data, config.augment
        self.mode = {1: "L", 3: "RGB"}.get(len(augment.mean), "")
        if not self.mode or len(augment.std) != len(augment.mean):
            raise ValueError(
                f"augment.mean and augment.std need 1 or 3 values, got {augment.mean} and {augment.std}"
            )
        self.repeat = data.repeat
        sources = open_splits(data.dataset, data.root, data.train, data.held_out, data.class_map)
        train, held_out = sources
        _check_classes(train.classes, held_out.classes, data.num_classes, data.root or data.dataset)
        for source in sources:
            _check_labels(source, data.num_classes)
        self.train_set = LabelledImages(train, self._transform(True), self.mode)
        self.held_out = LabelledImages(held_out, self._transform(False), self.mode)
        self.mix = self._mix()
        if config.mesa and config.loop.ema_decay is None:
            raise ConfigError("mesa: needs averaged weights, set loop.ema_decay")
        self.notes: list[str] = []

    @property
    def interpolation(self) -> str:
        """Of evaluation, where nothing is random."""
        asked = self.config.augment.interpolation
        return "bicubic" if asked == "random" else asked

    def _transform(self, training: bool) -> Any:
        a, size = self.config.augment, self.config.data.image_size
        shape = (len(a.mean), size, size)
        common = dict(interpolation=a.interpolation, mean=a.mean, std=a.std)
        if not training:
            return create_transform(shape, **{**common, "interpolation": self.interpolation}, crop_pct=a.crop)
        try:
            return create_transform(
                shape,
                is_training=True,
                scale=a.scale,
                ratio=a.ratio,
                hflip=a.flip,
                color_jitter=a.color_jitter,
                auto_augment=a.policy,
                re_prob=a.erase,
                re_mode=a.erase_mode,
                re_count=a.erase_count,
                **common,
            )
        except (AssertionError, KeyError, ValueError) as error:  # timm checks the words of the policy only
            raise ConfigError(
                f"augment.policy: timm cannot read {a.policy!r}, as in 'rand-m9-mstd0.5-inc1'{error and f': {error}'}"
            ) from None

    def _mix(self) -> Mix | None:
        a = self.config.augment
        if not (a.mixup or a.cutmix):
            return None
        if self.config.loop.batch_size % 2:
            raise ValueError(f"loop.batch_size: mixup needs an even one, got {self.config.loop.batch_size}")
        return Mix(
            self.config.data.num_classes,
            mixup_alpha=a.mixup,
            cutmix_alpha=a.cutmix,
            prob=a.mix_prob,
            switch_prob=a.mix_switch,
            mode=a.mix_mode,
            label_smoothing=a.smoothing,
        )

    def parts(self) -> dict[str, nn.Module]:
        classes, channels = self.config.data.num_classes, len(self.mode)
        net = start.create(self.config.model, self.notes, num_classes=classes, in_chans=channels)
        return {"model": start.synchronised(net) if self.config.sync_batch_norm else net}

    def collate(self, samples: list[Sample], seed: int) -> Sample:
        batch = stack(samples)
        return batch if self.mix is None else self.mix(batch, seed)

    def consult(
        self, averaged: Callable[[], AbstractContextManager[nn.Module]], batch: Sample, epoch: float
    ) -> Sample:
        if not self.config.mesa or epoch < self.config.mesa_start:
            return batch
        with averaged() as model, torch.no_grad():
            return {**batch, "averaged": model(batch["image"]).float().softmax(1)}

    def loss(
        self, part: str, parts: Mapping[str, nn.Module], batch: Sample
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits, label = parts["model"](batch["image"]), batch["label"]
        loss = self.cross_entropy(logits, label)
        truth = label if label.ndim == 1 else label.argmax(1)
        logs = {"top1": 100 * (logits.argmax(1) == truth).float().mean()}
        if "averaged" in batch:
            logs["mesa"] = F.cross_entropy(logits.float(), batch["averaged"])
            loss = loss + self.config.mesa * logs["mesa"]
        return loss, logs

    def cross_entropy(self, logits: Tensor, label: Tensor) -> Tensor:
        """Mean over the batch. Labels are classes, or distributions where they are mixed: those are smoothed already."""
        smoothing = self.config.augment.smoothing if label.ndim == 1 else 0.0
        return F.cross_entropy(logits.float(), label, label_smoothing=smoothing)

    def validate(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        limit: int | None = None,
        update: Update = untold,
    ) -> dict[str, float]:
        batch, classes = self.config.eval_batch, self.config.data.num_classes
        chosen = share(len(self.held_out), accelerator)[: limit * batch if limit else None]
        views = DataLoader(_HeldOut(self.held_out, chosen), batch, num_workers=self.config.loop.workers)
        sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
        unreadable = 0
        for number, (image, label, weight) in enumerate(views):
            update(number / len(views))
            logits = model(image.to(accelerator.device)).double()
            if logits.shape[1:] != (classes,):
                raise ValueError(
                    f"validate: the data have {classes} classes, the model makes {tuple(logits.shape[1:])} of an image"
                )
            unreadable += int((label < 0).sum())
            label, weight = label.clamp(min=0).to(logits.device), weight.to(logits.device)
            best = logits.topk(min(5, logits.shape[1]), 1).indices == label[:, None]
            # a NaN has no place in a ranking
            hits = best & logits.isfinite().all(1, keepdim=True)
            loss = F.cross_entropy(logits, label, reduction="none")
            sums += torch.stack([hits[:, 0] * weight, hits.any(1) * weight, loss * weight, weight]).sum(1)
        top1, top5, loss, count = accelerator.reduce(
            sums.float() if sums.device.type == "mps" else sums, "sum"
        ).tolist()
        if not count:
            raise ValueError("no held-out image could be read")
        if unreadable:
            self.notes.append(left_out(unreadable, len(chosen)))
        return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}

    def samples(self, model: nn.Module, folder: Path) -> list[Path]:
        """One sheet of held-out images with the true and the predicted class; wrong ones framed in red."""
        count = min(40, len(self.held_out))
        chosen = torch.linspace(0, len(self.held_out) - 1, count).long().tolist()
        view = [s for i in chosen if (s := _HeldOut(self.held_out, [(i, 1.0)])[0])[2]]
        images = torch.stack([image for image, _, _ in view])
        device = next(model.parameters()).device
        guesses = model(images.to(device)).argmax(1).tolist()
        truths = [int(label) for _, label, _ in view]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "held_out.png"
        self._sheet(images, truths, guesses).save(path)
        return [path]

    def _sheet(self, images: Tensor, truths: list[int], guesses: list[int]) -> Image.Image:
        side, columns, text = 96, 8, 14
        rows = -(-len(images) // columns)
        sheet = Image.new("RGB", (columns * side, rows * (side + text)), "white")
        draw = ImageDraw.Draw(sheet)
        a = self.config.augment
        mean, std = torch.tensor(a.mean).view(-1, 1, 1), torch.tensor(a.std).view(-1, 1, 1)
        for i, (image, truth, guess) in enumerate(zip(images, truths, guesses, strict=True)):
            pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
            x, y = i % columns * side, i // columns * (side + text)
            tile = Image.fromarray(pixels.expand(-1, -1, 3).contiguous().numpy()).resize((side - 4, side - 4))
            draw.rectangle((x, y, x + side - 1, y + side - 1), fill="white" if truth == guess else "red")
            sheet.paste(tile, (x + 2, y + 2))
            draw.text((x + 2, y + side), self._caption(truth, guess), fill="black")
        return sheet

    def _caption(self, truth: int, guess: int) -> str:
        names = self.train_set.classes or tuple(map(str, range(self.config.data.num_classes)))
        return names[truth][:14] if truth == guess else f"{names[truth][:6]} as {names[guess][:6]}"

    def metadata(self) -> dict[str, Any]:
        data, a = self.config.data, self.config.augment
        names = list(self.train_set.classes) or [str(i) for i in range(data.num_classes)]
        evaluation = {"input_size": [len(a.mean), data.image_size, data.image_size], "crop_pct": a.crop}
        evaluation |= {"mean": list(a.mean), "std": list(a.std), "interpolation": self.interpolation}
        return {"task": "classification", "classes": names, "pretrained_cfg": evaluation}


class _HeldOut(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Chosen held-out images with their labels and weights; an unreadable one gets label -1 and weight 0."""

    def __init__(self, images: LabelledImages, chosen: list[tuple[int, float]]) -> None:
        self.images, self.chosen = images, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor, Tensor]:
        index, weight = self.chosen[place]
        try:
            sample = self.images.sample(index, 0)
        except CorruptSample:
            blank = Image.new(self.images.mode, (8, 8))
            return self.images.transform(blank), torch.tensor(-1), torch.tensor(0.0)
        return sample["image"], sample["label"], torch.tensor(weight)


def _check_classes(train: Any, held_out: Any, expected: int, where: str) -> None:
    if train and len(train) != expected:
        raise ValueError(
            f"data.num_classes is {expected}, but {where} has {len(train)} classes in its training split"
        )
    if train and held_out and tuple(train) != tuple(held_out):
        odd = sorted(set(train) ^ set(held_out))
        raise ValueError(f"data: training and held-out classes of {where} differ, first in {odd[0]!r}")


def _check_labels(source: Source, classes: int) -> None:
    """Labels of sources that do not know their classes."""
    labels = source.labels()
    if labels and max(labels) >= classes:
        raise ValueError(
            f"data.num_classes is {classes}, but {source.place} has label {max(labels)} (the first one is 0)"
        )
