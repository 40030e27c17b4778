"""Renaming keys by table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

Rule = tuple[str, str | Callable[[re.Match[str]], str] | None]


class UnknownKeysError(KeyError):
    """Keys for which a table has no rule."""

    def __init__(self, keys: list[str]) -> None:
        shown = ", ".join(repr(key) for key in keys[:8]) + (", ..." if len(keys) > 8 else "")
        super().__init__(f"no rule renames {shown}")
        self.keys = keys


def rename(state: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """`state` under our names; values are untouched.

    Each key must match (`re.fullmatch`) a rule: the first that matches decides. A rule is `(pattern, new)`, where `new` is a
    template such as `r"stem.\\1"`, a function of the match, or None to drop the key on purpose.

    Raises:
        UnknownKeysError: (a KeyError) some keys match no rule; all of them are named.
        KeyError: two keys get one name.
    """
    table = [(re.compile(pattern), new) for pattern, new in rules]
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, value in state.items():
        hit = next(((m, new) for pattern, new in table if (m := pattern.fullmatch(key))), None)
        if hit is None:
            unknown.append(key)
            continue
        match, new = hit
        if new is None:
            continue
        name = new(match) if callable(new) else match.expand(new)
        if name in renamed:
            raise KeyError(f"{key!r} would overwrite {name!r}")
        renamed[name] = value
    if unknown:
        raise UnknownKeysError(unknown)
    return renamed
