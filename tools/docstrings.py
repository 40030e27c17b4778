"""For the API page: our docstrings as mkdocstrings' Google parser wants them.

We write `Returns: what` and `Raises: ValueError: why` on one line where they fit; the parser knows sections only as indented blocks
with an empty line before them.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

SECTION = re.compile(r"^(Args|Returns|Raises|Source):[ \t]*(.*)$", re.MULTILINE)


def blocks(text: str) -> str:
    """`text` with every section a block of its own."""
    text = SECTION.sub(lambda m: f"\n{m[1]}:\n" + (f"    {m[2]}\n" if m[2] else ""), text)
    return re.sub(r":\n\n+(?=    )", ":\n", text)


class Blocks(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = blocks(obj.docstring.value)
