"""The one place that chooses a backend.

An operator is a folder `kernels/<op>/` whose `__init__.py` has the public function and `BACKENDS`: name -> module, slowest
first. A backend module has `unsupported(*args)`, the reason it cannot run this call or None, and `forward(*args)`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

# The folders beside this file that hold one.
OPERATORS = (
    "linear_attention",
    "neighborhood_attention",
    "selective_scan",
    "sparse_linear_attention",
    "window_attention",
)
# Read once: a lookup at every call would break `torch.compile(fullgraph=True)`.
PREFERRED = os.environ.get("VISIONHYBRID_BACKEND", "auto")
# Whether "auto" may take C++, which is compiled at the first call.
NATIVE = os.environ.get("VISIONHYBRID_NATIVE") == "1"


def pick(op: str, backends: Mapping[str, ModuleType], backend: str, args: tuple[Any, ...]) -> ModuleType:
    """The module that runs `op(*args)`.

    `backend="auto"` means `VISIONHYBRID_BACKEND` if that is set, else the last of `backends` that can run this call, never the
    reference. A named backend is taken or raises.

    Raises:
        ValueError: no such backend, or it cannot run this call; the message says why.
    """
    wanted = PREFERRED if backend == "auto" else backend
    if wanted != "auto":
        asked = "" if backend != "auto" else " (VISIONHYBRID_BACKEND)"
        if wanted not in backends:
            raise ValueError(f"{op}: no backend {wanted!r}{asked} here; have {', '.join(backends)}")
        reason = backends[wanted].unsupported(*args)
        if reason is not None:
            raise ValueError(f"{op}: backend {wanted!r}{asked} cannot run this call: {reason}")
        return backends[wanted]
    for name in reversed(list(backends)):
        if _automatic(name, args) and backends[name].unsupported(*args) is None:
            return backends[name]
    raise ValueError(f"{op}: no backend can run this call; {explain(backends, args)}")


def _automatic(name: str, args: tuple[Any, ...]) -> bool:
    """Whether "auto" may take this backend: never the reference, nor Triton on CPU tensors (its interpreter); C++ only if asked."""
    if name == "native":
        return NATIVE
    if name == "triton":
        return any(isinstance(arg, Tensor) and arg.device.type != "cpu" for arg in args)
    return name != "reference"


def explain(backends: Mapping[str, ModuleType], args: tuple[Any, ...]) -> dict[str, str]:
    """Backend name -> "chosen", "can run", or the reason it cannot run `args`."""
    reasons = {name: module.unsupported(*args) for name, module in backends.items()}
    able = [name for name, reason in reasons.items() if reason is None and _automatic(name, args)]
    said = {name: reason or "can run" for name, reason in reasons.items()}
    if PREFERRED in able:
        said[PREFERRED] = "chosen"
    elif PREFERRED == "auto" and able:
        said[able[-1]] = "chosen"
    return said


def why(op: str, *args: Any, **kwargs: Any) -> dict[str, str]:
    """What `visionhybrid.kernels.<op>(*args, **kwargs)` would run here: backend -> "chosen", "can run" or a reason.

    Raises:
        ValueError: there is no such operator, or the arguments are wrong for it.
    """
    if op not in OPERATORS:
        raise ValueError(f"why: no operator {op!r} in visionhybrid.kernels; have {', '.join(OPERATORS)}")
    module = importlib.import_module(f"{__package__}.{op}")
    return explain(module.BACKENDS, module.arguments(*args, **kwargs))
