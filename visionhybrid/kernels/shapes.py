"""Shape annotations of the public functions: enforced in tests (`VISIONHYBRID_CHECK=1`), inert elsewhere.

jaxtyping and beartype are needed by tests only; everywhere else `Float[Tensor, "b n d"]` stays an unread string.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
CHECK = os.environ.get("VISIONHYBRID_CHECK") == "1"

if TYPE_CHECKING or CHECK:
    from jaxtyping import Bool, Float, Int
else:
    Bool = Float = Int = None

__all__ = ["Bool", "Float", "Int", "checked"]


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, its annotated shapes checked at every eager call if `VISIONHYBRID_CHECK=1`, else untouched."""
    if not CHECK:
        return function
    from beartype import beartype
    from jaxtyping import jaxtyped

    strict = jaxtyped(typechecker=beartype)(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        # Tracing sees the plain function: the checkers are no part of a graph.
        return (function if torch.compiler.is_compiling() else strict)(*args, **kwargs)

    return wrapper
