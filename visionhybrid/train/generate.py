"""Training a generator by diffusion or flow matching: images of classes or of nothing, or a pipeline's images of captions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from visionhybrid.data.errors import CorruptSample
from visionhybrid.data.seeds import mix
from visionhybrid.diffusion.drawing import sheet
from visionhybrid.train import state
from visionhybrid.train.config import ConfigError, Generation
from visionhybrid.train.distill import Inputs
from visionhybrid.train.encoding import Texts
from visionhybrid.train.generators import RELEASED, noise_of, open_generator
from visionhybrid.train.judge import Judge
from visionhybrid.train.material import Images
from visionhybrid.train.noising import Noising, noising, squared_errors
from visionhybrid.train.sampler import Sample, stack
from visionhybrid.train.task import Update, left_out, share, untold


@dataclass(frozen=True)
class Exercise:
    """`model(*args, **kwargs)[0]` should be `target`; each image counts with its weight."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor  # (B, ...)
    weight: Tensor  # (B,)
    # (B,) of an output, for the variance in its further channels
    bound: Callable[[Tensor], Tensor] | None = None

    def errors(self, output: Tensor) -> Tensor:
        """(B,). Without a bound, a variance in further channels is not looked at."""
        errors = squared_errors(output[:, : self.target.shape[1]], self.target, self.weight)
        return errors if self.bound is None else errors + self.bound(output)

    def loss(self, output: Tensor) -> Tensor:
        return self.errors(output).mean()


