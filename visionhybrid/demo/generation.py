"""The demo's generator: trained by flow matching, then copied with other mixers that learn to imitate it.

The judge is the demo's own classifier. It was trained on real digits of the training split only; it sees no generated digit
before the count, and neither its gradient nor its opinion reaches a generator: the weights that are counted are the last ones.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import visionhybrid
from visionhybrid import mixers
from visionhybrid.data.samples import DIGIT_CLASSES, digits
from visionhybrid.data.seeds import mix
from visionhybrid.demo import costs
from visionhybrid.demo.training import Training, clear, record, series, train
from visionhybrid.diffusion import HybridDiT, HybridDiTPipeline
from visionhybrid.diffusion.drawing import open_pipeline
from visionhybrid.infer.evaluation import precision_recall
from visionhybrid.train import find, override
from visionhybrid.train.config import Generation as GenerationConfig
from visionhybrid.train.config import to_json
from visionhybrid.train.grafting import LayerReport, graft
from visionhybrid.train.judge import Judge
from visionhybrid.train.log import read

RECIPE, GRAFTS = "hybrid_dit_digits", ("linfusion", "sla")
COUNT = 50  # digits of each class that are judged
COLUMNS = 8  # of them on the report's sheets
BATCH = 100
WATCHED = 10  # of each class at each validation: the curve

_QUICK = ("alone.steps=2", "whole.steps=2", "loop.log_every=1", "loop.validate_every=2")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A set of digits, by the judge. Precision, recall (arXiv:1904.06991) and `nearest` are against the training digits."""

    count: int
    recognised: float  # percent taken for the class asked for, or that they have
    precision: float  # share that lies among real digits, in the judge's features
    recall: float  # share of real digits that lie among these
    nearest: float  # median distance to the nearest training digit: root mean square over pixels in [0, 1]


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Digits of one origin: scores of all, and the first of each class to look at."""

    scores: Scores
    pixels: Tensor = field(repr=False)  # uint8 (classes, columns, 8, 8)
    right: list[list[bool]]  # taken for their class


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A generator and its samples."""

    mixer: str
    training: Training  # of a student: both phases after each other; its loss is that of the last
    sheet: Sheet
    seconds: float  # to draw one digit


@dataclass(frozen=True, kw_only=True)
class Student(Drawn):
    """A copy of the generator with another mixer, after it learned to imitate it."""

    untrained: Scores  # with the new mixers just put in
    kept: float  # percent of the teacher's recognised share; nan if that is 0
    distance: float  # |student - teacher|^2 / |teacher|^2 of what they predict, on held-out digits
    alone: int  # steps of the first phase
    layers: list[LayerReport]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The third part of the demo: the generator, its copies, and what they are compared with."""

    teacher: Drawn
    students: list[Student]
    real: Sheet  # held-out digits
    without: Scores  # of the teacher with its attention switched off: what class and place alone give
    seen: int  # training digits, of judge and generator
    steps: int  # of sampling
    guidance: float
    costs: list[costs.MixerCost]


def learn_generation(out: Path, *, seed: int = 0, quick: bool = False, progress: bool = True) -> Generation:
    """Train the generator in `out`/generator, graft it in `out`/linfusion and `out`/sla; the judge is in `out`/digits."""
    judge = Judging(out / "digits", quick=quick)
    watch = (f"sampling.judge={out / 'digits'}", f"sampling.judged={1 if quick else WATCHED}")
    watch += ("sampling.steps=2", "sampling.each=1") if quick else ()
    small = ("model.options.num_layers=1",) if quick else ()
    config, result = train(
        RECIPE, out / "generator", seed=seed, quick=quick, progress=progress, changes=watch + small
    )
    pipe = _opened(result["weights"])
    sheet, seconds = judge.draw(pipe, config, seed)
    training = record(config, pipe.transformer, result)
    teacher = Drawn(mixer="softmax", training=training, sheet=sheet, seconds=seconds)
    with _no_attention(pipe.transformer):
        without = judge.draw(pipe, config, seed)[0].scores
    students, nets = [], {"softmax": pipe.transformer}
    for mixer in GRAFTS:
        words = (f"loop.seed={seed}", f"teacher={out / 'generator'}", *watch, *(_QUICK if quick else ()))
        student, nets[mixer] = _graft(mixer, out / mixer, words, judge, (teacher, pipe), seed, progress)
        students.append(student)
    return Generation(
        teacher=teacher,
        students=students,
        real=judge.real(),
        without=without,
        seen=len(digits("train")[0]),
        steps=config.sampling.steps,
        guidance=config.sampling.guidance,
        costs=_costs(nets, quick),
    )


def _graft(
    mixer: str,
    out: Path,
    words: tuple[str, ...],
    judge: Judging,
    teacher: tuple[Drawn, HybridDiTPipeline],
    seed: int,
    progress: bool,
) -> tuple[Student, HybridDiT]:
    recipe = f"{RECIPE}_{mixer}"
    config: Any = override(find(recipe), words)
    clear(out, recipe)
    untrained = _untrained(teacher[1], config)
    start = judge.draw(untrained, config, seed)[0].scores
    done = graft(config, out, progress=progress)
    pipe = _opened(done.weights)
    sheet, seconds = judge.draw(pipe, config, seed)
    first, last = (list(read(out / phase / "log.jsonl")) for phase in ("alone", "whole"))
    held_out = series(first, "validation")
    for name, values in series(last, "validation").items():
        held_out[name] = held_out.get(name, []) + [(config.alone.steps + x, y) for x, y in values]
    held_out["recognised"].insert(0, (0, start.recognised))
    before = teacher[0].sheet.scores.recognised
    student = Student(
        mixer=mixer,
        training=Training(
            recipe=recipe,
            command=f"visionhybrid graft {recipe} teacher=runs/{RECIPE}",
            config=json.loads(to_json(config)),
            parameters=sum(p.numel() for p in pipe.transformer.parameters()),
            steps=config.alone.steps + config.whole.steps,
            seconds=done.seconds,
            loss=[(config.alone.steps + x, y) for x, y in series(last, "train")["loss"]],
            held_out=held_out,
        ),
        sheet=sheet,
        seconds=seconds,
        untrained=start,
        kept=100 * sheet.scores.recognised / before if before else float("nan"),
        distance=done.student["distance"],
        alone=config.alone.steps,
        layers=done.layers,
    )
    return student, pipe.transformer


@contextmanager
def _no_attention(net: HybridDiT) -> Iterator[None]:
    """Inside, attention adds nothing to any token."""
    handles = [
        block.attn.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
        for block in net.blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _untrained(pipe: HybridDiTPipeline, config: Any) -> HybridDiTPipeline:
    """The teacher with the new mixers as they are put in."""
    net = copy.deepcopy(pipe.transformer)
    torch.manual_seed(config.loop.seed)
    visionhybrid.attach(net, config.mixer, **config.mixer_options)
    found = HybridDiTPipeline(net, pipe.scheduler, labels=list(pipe.config.labels))
    found.set_progress_bar_config(disable=True)
    return found


def _opened(weights: str) -> HybridDiTPipeline:
    """Without diffusers' own progress lines between ours."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    try:
        pipe = open_pipeline(weights)
    finally:
        logging.enable_progress_bar()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _costs(nets: dict[str, HybridDiT], quick: bool) -> list[costs.MixerCost]:
    """Of the mixers just trained, and of SLA with the blocks it was published with, made for long sequences."""
    found: dict[str, Any] = {name: net.blocks[0].attn.mixer for name, net in nets.items()}
    own = found["sla"]
    found["sla, published blocks"] = mixers.create("sla", dim=own.dim, heads=own.heads, head_dim=own.head_dim)
    return costs.compare(found, *(((2, 4), 1) if quick else ()))


