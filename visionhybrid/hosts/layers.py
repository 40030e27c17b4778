"""One attention module as a host sees it, and the words by which a caller picks some of them."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod

from torch import nn

from visionhybrid.mixers import Mixer, create

__all__ = ["IMAGE_SIDES", "VIDEO_SIDES", "Layer", "SampleSize", "Selector", "choose", "sides"]

SampleSize = int | tuple[int, ...] | None
IMAGE_SIDES, VIDEO_SIDES = ("height", "width"), ("frames", "height", "width")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One attention module of a model. `reason` says why no mixer can take its place; None if one can."""

    name: str  # qualified, as in `model.named_modules()`
    module: nn.Module = field(repr=False, compare=False)
    dim: int  # channels of the hidden states
    heads: int
    head_dim: int
    grid: tuple[int, ...] | None = None  # sides of its image in tokens at `sample_size`, None if unknown
    own: str = "softmax"  # the mixer that computes, under its default options, what the model does by itself
    axes: int = 2  # of its grid: 2 for images, 3 for video
    joint: bool = False  # text tokens are mixed with the image's
    whole: bool = False  # its keys are no tokens that ranks share: cross attention
    masked: bool = False  # every call has a mask, of padded text
    beside: bool = False  # what a mixer makes of the hidden states beside its attention is added
    reason: str | None = None

    @property
    def tokens(self) -> int | None:
        """Image tokens at the size that the grid was worked out for."""
        return None if self.grid is None else prod(self.grid)

    def speedup(self, mixer: Mixer) -> float | None:
        """Multiplications of softmax attention at this layer's size over those of `mixer`; None without a size."""
        if self.grid is None or not prod(self.grid):
            return None
        full = create("softmax", dim=self.dim, heads=self.heads, head_dim=self.head_dim)
        return full.cost(grid=self.grid).macs / max(mixer.cost(grid=self.grid).macs, 1)


def sides(model: nn.Module, size: SampleSize, names: Sequence[str] = IMAGE_SIDES) -> tuple[int, ...] | None:
    """A caller's `sample_size` as one number for each of `names`, or None for the model's own; one number means a square.

    Raises:
        ValueError: other numbers.
    """
    if size is None:
        return None
    found = (size, size) if isinstance(size, int) else tuple(size)
    if len(found) != len(names) or min(found) < 1:
        wanted = ", ".join(names)
        raise ValueError(f"sample_size of {type(model).__name__} is ({wanted}), each positive, got {size}")
    return found


Selector = str | Callable[[Layer], bool] | Sequence["Selector"]

_RULE = re.compile(r"\s*(tokens|dim|heads|head_dim)\s*(>=|<=|==|>|<)\s*(\d+)\s*")
_COMPARE = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}


def choose(layers: Sequence[Layer], selector: Selector | None, who: str = "attach") -> list[Layer]:
    """The replaceable layers that `selector` means, in the model's order; see `visionhybrid.attach`.

    Raises:
        ValueError: a word that means no layer, or only layers that cannot be replaced; says which and why.
    """
    free = [layer for layer in layers if layer.reason is None]
    if selector is None:
        if not free:
            raise ValueError(f"{who}: nothing here can be replaced{_reasons(layers)}")
        return free
    if callable(selector):
        return [layer for layer in free if selector(layer)]
    if not isinstance(selector, str):
        wanted = {layer.name for part in selector for layer in choose(layers, part, who)}
        return [layer for layer in free if layer.name in wanted]
    rule = _RULE.fullmatch(selector)
    if rule:
        return _by_rule(free, *rule.groups(), who=who)
    named = [layer for layer in layers if matches(layer.name, selector)]
    if not named:
        near = difflib.get_close_matches(selector, _paths(layers), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{who}: no attention is called {selector!r}{hint} (`describe` lists them)")
    if all(layer.reason for layer in named):
        raise ValueError(f"{who}: {selector!r} names only what cannot be replaced{_reasons(named)}")
    return [layer for layer in named if layer.reason is None]


def matches(name: str, pattern: str) -> bool:
    """Whether a shell pattern means this module or one that holds it: "mid_block" means all below it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _by_rule(layers: Sequence[Layer], what: str, sign: str, number: str, *, who: str) -> list[Layer]:
    unknown = [layer.name for layer in layers if getattr(layer, what) is None]
    if unknown:
        raise ValueError(f"{who}: {what} of {unknown[0]} is not in the model's config; give sample_size=")
    return [layer for layer in layers if _COMPARE[sign](getattr(layer, what), int(number))]


def _paths(layers: Iterable[Layer]) -> list[str]:
    """Names of the layers and of all modules around them."""
    parts = [layer.name.split(".") for layer in layers]
    return list(dict.fromkeys(".".join(p[: n + 1]) for p in parts for n in range(len(p))))


def _reasons(layers: Iterable[Layer], show: int = 4) -> str:
    """ ": a.attn2: cross attention; b.attn2: ... and 12 more"."""
    said = [f"{layer.name}: {layer.reason}" for layer in layers if layer.reason]
    more = f" and {len(said) - show} more" if len(said) > show else ""
    return ": " + "; ".join(said[:show]) + more if said else ""
