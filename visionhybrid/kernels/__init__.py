"""Operators that stand on their own, a folder each: `reference.py` is the definition, `eager.py` the CPU path, `triton.py` the GPU's.

`why("linear_attention", q, k, v)` says which backend would run a call here, and why another would not.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from visionhybrid.kernels.dispatch import OPERATORS, why

__all__ = ["OPERATORS", "operator", "why"]


def operator(name: str) -> Any:
    """The public function of an operator, imported when asked for.

    Its folder has the same name, so the package cannot also offer the function as an attribute: import it from there,
    `from visionhybrid.kernels.linear_attention import linear_attention`.
    """
    if name not in OPERATORS:
        raise ValueError(f"no operator {name!r} in visionhybrid.kernels; have {', '.join(OPERATORS)}")
    return getattr(import_module(f"{__name__}.{name}"), name)
