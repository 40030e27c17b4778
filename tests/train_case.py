"""A task small enough to train hundreds of times: what the tests of the loop, of resuming and of checkpoints stand on.

It is also the proof that a new task needs nothing but a `Config` subclass and a class: the loop does not know it. It has all
that makes resuming hard: dropout, batch norm, random augmentation, batch-wise random mixing, a last short batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from visionhybrid.data.errors import CorruptSample
from visionhybrid.data.seeds import mix
from visionhybrid.train.config import Config, Loop, Model, Optim, Schedule
from visionhybrid.train.sampler import Sample, stack
from visionhybrid.train.start import Released
from visionhybrid.train.task import Update, share, untold


@dataclass(frozen=True, kw_only=True)
class Toy(Config):
    samples: int = 34  # 5 batches of 6, and 4 samples over
    corrupt: tuple[int, ...] = ()
    dropout: float = 0.25
    norm: bool = True
    mixing: bool = True

    task: ClassVar[str] = "toy"
    entry: ClassVar[str] = "train_case:ToyTask"


class ToyData:
    def __init__(self, count: int, corrupt: tuple[int, ...]) -> None:
        self.count, self.corrupt = count, corrupt

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, seed: int) -> Sample:
        if index in self.corrupt:
            raise CorruptSample(f"picture_{index}.png", "broken on purpose")
        x = torch.randn(8, generator=torch.Generator().manual_seed(index))
        noise = torch.randn(8, generator=torch.Generator().manual_seed(seed))
        return {"x": x + 0.1 * noise, "y": x.sum().sin(), "index": torch.tensor(index)}


class ToyTask(Released):
    metric, higher_is_better, repeat = "error", False, 1

    def __init__(self, config: Toy) -> None:
        self.config = config
        self.train_set = ToyData(config.samples, config.corrupt)
        self.notes: list[str] = []

    def parts(self) -> dict[str, nn.Module]:
        norm = nn.BatchNorm1d(16) if self.config.norm else nn.Identity()
        net = nn.Sequential(
            nn.Linear(8, 16), norm, nn.GELU(), nn.Dropout(self.config.dropout), nn.Linear(16, 1)
        )
        return {"model": net}

    def collate(self, samples: list[Sample], seed: int) -> Sample:
        batch = stack(samples)
        share = self.config.mixing * torch.rand((), generator=torch.Generator().manual_seed(mix(seed, "mix")))
        batch["x"] = batch["x"] * (1 - 0.1 * share) + batch["x"].flip(0) * 0.1 * share
        return batch

    def loss(
        self, part: str, parts: Mapping[str, nn.Module], batch: Sample
    ) -> tuple[Tensor, dict[str, Tensor]]:
        output = parts["model"](batch["x"]).squeeze(1)
        loss = (output - batch["y"]).square().mean()
        return loss, {"order": batch["index"].float().mean()}

    def validate(
        self, model: nn.Module, accelerator: Accelerator, limit: int | None = None, update: Update = untold
    ) -> dict[str, float]:
        chosen = [i for i, _ in share(4, accelerator) if i not in self.config.corrupt]
        batch = stack([self.train_set.sample(i, 0) for i in chosen])
        errors = (
            model(batch["x"].to(accelerator.device)).squeeze(1) - batch["y"].to(accelerator.device)
        ).abs()
        return {"error": float(accelerator.reduce(errors.mean(), "mean"))}

    def samples(self, model: nn.Module, folder: Path) -> list[Path]:
        return []

    def metadata(self) -> dict[str, Any]:
        return {"task": "toy"}


def toy(**changes: Any) -> Toy:
    """A run of 12 steps over 2.4 epochs; `changes` are fields of `Toy`, or of its `loop` as `loop_NAME`."""
    loop = dict(
        batch_size=6,
        steps=12,
        workers=0,
        log_every=1,
        checkpoint_every=2,
        validate_every=5,
        keep=2,
        ema_decay=0.9,
        tensorboard=False,
    )
    loop |= {name[5:]: value for name, value in changes.items() if name.startswith("loop_")}
    base = Toy(
        name="toy",
        model=Model(name="none"),
        optim=Optim(name="adamw", lr=1e-2, weight_decay=0.01, clip_norm=1.0),
        schedule=Schedule(name="cosine", warmup=3),
        loop=Loop(**loop),
    )
    return replace(base, **{name: value for name, value in changes.items() if not name.startswith("loop_")})


def outcome(out: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on interruptions: tensors as bytes, and the log without times."""
    last = max((out / "checkpoints").glob("step_*"))
    tensors = {
        f"{file.stem}/{name}": value.reshape(-1).contiguous().view(torch.uint8).tolist()
        for file in sorted(last.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in row.items() if k != "seconds"} for row in rows if row["kind"] != "note"]
    state = json.loads((last / "state.json").read_text())
    state.pop("seconds")
    return {"step": last.name, "tensors": tensors, "log": log, "state": state}
