"""The graft of a generator and of a classifier: `graft.Grafts` on top of the task that trains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import visionhybrid
from visionhybrid.data.errors import CorruptSample
from visionhybrid.diffusion import HybridDiT
from visionhybrid.diffusion.dit_weights import read_dit
from visionhybrid.hosts.timm.modules import from_bytes
from visionhybrid.models.checkpoint.containers import clean, unwrap
from visionhybrid.models.checkpoint.files import read
from visionhybrid.train import start
from visionhybrid.train.classify import Classify
from visionhybrid.train.config import ConfigError
from visionhybrid.train.distill import Inputs
from visionhybrid.train.generate import Exercise, Generate
from visionhybrid.train.generators import Denoiser
from visionhybrid.train.graft import Grafted, Grafts
from visionhybrid.train.sampler import Sample


class GraftGenerator(Grafts, Generate):
    """Mixers in a generator: `HybridDiT`, or the denoiser of a pipeline. The output is compared by squared error."""

    def open_teacher(self) -> nn.Module:
        path, generator = self.graft.teacher, self.generator
        if isinstance(generator, Denoiser):
            return self.open(path) if path else generator.family.model
        if not path:
            raise ConfigError("teacher: name the generator to imitate, as in teacher=runs/hybrid_dit_digits")
        teacher = read_dit(path) if Path(path).is_file() else self.open(path)
        if isinstance(teacher, HybridDiT):
            self._check(teacher)
        return teacher

    def _check(self, teacher: HybridDiT) -> None:
        has, (channels, side, _) = teacher.config, self.generator.shape
        made = has.in_channels, has.sample_size, has.num_classes
        if made != (wanted := (channels, side, self.config.data.num_classes)):
            raise ConfigError(
                f"teacher: made for (channels, size, classes) {made}, the recipe's data has {wanted}"
            )

    def new_student(self) -> nn.Module:
        options = self.config.model.options
        if not isinstance(self.teacher, HybridDiT) or not options:
            return self.plain()
        has = {key: value for key, value in self.teacher.config.items() if not key.startswith("_")}
        student = HybridDiT(**{**has, **options})
        theirs, ours = self.teacher.state_dict(), student.state_dict()
        taken = {
            key: value for key, value in theirs.items() if key in ours and value.shape == ours[key].shape
        }
        if left := [key for key in ours if key not in taken and ".attn." not in key]:
            raise ConfigError(
                f"model.options: only the attention may differ from the teacher's, not {left[0]}"
            )
        student.load_state_dict(taken, strict=False)
        return student

    def distances(self, output: Tensor, wanted: Tensor, asked: Exercise) -> dict[str, Tensor]:
        count = asked.target.shape[1]
        found = {"output": F.mse_loss(output[:, :count], wanted[:, :count])}
        if output.shape[1] > count:
            found["variance"] = F.mse_loss(output[:, count:], wanted[:, count:])
        return found

    def bare(self, model: nn.Module) -> nn.Module:
        return model.student if isinstance(model, Grafted) else model


@dataclass(frozen=True)
class Labelled:
    """`graft.Exercise` of a classifier."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    label: Tensor
    task: Classify

    def loss(self, output: Tensor) -> Tensor:
        return self.task.cross_entropy(output, self.label)


class GraftClassifier(Grafts, Classify):
    """Mixers in a vision transformer of timm. Outputs are compared as distributions over the classes (Kullback-Leibler)."""

    def open_teacher(self) -> nn.Module:
        path, model = self.graft.teacher, self.config.model
        if not (path or model.start or model.options.get("pretrained")):
            raise ConfigError("teacher: name the weights to imitate, or set model.options.pretrained=true")
        net = start.create(model, [], num_classes=self.config.data.num_classes, in_chans=len(self.mode))
        return _fill(net, _tensors(path, self.released), path) if path else net

    def open(self, path: str | Path) -> nn.Module:
        """A student: the run directory or file of a graft of this teacher."""
        state = _tensors(path, self.released)
        mixers = {
            key.removesuffix("._extra_state"): from_bytes(value)
            for key, value in state.items()
            if key.endswith("._extra_state")
        }
        student = self.plain()
        if mixers:
            visionhybrid.attach(student, {name: (x["mixer"], x["options"]) for name, x in mixers.items()})
        return _fill(student, state, path).eval()

    def release(self, model: nn.Module, path: Path, facts: dict[str, Any]) -> None:
        super().release(model, path, facts)
        if self.notes and self.notes[-1].startswith(path.name):  # said of a model without mixers
            self.notes[-1] = f"{path.name}: attach {self.graft.mixer} to the timm model, then load_state_dict"

    def exercise(self, batch: Sample) -> Labelled:
        return Labelled((batch["image"],), {}, batch["label"], self)

    def held_out_inputs(self, device: torch.device, count: int = 64) -> Inputs:
        """Held-out images spread over the data."""
        places = torch.linspace(0, len(self.held_out) - 1, min(count, len(self.held_out))).long().tolist()
        found = []
        for index in places:
            try:
                found.append(self.held_out.sample(index, 0)["image"])
            except CorruptSample:
                continue
        if not found:
            raise ValueError("no held-out image could be read")
        return (torch.stack(found).to(device),), {}

    def distances(self, output: Tensor, wanted: Tensor, asked: Labelled) -> dict[str, Tensor]:
        ours, theirs = output.log_softmax(1), wanted.log_softmax(1)
        return {"output": F.kl_div(ours, theirs, reduction="batchmean", log_target=True)}


def _tensors(path: str | Path, released: str) -> dict[str, Tensor]:
    """The state dict of a checkpoint, or of a run directory's released weights."""
    path = Path(path)
    return clean(unwrap(read(path / released if (path / released).is_file() else path).content).state)


def _fill(net: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    try:
        net.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ConfigError(f"{path} does not fit: {' '.join(str(error).split())[:200]}") from None
    return net
