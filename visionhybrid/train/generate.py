"""Training a generator: class-conditional or unconditional images by diffusion or flow matching."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from visionhybrid.data.classification import LabelledImages, open_source
from visionhybrid.data.errors import CorruptSample
from visionhybrid.data.seeds import mix
from visionhybrid.diffusion import HybridDiT, HybridDiTPipeline
from visionhybrid.diffusion.drawing import sheet
from visionhybrid.train import state
from visionhybrid.train.config import ConfigError, Generation
from visionhybrid.train.distill import Inputs
from visionhybrid.train.judge import Judge
from visionhybrid.train.noising import Noising, noising, squared_errors
from visionhybrid.train.sampler import Sample, stack
from visionhybrid.train.task import share


@dataclass(frozen=True)
class Exercise:
    """`model(*args, **kwargs)[0]` should be `target`; each image counts with its weight."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor  # (B, ...)
    weight: Tensor  # (B,)

    def errors(self, output: Tensor) -> Tensor:
        """(B,). A variance that a model predicts besides, in further channels, is not looked at."""
        return squared_errors(output[:, : self.target.shape[1]], self.target, self.weight)

    def loss(self, output: Tensor) -> Tensor:
        return self.errors(output).mean()


class Generate:
    """See `task.Task`. Metrics: loss on held-out images with fixed times and noise; with a judge, recognised, in percent."""

    repeat = 1
    released = "pipeline"  # a diffusers folder: `HybridDiTPipeline.from_pretrained`

    def __init__(self, config: Generation) -> None:
        self.config = config
        for name, value in {"model.pipeline": config.model.pipeline, "latent.vae": config.latent.vae}.items():
            if value:
                raise ConfigError(f"{name}: not here yet")
        data = config.data
        self.mode = {1: "L", 3: "RGB"}[config.channels]
        self.repeat = data.repeat
        self.noising = noising(config.diffusion)
        train = open_source(data.dataset, data.root, data.train, data.class_map)
        held_out = open_source(data.dataset, data.root, data.held_out, data.class_map)
        if train.classes and data.num_classes not in (0, len(train.classes)):
            raise ConfigError(
                f"data.num_classes is {data.num_classes}, but there are {len(train.classes)} classes "
                "(0: train without them)"
            )
        images = LabelledImages(train, self._transform(config.flip), self.mode)
        self.train_set = Noised(images, self.noising, config.diffusion.drop_label, data.num_classes)
        self.held_out = LabelledImages(held_out, self._transform(0.0), self.mode)
        self.judge = Judge(config.sampling.judge) if config.sampling.judge else None
        self.metric = "recognised" if self.judge else "loss"
        self.higher_is_better = self.judge is not None
        self.notes: list[str] = []

    def _transform(self, flip: float) -> Any:
        size = self.config.data.image_size
        steps = [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.RandomHorizontalFlip(flip),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * self.config.channels, [0.5] * self.config.channels),
        ]
        return transforms.Compose(steps)

    def parts(self) -> dict[str, nn.Module]:
        model, data = self.config.model, self.config.data
        if model.name != "hybrid_dit":
            raise ConfigError(f"model.name: a generator is 'hybrid_dit', got {model.name!r}")
        given = dict(
            sample_size=data.image_size, in_channels=self.config.channels, num_classes=data.num_classes
        )
        try:
            net = HybridDiT(**{**given, **model.options})
        except TypeError as error:
            raise ConfigError(f"model.options: {error}") from None
        if net.out_channels != net.config.in_channels:
            raise ConfigError("model.options.out_channels: a predicted variance cannot be trained here")
        if model.start:
            net.load_state_dict(self.open(model.start).state_dict(), strict=model.start_strict)
            self.notes.append(f"started from {model.start}")
        return {"model": net}

    def collate(self, samples: list[Sample], seed: int) -> Sample:
        return stack(samples)

    def loss(
        self, part: str, parts: Mapping[str, nn.Module], batch: Sample
    ) -> tuple[Tensor, dict[str, Tensor]]:
        asked = self.exercise(batch)
        return asked.loss(parts["model"](*asked.args, **asked.kwargs)[0]), {}

    def exercise(self, batch: Sample) -> Exercise:
        """What the model is asked about a batch, in training or of held-out images."""
        image, noise, times = batch["image"], batch["noise"], batch["time"]
        return Exercise(
            args=(self.noising.noised(image, noise, times), times, self._labels(batch["label"])),
            kwargs={"return_dict": False},
            target=self.noising.target(image, noise, times),
            weight=self.noising.weight(times),
        )

    def _labels(self, label: Tensor) -> Tensor | None:
        return label if self.config.data.num_classes else None

    def validate(
        self, model: nn.Module, accelerator: Accelerator, limit: int | None = None
    ) -> dict[str, float]:
        found = {"loss": self._held_out_loss(model, accelerator, limit)}
        if self.judge is not None:
            found["recognised"] = self._recognised(model, accelerator, limit)
        return found

    def _held_out_loss(self, model: nn.Module, accelerator: Accelerator, limit: int | None) -> float:
        batch, device = self.config.eval_batch, accelerator.device
        chosen = share(len(self.held_out), accelerator)[: limit * batch if limit else None]
        # neighbours, often of one class, get times far apart
        times = self.noising.spread(97)[torch.arange(len(self.held_out)) * 31 % 97]
        sums = torch.zeros(2, dtype=torch.float64)
        for first in range(0, len(chosen), batch):
            part = chosen[first : first + batch]
            rows = [self._held_out_sample(index, times[index]) for index, _ in part]
            readable = torch.tensor(
                [weight * (row is not None) for row, (_, weight) in zip(rows, part, strict=True)]
            )
            asked = self.exercise(self._together(rows, device))
            each = asked.errors(model(*asked.args, **asked.kwargs)[0]).cpu()
            sums += torch.stack([(each * readable).sum(), readable.sum()]).double()
        sums = accelerator.reduce(sums.float().to(device), "sum").cpu()
        return float(sums[0] / sums[1])

    def held_out_inputs(self, device: torch.device, count: int = 64) -> Inputs:
        """The model's arguments for noised held-out images, spread over the data and the times: always the same."""
        count = min(count, len(self.held_out))
        places = torch.linspace(0, len(self.held_out) - 1, count).long().tolist()
        times = self.noising.spread(count)
        rows = [self._held_out_sample(index, time) for index, time in zip(places, times, strict=True)]
        asked = self.exercise(self._together(rows, device))
        return asked.args, asked.kwargs

    def _held_out_sample(self, index: int, time: Tensor) -> Sample | None:
        """With the noise that this image always gets; None if it cannot be read."""
        try:
            found = self.held_out.sample(index, 0)
        except CorruptSample:
            return None
        return {**found, "time": time, "noise": _noise(found["image"].shape, mix(0, "held out", index))}

    def _together(self, rows: list[Sample | None], device: torch.device) -> Sample:
        """A batch of held-out samples; unreadable ones are replaced, for they weigh nothing."""
        batch = stack([row or self._stand_in for row in rows])
        return {name: value.to(device) for name, value in batch.items()}

    @cached_property
    def _stand_in(self) -> Sample:
        zero = torch.zeros(())
        found = (self._held_out_sample(index, zero) for index in range(len(self.held_out)))
        known = next((sample for sample in found if sample is not None), None)
        if known is None:
            raise ValueError("no held-out image can be read")
        return known

    def _recognised(self, model: nn.Module, accelerator: Accelerator, limit: int | None) -> float:
        assert self.judge is not None
        sampling, classes = self.config.sampling, self.config.data.num_classes
        count = classes * sampling.judged if limit is None else min(limit, classes * sampling.judged)
        chosen, batch = share(count, accelerator), self.config.eval_batch
        sums = torch.zeros(2, dtype=torch.float64)
        for first in range(0, len(chosen), batch):
            part = chosen[first : first + batch]
            wanted = torch.tensor([i % classes for i, _ in part])
            images = self.draw(model, wanted.tolist(), [mix(0, "judged", i) for i, _ in part])
            right = (self.judge(images) == wanted).double()
            weight = torch.tensor([w for _, w in part], dtype=torch.float64)
            sums += torch.stack([(right * weight).sum(), weight.sum()])
        sums = accelerator.reduce(sums.float().to(accelerator.device), "sum").cpu()
        return 100 * float(sums[0] / sums[1])

    def pipeline(self, model: nn.Module) -> HybridDiTPipeline:
        names = self.train_set.classes if self.config.data.num_classes else ()
        pipe = HybridDiTPipeline(model, self.noising.scheduler(), labels=list(names))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, model: nn.Module, labels: list[int], seeds: list[int]) -> Tensor:
        """Samples (B, C, H, W) in [0, 1] on the CPU, each from the noise of its own seed."""
        config, sampling = self.config, self.config.sampling
        size = config.data.image_size
        noise = torch.stack([_noise((config.channels, size, size), seed) for seed in seeds])
        known = self._labels(torch.tensor(labels))
        images = self.pipeline(model)(
            None if known is None else labels,
            num_images=len(labels),
            guidance_scale=sampling.guidance,
            num_inference_steps=sampling.steps,
            latents=noise.to(next(model.parameters()).device),
            output_type="pt",
        ).images
        return images.cpu()

    def samples(self, model: nn.Module, folder: Path) -> list[Path]:
        """One sheet: a row for each class, the same noise in each column at every validation."""
        sampling, classes = self.config.sampling, self.config.data.num_classes
        rows = min(sampling.classes, classes) or sampling.classes
        labels = [row for row in range(rows) for _ in range(sampling.each)]
        seeds = [mix(0, "sheet", column) for _ in range(rows) for column in range(sampling.each)]
        images = self.draw(model, labels if classes else [0] * len(seeds), seeds)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "samples.png"
        names = self.train_set.classes or tuple(map(str, range(classes)))
        pixels = (images.clamp(0, 1) * 255).round().byte().expand(-1, 3, -1, -1)
        tiles = [to_pil_image(image) for image in pixels]
        sheet(tiles, sampling.each, names[:rows] if classes else ()).save(path)
        return [path]

    def metadata(self) -> dict[str, Any]:
        return {"task": "generation", "predict": self.config.diffusion.predict}

    def release(self, model: nn.Module, path: Path, facts: dict[str, Any]) -> None:
        """A diffusers folder, complete or not there: written aside, then renamed."""
        aside, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
        for rest in (aside, old):
            shutil.rmtree(rest, ignore_errors=True)
        self.pipeline(model).save_pretrained(aside)
        state.write_text(aside / "training.json", json.dumps(facts, indent=2) + "\n")
        if path.exists():
            path.rename(old)
        aside.rename(path)
        shutil.rmtree(old, ignore_errors=True)

    def open(self, path: str | Path) -> HybridDiT:
        """The transformer of a run directory, of a pipeline's folder, or by itself."""
        path = Path(path)
        for folder in (path / self.released / "transformer", path / "transformer", path):
            if (folder / "config.json").is_file() and not (folder / self.released).is_dir():
                return HybridDiT.from_pretrained(folder, use_safetensors=True).eval()
        raise ConfigError(
            f"{path}: no HybridDiT; give a run directory, its {self.released} folder, or a diffusers folder"
        )


class Noised:
    """Images with the noise, the time and the choice to drop the label that they are trained with.

    Drawn with the image and not in the step: so they do not depend on how a batch is shared by processes or micro-batches.
    """

    def __init__(self, images: LabelledImages, noising: Noising, drop: float, anything: int) -> None:
        self.images, self.noising, self.drop, self.anything = images, noising, drop, anything

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.images.classes

    def sample(self, index: int, seed: int) -> Sample:
        found = self.images.sample(index, seed)
        generator = torch.Generator().manual_seed(mix(seed, "noise"))
        found["noise"] = torch.randn(found["image"].shape, generator=generator)
        found["time"] = self.noising.draw(1, generator)[0]
        if torch.rand((), generator=generator) < self.drop:
            found["label"] = torch.tensor(self.anything)
        return found


def _noise(shape: tuple[int, ...] | torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
