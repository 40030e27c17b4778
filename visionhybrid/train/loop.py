"""The one training loop. It knows steps, not tasks: what is trained on what is a `Task`'s business.

Exactness: the data order, every sample, and the generators at each forward pass are functions of (seed, step), never of
history, and a checkpoint holds everything else. So a run that is killed at any moment and started again ends with the same
bits, with any number of loading processes. See `sampler.py` and tests/test_resume.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from visionhybrid.data.seeds import mix, seed_all
from visionhybrid.models.checkpoint.finite import nonfinite, told
from visionhybrid.train import state, task
from visionhybrid.train.config import Config, check
from visionhybrid.train.ema import Ema
from visionhybrid.train.guard import DivergedError, Watch
from visionhybrid.train.log import Log
from visionhybrid.train.parts import Part, build, load_optimizer, make_accelerator
from visionhybrid.train.sampler import Batch, Position, Sample, Stream, loader
from visionhybrid.train.signals import Interrupted, interruptions


class MemoryLimitError(RuntimeError):
    """One sample does not fit; the message is one line."""


class Trainer:
    """A run: what it trains, where it stands, one update after the other. `session.run` makes and drives it."""

    def __init__(self, config: Config, out: Path, *, progress: bool = True) -> None:
        self.config, self.out, self.checkpoints = check(config), out, out / "checkpoints"
        loop = config.loop
        self.accelerator = make_accelerator(loop.precision)
        self.task = task.build(config)
        stream = self._stream(Position())
        self.steps_per_epoch = stream.batches_per_epoch
        self.total = loop.steps or max(1, round((loop.epochs or 0) * self.steps_per_epoch))
        share = loop.batch_size // self.accelerator.num_processes
        self.micro = min(loop.micro_batch or share, share)
        seed_all(mix(loop.seed, "init"))
        self.parts = build(config, self.task.parts(), self.accelerator, self.total, self.steps_per_epoch)
        self.main = self.parts[0]
        # whether no process holds all weights (FSDP); asked now, since after a forward pass they may be whole for a while
        self.sharded = any(hasattr(p, "full_tensor") for p in self.main.bare.parameters())
        self.ema = (
            Ema(self.main.bare, loop.ema_decay, loop.ema_warmup) if loop.ema_decay is not None else None
        )
        self.log = Log(
            out, main=self.accelerator.is_main_process, progress=progress, tensorboard=loop.tensorboard
        )
        self.step, self.position, self.watch, self.seconds = 0, Position(), Watch(), 0.0
        self.window: dict[str, list[float]] = {}  # name -> [sum, count] since the last line of the log
        self.metrics: dict[str, float] = {}
        self.best: dict[str, Any] | None = None  # {"step", "value"}

    # -- building ----------------------------------------------------------------------------------------------------

    def _stream(self, start: Position) -> Stream:
        return Stream(
            len(self.task.train_set),
            self.config.loop.batch_size,
            seed=self.config.loop.seed,
            start=start,
            repeat=self.task.repeat,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )

    def batches(self) -> Iterator[Batch]:
        """Batches from where the run stands, without end. Raises: ValueError: one could not be made."""
        pin = self.accelerator.device.type == "cuda"
        plans = self._stream(self.position)
        found = loader(
            self.task.train_set, plans, self.task.collate, workers=self.config.loop.workers, pin=pin
        )
        return map(Batch.checked, iter(found))

    # -- one update --------------------------------------------------------------------------------------------------

    def update(self, batch: Batch) -> dict[str, float] | None:
        """One optimisation step on `batch`. Returns what to log, or None if the guard left the update out."""
        values: dict[str, float] = {}
        buffers = [[b.clone() for b in part.buffers] for part in self.parts]
        for part in self.parts:
            part.net.train()
            part.rate.set(self.step)
            logs = self._gradients(part, batch, buffers)
            norm = self._norm(part)
            guard = self.config.guard if part is self.main else replace(self.config.guard, spike=0.0)
            overflow = self._overflow(logs["loss"], norm)
            verdict = None if overflow else self.watch.verdict(guard, logs["loss"], norm)
            if verdict is not None:
                self._leave_out(part, buffers, verdict, logs["loss"], norm)
                return None
            part.optimizer.step()
            part.optimizer.zero_grad()
            prefix = "" if part is self.main else f"{part.name}_"
            values.update({f"{prefix}{name}": value for name, value in logs.items()})
            values[f"{prefix}grad_norm"] = norm
        self.watch.good(values["loss"])
        if self.ema is not None:
            self.ema.update(self.main.bare, self.step + 1)
        return values

    def _gradients(self, part: Part, batch: Batch, buffers: list[list[Tensor]]) -> dict[str, float]:
        """Accumulate gradients over micro-batches; when memory runs out, once more with half the micro-batch."""
        while True:
            try:
                return self._accumulate(part, batch.tensors)
            except RuntimeError as error:
                if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                    raise
                size = self.micro
            if size == 1 or self.accelerator.num_processes > 1:
                advice = "lower loop.micro_batch" if size > 1 else "use smaller images or loop.precision=bf16"
                samples = "1 sample" if size == 1 else f"{size} samples"
                raise MemoryLimitError(f"out of memory with {samples} in a forward pass; {advice}")
            part.optimizer.zero_grad()
            self._restore(buffers)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.micro = math.ceil(size / 2)
            self.log.note(
                self.step, f"out of memory: micro-batch {size} -> {self.micro}, same effective batch"
            )

    def _accumulate(self, part: Part, tensors: Sample) -> dict[str, float]:
        loop, nets = self.config.loop, {p.name: p.net for p in self.parts}
        count = len(next(iter(tensors.values())))
        starts = range(0, count, self.micro)
        totals: dict[str, Tensor] = {}
        for number, first in enumerate(starts):
            last = number == len(starts) - 1
            piece = {
                name: self._to_device(value[first : first + self.micro]) for name, value in tensors.items()
            }
            if part is self.main and self.ema is not None and isinstance(self.task, task.Consulting):
                piece = self.task.consult(self.evaluating, piece, self.step / self.steps_per_epoch)
            weight = min(self.micro, count - first) / count
            place = (self.step, number, self.accelerator.process_index)
            seed_all(mix(loop.seed, "step", part.name, self.position.order, *place))
            with nullcontext() if last else self.accelerator.no_sync(part.net):
                loss, logs = self.task.loss(part.name, nets, piece)
                self.accelerator.backward(loss * weight)
            for name, value in {"loss": loss, **logs}.items():
                totals[name] = totals.get(name, 0) + value.detach().float() * weight
        reduced = self.accelerator.reduce(torch.stack([*totals.values()]), "mean")
        return dict(zip(totals, reduced.tolist(), strict=True))

    def _to_device(self, value: Tensor) -> Tensor:
        value = value.to(self.accelerator.device, non_blocking=True)
        if self.config.loop.channels_last and value.ndim == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        return value

    def _norm(self, part: Part) -> float:
        """Norm of the whole gradient, before it is clipped here."""
        self.accelerator.unscale_gradients(part.optimizer)
        params = [p for p in part.bare.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in params if p.grad is not None])
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        if self.config.optim.clip_norm is not None:
            clip_grads_with_norm_(params, self.config.optim.clip_norm, norm)
        return float(norm)

    def _overflow(self, loss: float, norm: float) -> bool:
        """Whether this is fp16's ordinary overflow, which the loss scaler leaves out by itself."""
        scaler = self.accelerator.scaler
        if scaler is None or not math.isfinite(loss) or math.isfinite(norm) or scaler.get_scale() < 1:
            return False
        self.watch.overflow += 1
        return True

    def _leave_out(self, part: Part, buffers: list[list[Tensor]], why: str, loss: float, norm: float) -> None:
        self.watch.skip(loss, norm)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        part.optimizer.zero_grad()
        self._restore(buffers)
        self.log.note(self.step, f"step {self.step}: update left out, {why}")

    def _restore(self, buffers: list[list[Tensor]]) -> None:
        """Undo what the forward pass did to running statistics: one NaN there would never leave."""
        for part, saved in zip(self.parts, buffers, strict=True):
            for buffer, value in zip(part.buffers, saved, strict=True):
                buffer.copy_(value)

    # -- the run -----------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """From where the run stands to its last step."""
        loop = self.config.loop
        started = time.monotonic() - self.seconds
        batches = self.batches()
        with self.log.bar(self.total, self.step), interruptions() as caught:
            while self.step < self.total:
                batch = next(batches)
                values = self.update(batch)
                self._note_corrupt(batch)
                if self.watch.bad >= self.config.guard.in_a_row:
                    self.roll_back(f"{self.watch.bad} updates in a row left out")
                    batches = self.batches()
                    continue
                self.step, self.position = self.step + 1, batch.after
                self.seconds = time.monotonic() - started
                self._record(values)
                every = loop.validate_every or self.steps_per_epoch
                last = self.step == self.total
                validated = last or self.step % every == 0
                due = self.step % loop.checkpoint_every == 0 if loop.checkpoint_every else validated
                if (validated or due) and (why := self.unsound()):
                    self.roll_back(why)
                    batches = self.batches()
                    continue
                improved = validated and self.validate()
                if last or improved or (due and not self.watch.bad):
                    self.save()
                if self._stopped(caught):
                    if not self.unsound():
                        self.save()
                    raise Interrupted(f"stopped at step {self.step}; the same command continues")

    def _record(self, values: dict[str, float] | None) -> None:
        for name, value in (values or {}).items():
            total = self.window.setdefault(name, [0.0, 0])
            total[0] += value
            total[1] += 1
        rate = float(self.main.optimizer.param_groups[0]["lr"])
        if values:
            self.log.advance(self.step, values["loss"], rate)
        if self.step % self.config.loop.log_every == 0 and self.window:
            means = {name: total / count for name, (total, count) in self.window.items()}
            epoch = self.step / self.steps_per_epoch
            counts = {"skipped": self.watch.skipped, "corrupt": self.watch.corrupt}
            self.log.scalars("train", self.step, {"epoch": epoch, "lr": rate, **means, **counts})
            self.window = {}

    def _note_corrupt(self, batch: Batch) -> None:
        for text in batch.corrupt:
            self.watch.corrupt += 1
            self.log.note(self.step, f"skipped {text}")
        if self.watch.corrupt > self.config.guard.corrupt:
            raise DivergedError(
                f"{self.watch.corrupt} samples could not be read (guard.corrupt={self.config.guard.corrupt})"
            )

    def _stopped(self, caught: list[int]) -> bool:
        if self.accelerator.num_processes == 1:
            return bool(caught)
        flag = torch.tensor(float(bool(caught)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def unsound(self) -> str | None:
        """Why the weights of now must be neither saved nor measured, or None; the same for all processes."""
        weights = {
            f"{part.name}.{name}": p for part in self.parts for name, p in part.bare.named_parameters()
        }
        bad = nonfinite({name: p.to_local() if hasattr(p, "to_local") else p for name, p in weights.items()})
        count = torch.tensor(float(len(bad)), device=self.accelerator.device)
        if not self.accelerator.reduce(count, "sum"):
            return None
        return told(bad, len(weights)) if bad else "weights of another process hold NaN or infinity"

    def tell(self) -> None:
        """Pass on what the task has to say."""
        while self.task.notes:
            self.log.note(self.step, self.task.notes.pop(0))

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The network as it would be released: averaged weights, eval mode."""
        with self.ema.applied(self.main.bare) if self.ema is not None else nullcontext():
            self.main.net.eval()
            self.main.share_buffers()
            try:
                yield self.main.bare
            finally:
                self.main.net.train()

    def validate(self, limit: int | None = None) -> bool:
        """Measure, log and draw samples; returns whether this is the best so far."""
        with self.evaluating() as model, torch.no_grad():
            self.metrics = self.task.validate(model, self.accelerator, limit, self.log.validating)
            if self.accelerator.is_main_process and not self.sharded:
                folder = self.out / "samples" / f"step_{self.step:08d}"
                with state.naming(folder):
                    self.task.samples(model, folder)
        self.tell()
        epoch = self.step / self.steps_per_epoch
        self.log.scalars(
            "validation", self.step, {"epoch": epoch, **self.metrics, "seconds": round(self.seconds, 1)}
        )
        value = self.metrics.get(self.task.metric, math.nan)  # nothing is held out: no best either
        if not math.isfinite(value):
            return False
        sign = 1 if self.task.higher_is_better else -1
        if self.best is not None and sign * value <= sign * self.best["value"]:
            return False
        self.best = {"step": self.step, "value": value}
        return True

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of now. Every process takes part, the main one writes."""
        tensors: dict[str, state.Tensors] = {}
        trees = {}
        for part in self.parts:
            tensors[part.name] = state.whole(part.bare.state_dict())
            trees[part.name], content = state.pack(part.optimizer.optimizer.state_dict())
            tensors[part.optimizer_file] = state.whole(content)
        if self.ema is not None:
            tensors["ema"] = state.whole(self.ema.average)
        if self.accelerator.is_main_process:
            state.write(self.checkpoints, self.step, tensors, {**self._facts(), "optimizers": trees})
            self.prune()
        self.accelerator.wait_for_everyone()

    def prune(self) -> None:
        """Remove checkpoints that are neither among the newest nor the best."""
        state.prune(self.checkpoints, self.config.loop.keep, self.best["step"] if self.best else None)

    def _facts(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "position": asdict(self.position),
            "watch": self.watch.state(),
            "window": self.window,
            "metrics": self.metrics,
            "best": self.best,
            "seconds": self.seconds,
            "micro": self.micro,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "batch_size": self.config.loop.batch_size,
            "world": self.accelerator.num_processes,
        }

    def load(self, path: Path) -> None:
        """Continue from the checkpoint `path`, bit for bit if the config is the same."""
        tensors, facts = state.read(path)
        for part in self.parts:
            if part.name not in tensors or part.optimizer_file not in tensors:
                raise state.CheckpointError(
                    f"{path} has no {part.name!r}; it has {', '.join(sorted(tensors))}"
                )
            state.load_into(part.bare.state_dict(), tensors[part.name], part.name)
            saved = state.unpack(facts["optimizers"][part.name], tensors[part.optimizer_file])
            load_optimizer(part.optimizer.optimizer, saved)
        if self.ema is not None:
            state.load_into(self.ema.average, tensors.get("ema", tensors["model"]), "ema")
        if self.accelerator.scaler is not None and facts["scaler"]:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        self.step, self.position = facts["step"], Position(**facts["position"])
        self.watch, self.window = Watch(**facts["watch"]), facts["window"]
        self.metrics, self.best, self.seconds = facts["metrics"], facts["best"], facts["seconds"]
        now = self.config.loop.batch_size, self.accelerator.num_processes
        if (facts["batch_size"], facts["world"]) == now:
            self.micro = min(self.micro, facts["micro"])
        elif facts["world"] != now[1]:
            was = f"{path.name} is of {facts['world']} processes, here {now[1]}"
            self.task.notes.append(f"{was}: the same global batches, other draws and roundings in them")

    def roll_back(self, why: str) -> None:
        """Back to the last good checkpoint, from there on with another data order; `why` goes to the log.

        Raises: DivergedError: this happened more than `guard.rollbacks` times since that checkpoint.
        """
        path, skipped = state.newest(self.checkpoints)
        for text in skipped:
            self.log.note(self.step, text)
        if path is None:
            raise DivergedError("training went astray and there is no valid checkpoint to go back to")
        at, now = self.step, self.watch
        self.load(path)
        rollbacks = now.rollbacks + 1
        if rollbacks - self.watch.rollbacks > self.config.guard.rollbacks:
            raise DivergedError(
                f"training went astray {rollbacks - self.watch.rollbacks} times after step {self.step}; "
                "lower optim.lr, or set optim.clip_norm"
            )
        self.watch = replace(now, bad=0, rollbacks=rollbacks, mean=self.watch.mean, seen=self.watch.seen)
        # the order is the number of rollbacks, so a killed run that meets the same trouble again goes the same way
        self.position = replace(self.position, order=rollbacks)
        self.log.rewind(self.step)
        self.log.note(self.step, f"step {at}: {why}; back to step {self.step}")