def samples(pipe: HybridDiTPipeline, labels: Tensor, config: GenerationConfig, seed: int) -> Tensor:
    """A digit for each label, (N, 1, 8, 8) in [0, 1]; the n-th of a class always from the same noise."""
    number, noise = [0] * DIGIT_CLASSES, []
    for label in labels.tolist():
        noise.append(mix(seed, "demo", label, number[label]))
        number[label] += 1
    images = []
    for first in range(0, len(labels), BATCH):
        part = slice(first, first + BATCH)
        found = pipe(
            labels[part].tolist(),
            generator=[torch.Generator().manual_seed(n) for n in noise[part]],
            num_inference_steps=config.sampling.steps,
            guidance_scale=config.sampling.guidance,
            output_type="pt",
        )
        images.append(found.images.cpu())
    return torch.cat(images)


class Judging:
    """Counts what the classifier recognises, and compares digits with the training digits."""

    def __init__(self, run: Path, *, quick: bool) -> None:
        self.judge = Judge(run)
        self.digits = digits("train")[0][: 100 if quick else None]
        self.features = self._features(self.digits)
        self.count = 2 if quick else COUNT

    def real(self) -> Sheet:
        """The held-out digits: what the same numbers say of real ones."""
        images, labels = digits("val")
        order = torch.argsort(labels, stable=True)
        return self._sheet(images[order], labels[order])

    def draw(self, pipe: HybridDiTPipeline, config: GenerationConfig, seed: int) -> tuple[Sheet, float]:
        """Samples of a pipeline, and the seconds that one took. The noise depends on seed, class and number."""
        labels = torch.arange(DIGIT_CLASSES).repeat_interleave(self.count)
        start = time.perf_counter()
        images = samples(pipe, labels, config, seed)
        seconds = (time.perf_counter() - start) / len(labels)
        return self._sheet(images, labels), seconds

    def _sheet(self, images: Tensor, labels: Tensor) -> Sheet:
        """`images` (N, 1, 8, 8) in [0, 1] in the order of their `labels`."""
        right = torch.cat([self.judge(part) for part in images.split(BATCH)]) == labels
        precision, recall = precision_recall(self.features, self._features(images))
        nearest = (
            torch.cdist(images.flatten(1), self.digits.flatten(1)).min(1).values / images[0].numel() ** 0.5
        )
        shown = torch.stack(
            [(labels == c).nonzero().flatten()[: min(COLUMNS, self.count)] for c in range(DIGIT_CLASSES)]
        )
        return Sheet(
            scores=Scores(
                count=len(labels),
                recognised=100 * float(right.double().mean()),
                precision=precision,
                recall=recall,
                nearest=float(nearest.median()),
            ),
            pixels=(images[shown][:, :, 0] * 255).round().byte(),
            right=right[shown].tolist(),
        )

    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self.judge.features(part) for part in images.split(BATCH)]).double()
