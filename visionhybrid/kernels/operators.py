"""What every registered operator here shares: no autocast inside, no second derivative without a word, a count of operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

# torch 2.11 counts softmax attention on GPUs only; later ones count it themselves.
_aten, _counts = torch.ops.aten, flop_registry
_counts.setdefault(
    _aten._scaled_dot_product_flash_attention_for_cpu, _counts[_aten._scaled_dot_product_flash_attention]
)
_counts.setdefault(
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    _counts[_aten._scaled_dot_product_flash_attention_backward],
)

# What the bodies of a family take and return, by the family's name.
_SCHEMAS: dict[str, str] = {}


def register(name: str, body: Callable[..., Any], family: str | None = None) -> Any:
    """`body` as the operator `visionhybrid::name`; its first argument is a tensor. Annotations give the schema.

    `family`: several bodies of one schema, that of the first, whose annotations the others need not repeat.
    """

    @wraps(body)
    def without_autocast(*args: Any) -> Any:
        # Autocast reaches into an operator and would round the float32 sums inside; Triton launches on the current GPU,
        # whichever holds the tensors.
        with torch.autocast(args[0].device.type, enabled=False), torch.cuda.device_of(args[0]):
            return body(*args)

    schema = _SCHEMAS.get(family or name) or torch.library.infer_schema(body, mutates_args=())
    _SCHEMAS[family or name] = schema
    return torch.library.custom_op(f"visionhybrid::{name}", without_autocast, mutates_args=(), schema=schema)


def end_of_derivatives(backward_op: Any, op: str) -> None:
    """Makes a derivative of `op`'s gradient an error that says so, instead of a missing kernel."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{op}: second derivatives are not implemented; backend='reference' has them"
        )

    backward_op.register_autograd(refuse)


def count_operations(name: str) -> Callable[[Callable[..., int]], Any]:
    """Decorates a function that gives the floating-point operations (twice the multiply-adds) of a call of `visionhybrid::name`.

    It gets the operator's arguments, shapes instead of tensors, for torch's FlopCounterMode.
    """
    return register_flop_formula(getattr(torch.ops.visionhybrid, name))
