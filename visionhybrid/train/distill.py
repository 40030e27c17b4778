"""A student that imitates a teacher of the same build: by its outputs, by what chosen modules give, or module by module.

    found = imitate(student, teacher, names, inputs)       # both run on their own activations
    loss = task_loss(found.prediction) + 0.5 * found.output + 0.5 * found.features      # LinFusion's
    loss, each = regress(student, teacher, names, inputs)  # every module on the teacher's activations, one at a time

Sources: LinFusion arXiv:2409.02097 eq. 7 and Huage001/LinFusion@62ef289 src/train/distill.py; grafting arXiv:2506.05340
section 3 (the regression of single operators on the teacher's activations).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Inputs = tuple[Sequence[Any], Mapping[str, Any]]  # positional and keyword arguments of both networks


class Imitation(NamedTuple):
    """Mean squared distances to the teacher, float32 scalars. features: mean over the modules.

    A tuple, because FSDP2 of torch 2.11 does not find the tensors of a dataclass, and then gathers no weights for the
    backward pass.
    """

    prediction: Tensor  # of the student
    wanted: Tensor  # of the teacher, float32
    features: Tensor
    each: dict[str, Tensor]  # module -> its share of `features`, detached

    @property
    def output(self) -> Tensor:
        return F.mse_loss(self.prediction.float(), self.wanted)


@contextmanager
def watched(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What the named modules give in the forward passes inside, the last one of each."""
    seen: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: Any, out: Any) -> None:
        seen[name] = first(out)

    handles = [model.get_submodule(name).register_forward_hook(partial(note, name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def imitate(student: nn.Module, teacher: nn.Module, names: Sequence[str], inputs: Inputs) -> Imitation:
    """Distances of the student's output, and of the outputs of its modules `names`, to the teacher's."""
    args, kwargs = inputs
    with torch.no_grad(), watched(teacher, names) as wanted:
        target = first(teacher(*args, **kwargs)).float()
    with watched(student, names) as seen:
        prediction = first(student(*args, **kwargs))
    each = {name: F.mse_loss(seen[name].float(), wanted[name].float()) for name in names}
    features = torch.stack([*each.values()]).mean() if each else prediction.new_zeros((), dtype=torch.float32)
    return Imitation(prediction, target, features, {name: value.detach() for name, value in each.items()})


def relative(got: Tensor, wanted: Tensor) -> Tensor:
    """|got - wanted|^2 / |wanted|^2 of each image by itself, the mean: it does not depend on how a batch is shared."""
    return (_size(got - wanted) / _size(wanted).clamp_min(1e-12)).mean()


# name -> how far what a module gives is from what is wanted, both float32
REGRESSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relative": relative,
    "l1": F.l1_loss,
    "l2": F.mse_loss,
    "huber": F.huber_loss,
}


def regress(
    student: nn.Module,
    teacher: nn.Module,
    names: Sequence[str],
    inputs: Inputs,
    measure: Callable[[Tensor, Tensor], Tensor] = relative,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over `names` of how far the student's module(x) is from the teacher's module(x), x the teacher's activations.

    Where gradients are wanted they are computed as soon as the teacher passes a module, and only parameter gradients are
    kept: the activations of one module are held at a time, however many there are.

    Args:
        measure: of two outputs, a mean over the batch; by default the squared error over the squared size.
    Returns: the loss, and detached the share of each module.
    """
    args, kwargs = inputs
    each: dict[str, Tensor] = {}
    gradients: dict[str, list[Tensor]] = {}
    parameters = {
        name: [p for p in student.get_submodule(name).parameters() if p.requires_grad] for name in names
    }
    wanted = torch.is_grad_enabled()

    def compare(name: str, module: nn.Module, given: Any, keywords: Any, out: Any) -> None:
        target = first(out).float()
        with torch.set_grad_enabled(wanted):
            got = first(student.get_submodule(name)(*given, **keywords)).float()
            error = measure(got, target)
            if wanted and parameters[name]:
                gradients[name] = list(
                    torch.autograd.grad(error, parameters[name], allow_unused=True, materialize_grads=True)
                )
        each[name] = error.detach()

    handles = [
        teacher.get_submodule(name).register_forward_hook(partial(compare, name), with_kwargs=True)
        for name in names
    ]
    try:
        with torch.no_grad():
            teacher(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    loss = torch.stack([each[name] for name in names]).mean()
    if wanted:
        leaves = [p for name in gradients for p in parameters[name]]
        known = [g / len(names) for grads in gradients.values() for g in grads]
        loss = _WithGradients.apply(loss, known, *leaves)
    return loss, each


@contextmanager
def substituted(teacher: nn.Module, student: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Inside, the teacher runs with the student's modules in the place of its own: they get what its own get."""

    def instead(name: str, module: nn.Module, given: Any, keywords: Any, out: Any) -> Any:
        return student.get_submodule(name)(*given, **keywords)

    handles = [
        teacher.get_submodule(name).register_forward_hook(partial(instead, name), with_kwargs=True)
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _size(x: Tensor) -> Tensor:
    """Mean square of each row of a batch."""
    return x.square().flatten(1).mean(1)


def relative_error(student: nn.Module, teacher: nn.Module, inputs: Inputs) -> float:
    """|student - teacher|^2 / |teacher|^2 of the outputs."""
    return distance(output(student, inputs), output(teacher, inputs))


@torch.no_grad()
def output(model: nn.Module, inputs: Inputs) -> Tensor:
    """What `model` gives, float64."""
    args, kwargs = inputs
    return first(model(*args, **kwargs)).double()


def distance(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs|^2 / |theirs|^2."""
    return float((ours - theirs).square().sum() / theirs.square().sum().clamp_min(1e-30))


def first(out: Any) -> Tensor:
    """The tensor in what a module returns: itself, the first of a tuple, or `.sample`."""
    if isinstance(out, Tensor):
        return out
    return out[0]


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, known: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.known = known
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (None, None, *(grads[0] * value for value in ctx.known))
