"""Checkpoints: renaming keys, opening files, finding the system and its options."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

Rule = tuple[str, str | Callable[[re.Match[str]], str] | None]


def rename(state: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """`state` under our names; values are untouched.

    Each key must match (`re.fullmatch`) a rule: the first that matches decides. A rule is `(pattern, new)`, where `new` is a
    template such as `r"stem.\\1"`, a function of the match, or None to drop the key on purpose.

    Raises:
        KeyError: no rule matches a key, or two keys get one name.
    """
    table = [(re.compile(pattern), new) for pattern, new in rules]
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        hit = next(((m, new) for pattern, new in table if (m := pattern.fullmatch(key))), None)
        if hit is None:
            raise KeyError(f"no rule renames {key!r}")
        match, new = hit
        if new is None:
            continue
        name = new(match) if callable(new) else match.expand(new)
        if name in renamed:
            raise KeyError(f"{key!r} would overwrite {name!r}")
        renamed[name] = value
    return renamed