class Generate:
    """See `task.Task`. Metrics: loss on held-out images with fixed times and noise; with a judge, recognised, in percent."""

    repeat = 1
    released = RELEASED  # a diffusers folder

    def __init__(self, config: Generation) -> None:
        self.config = config
        self.notes: list[str] = []
        self.repeat = config.data.repeat
        self.generator = open_generator(config)
        self.noising = noising(config.diffusion, self.generator.scheduler)
        self.judge = self._judge()
        self.metric = "recognised" if self.judge else "loss"
        self.higher_is_better = self.judge is not None
        found = self.generator.material(self.notes)
        self.prompts = tuple(config.text.prompts) or found.captions
        nothing = -1 if found.texts else config.data.num_classes
        self.train_set = Noised(found.train, self.noising, config.diffusion.drop_label, nothing, found.texts)
        self.held_out, self.held_out_texts = found.held_out, found.held_out_texts

    def _judge(self) -> Judge | None:
        if not self.config.sampling.judge:
            return None
        if not self.config.data.num_classes:
            raise ConfigError("sampling.judge: judges images of classes, there are none (data.num_classes=0)")
        return Judge(self.config.sampling.judge)

    # -- training ----------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, nn.Module]:
        net = self.generator.build()
        if self.config.model.start:
            self.notes.append(f"started from {self.config.model.start}")
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
        noised = self.noising.noised(image, noise, times)
        args, kwargs = self.generator.inputs(noised, times, batch)
        target = self.generator.target(self.noising.target(image, noise, times))
        bound = self.noising.bound and partial(self.noising.bound, image=image, noised=noised, times=times)
        return Exercise(args, kwargs, target, self.noising.weight(times), bound)

    # -- validation --------------------------------------------------------------------------------------------------

    def validate(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        limit: int | None = None,
        update: Update = untold,
    ) -> dict[str, float]:
        sampling = self.config.sampling
        judged = self.config.data.num_classes * sampling.judged * sampling.steps if self.judge else 0
        first = len(self.held_out) / (len(self.held_out) + judged)  # of the calls of the model
        found = {"loss": self._held_out_loss(model, accelerator, limit, lambda done: update(first * done))}
        if self.judge is not None:
            found["recognised"] = self._recognised(
                model, accelerator, limit, lambda done: update(first + (1 - first) * done)
            )
        return found

    def _held_out_loss(
        self, model: nn.Module, accelerator: Accelerator, limit: int | None, update: Update
    ) -> float:
        batch, device = self.config.eval_batch, accelerator.device
        chosen = share(len(self.held_out), accelerator)[: limit * batch if limit else None]
        # neighbours, often of one class, get times far apart
        times = self.noising.spread(97)[torch.arange(len(self.held_out)) * 31 % 97]
        sums, unreadable = torch.zeros(2, dtype=torch.float64), 0
        for first in range(0, len(chosen), batch):
            update(first / len(chosen))
            part = chosen[first : first + batch]
            rows = [self._held_out_sample(index, times[index]) for index, _ in part]
            unreadable += rows.count(None)
            readable = torch.tensor(
                [weight * (row is not None) for row, (_, weight) in zip(rows, part, strict=True)]
            )
            asked = self.exercise(self._together(rows, device))
            each = asked.errors(model(*asked.args, **asked.kwargs)[0]).cpu()
            sums += torch.stack([(each * readable).sum(), readable.sum()]).double()
        if unreadable:
            self.notes.append(left_out(unreadable, len(chosen)))
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
        if self.held_out_texts is not None:
            found |= self.held_out_texts[int(found["label"])]
        return {**found, "time": time, "noise": noise_of(found["image"].shape, mix(0, "held out", index))}

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

    def _recognised(
        self, model: nn.Module, accelerator: Accelerator, limit: int | None, update: Update
    ) -> float:
        assert self.judge is not None
        sampling, classes = self.config.sampling, self.config.data.num_classes
        count = classes * sampling.judged if limit is None else min(limit, classes * sampling.judged)
        chosen, batch = share(count, accelerator), self.config.eval_batch
        sums = torch.zeros(2, dtype=torch.float64)
        for first in range(0, len(chosen), batch):
            update(first / len(chosen))
            part = chosen[first : first + batch]
            wanted = torch.tensor([i % classes for i, _ in part])
            images = self.draw(model, wanted.tolist(), [mix(0, "judged", i) for i, _ in part])
            right = (self.judge(images) == wanted).double()
            weight = torch.tensor([w for _, w in part], dtype=torch.float64)
            sums += torch.stack([(right * weight).sum(), weight.sum()])
        sums = accelerator.reduce(sums.float().to(accelerator.device), "sum").cpu()
        return 100 * float(sums[0] / sums[1])

    # -- pictures and weights ----------------------------------------------------------------------------------------

    @property
    def scheduler(self) -> Any:
        return self.generator.scheduler or self.noising.scheduler()

    def bare(self, model: nn.Module) -> nn.Module:
        """What of `model` goes into a pipeline."""
        return model

    def draw(self, model: nn.Module, wanted: Sequence[Any], seeds: Sequence[int]) -> Tensor:
        """Samples (B, C, H, W) in [0, 1] on the CPU of the labels or prompts `wanted`, each from the noise of its own seed."""
        return self.generator.draw(self.bare(model), self.scheduler, wanted, seeds, self.config.sampling)

    def samples(self, model: nn.Module, folder: Path) -> list[Path]:
        """One sheet: a row for each class or prompt, the same noise in each column at every validation."""
        if not self.generator.draws:
            return []
        sampling, classes = self.config.sampling, self.config.data.num_classes
        wanted: Sequence[Any] = self.prompts or range(classes) or [0]
        names = self.prompts or self.train_set.classes or tuple(map(str, range(classes)))
        rows, seeds = wanted[: sampling.classes], [mix(0, "sheet", column) for column in range(sampling.each)]
        if not rows or not seeds:
            return []
        drawn = [self.draw(model, [row] * len(seeds), seeds) for row in rows]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "samples.png"
        pixels = (torch.cat(drawn).clamp(0, 1) * 255).round().byte().expand(-1, 3, -1, -1)
        tiles = [to_pil_image(image) for image in pixels]
        sheet(tiles, sampling.each, names[: len(rows)] if self.prompts or classes else ()).save(path)
        return [path]

    def metadata(self) -> dict[str, Any]:
        return {"task": "generation", "predict": self.config.diffusion.predict}

    def release(self, model: nn.Module, path: Path, facts: dict[str, Any]) -> None:
        """A diffusers folder, complete or not there: written aside, then renamed."""
        aside, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        names = self.train_set.classes if self.config.data.num_classes else ()
        with state.naming(path):
            self.generator.saved(self.bare(model), self.scheduler, names, aside)
        state.write_text(aside / "training.json", json.dumps(facts, indent=2) + "\n")
        if path.exists():  # else `old` is what there is: the last release was killed between its two names
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        aside.rename(path)
        shutil.rmtree(old, ignore_errors=True)

    def open(self, path: str | Path) -> nn.Module:
        """The denoiser of a run directory, of a pipeline's folder, or by itself."""
        return self.generator.open(path)


class Noised:
    """Images with the noise, the time and the choice to drop the label that they are trained with.

    Drawn with the image and not in the step: so they do not depend on how a batch is shared by processes or micro-batches.

    Args:
        drop: share of images whose label becomes `nothing`. texts: what is told of a label instead of its number.
    """

    def __init__(
        self, images: Images, noising: Noising, drop: float, nothing: int, texts: Texts | None = None
    ) -> None:
        self.images, self.noising, self.drop, self.nothing, self.texts = images, noising, drop, nothing, texts

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.images.classes)

    def sample(self, index: int, seed: int) -> Sample:
        found = self.images.sample(index, seed)
        generator = torch.Generator().manual_seed(mix(seed, "noise"))
        found["noise"] = torch.randn(found["image"].shape, generator=generator)
        found["time"] = self.noising.draw(1, generator)[0]
        if torch.rand((), generator=generator) < self.drop:
            found["label"] = torch.tensor(self.nothing)
        return found if self.texts is None else {**found, **self.texts[int(found["label"])]}
