"""What every registered operator here shares: no autocast inside, no second derivative without a word."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def register(name: str, body: Callable[..., Any]) -> Any:
    """`body` as the operator `visionhybrid::name`; its first argument is a tensor. Annotations give the schema."""

    @wraps(body)
    def without_autocast(*args: Any) -> Any:
        # Autocast reaches into an operator and would round the float32 sums inside.
        with torch.autocast(args[0].device.type, enabled=False):
            return body(*args)

    schema = torch.library.infer_schema(body, mutates_args=())
    return torch.library.custom_op(f"visionhybrid::{name}", without_autocast, mutates_args=(), schema=schema)


def end_of_derivatives(backward_op: Any, op: str) -> None:
    """Makes a derivative of `op`'s gradient an error that says so, instead of a missing kernel."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{op}: second derivatives are not implemented; backend='reference' has them"
        )

    backward_op.register_autograd(refuse)
