"""The mixers by name. A mixer file registers its class with one decorator; `create` builds from JSON-able options."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from visionhybrid.mixers.base import About, Mixer

M = TypeVar("M", bound=type[Mixer])

MIXERS: dict[str, About] = {}
_FROM_HOST = {"self", "dim", "heads", "head_dim"}


def register(name: str, **facts: Any) -> Callable[[M], M]:
    """Decorator: makes a class known as `name`; `facts` are the fields of `About` beside name, class and options."""

    def add(mixer: M) -> M:
        parameters = inspect.signature(mixer.__init__).parameters.values()
        options = {p.name: p.default for p in parameters if p.name not in _FROM_HOST}
        mixer.about = MIXERS[name] = About(name=name, mixer=mixer, options=options, **facts)
        return mixer

    return add


def about(name: str) -> About:
    """What is known of a mixer. ValueError for a name that is not registered."""
    if name not in MIXERS:
        raise ValueError(f"no mixer {name!r}{_hint(name, MIXERS)}; have {', '.join(list_mixers())}")
    return MIXERS[name]


def list_mixers() -> list[str]:
    """The registered names, sorted."""
    return sorted(MIXERS)


def create(name: str, *, dim: int, heads: int, head_dim: int, **options: Any) -> Mixer:
    """The mixer `name` for hidden states of `dim` channels in `heads` heads of `head_dim`.

    The module keeps its complete options, defaults included, as `.options`: JSON-able, and enough to build it again.

    Raises:
        ValueError: no such mixer or option, or a value that it cannot take; the message suggests the nearest name.
    """
    facts = about(name)
    for option in options:
        if option not in facts.options:
            has = ", ".join(facts.options)
            raise ValueError(f"{name} has no option {option!r}{_hint(option, facts.options)}; have {has}")
    given = {**facts.options, **options}
    try:
        complete = json.loads(json.dumps(given))
    except TypeError as error:
        raise ValueError(f"{name}: options are saved as JSON, got {options}") from error
    mixer = facts.mixer(dim=dim, heads=heads, head_dim=head_dim, **complete)
    mixer.options = complete
    return mixer


def _hint(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
