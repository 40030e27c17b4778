"""The selective scan of Mamba: a linear recurrence whose decay and input depend on the token.

Sources: Gu and Dao, arXiv:2312.00752 (section 3); state-spaces/mamba@e9594ce `selective_scan_ref`; the variant that returns
the states: LMMMEng/A2Mamba@a9ea14c; several scans in one call: MzeroMiko/VMamba@2ed52ea (SS2D).
Differences: any state size also for the states' gradients (the A2Mamba extension is right for one state only); bias and
softplus are applied in float32; a direction for each group, so that cross-scans need no flipped copies; sums in a fixed
order (the CUDA kernels use atomics).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from visionhybrid.kernels.dispatch import pick
from visionhybrid.kernels.precision import autocast
from visionhybrid.kernels.selective_scan import eager, native, plain, reference
from visionhybrid.kernels.shapes import Float, checked

BACKENDS: dict[str, Any] = {"reference": reference, "eager": eager, "native": native}
if find_spec("triton"):  # it exists for Linux only
    from visionhybrid.kernels.selective_scan import triton

    BACKENDS["triton"] = triton


def arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    D: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool | Sequence[bool] = False,
) -> tuple[Any, ...]:
    """The checked, complete arguments that every backend takes."""
    u, delta, B, C = autocast(u, delta, B, C)
    if u.ndim != 3 or 0 in u.shape[1:] or not u.is_floating_point():
        raise ValueError(
            f"selective_scan: u must be (batch, channels, length), floating, not empty, got {u.dtype} {tuple(u.shape)}"
        )
    batch, channels, length = u.shape
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(
            f"selective_scan: A must be ({channels}, N) for u {tuple(u.shape)}, got {tuple(A.shape)}"
        )
    # One group may be left out of the shape.
    B = B[:, None] if B.ndim == 3 else B
    C = C[:, None] if C is not None and C.ndim == 3 else C
    if B.ndim != 4 or B.shape[1] == 0 or channels % B.shape[1]:
        raise ValueError(
            f"selective_scan: B must be (batch, groups, N, length) with groups dividing {channels}, got {tuple(B.shape)}"
        )
    groups = B.shape[1]
    grouped = (batch, groups, A.shape[1], length)
    expected = {
        "delta": (delta, tuple(u.shape), (u.dtype,)),
        "A": (A, tuple(A.shape), (u.dtype, torch.float32)),
        "B": (B, grouped, (u.dtype,)),
        "C": (C, grouped, (u.dtype,)),
        "D": (D, (channels,), (u.dtype, torch.float32)),
        "delta_bias": (delta_bias, (channels,), (u.dtype, torch.float32)),
    }
    for name, (x, shape, kinds) in expected.items():
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(
                f"selective_scan: {name} must be {shape} for u {tuple(u.shape)}, got {tuple(x.shape)}"
            )
        if x is not None and x.dtype not in kinds:
            wanted = " or ".join(str(kind) for kind in dict.fromkeys(kinds))
            raise ValueError(f"selective_scan: {name} must be {wanted} beside u of {u.dtype}, got {x.dtype}")
    if D is not None and C is None:
        raise ValueError(
            "selective_scan: D adds to the output; without C the states are returned, add D u yourself"
        )
    directions = [reverse] * groups if isinstance(reverse, bool) else list(reverse)
    if len(directions) != groups:
        raise ValueError(f"selective_scan: reverse needs one value a group ({groups}), got {len(directions)}")
    return u, delta, A, B, C, D, delta_bias, bool(delta_softplus), directions


@checked
def selective_scan(
    u: Float[Tensor, "batch channels length"],
    delta: Float[Tensor, "batch channels length"],
    A: Float[Tensor, "channels n"],
    B: Float[Tensor, "batch groups n length"] | Float[Tensor, "batch n length"],
    C: Float[Tensor, "batch groups n length"] | Float[Tensor, "batch n length"] | None = None,
    D: Float[Tensor, " channels"] | None = None,
    *,
    delta_bias: Float[Tensor, " channels"] | None = None,
    delta_softplus: bool = False,
    reverse: bool | Sequence[bool] = False,
    backend: str = "auto",
) -> Float[Tensor, "batch channels length"] | Float[Tensor, "batch channels n length"]:
    """h_t = exp(d_t A) h_{t-1} + d_t B_t u_t,  y_t = C_t . h_t + D u_t;  d = softplus(delta + delta_bias), h_{-1} = 0.

    Args:
        u, delta: (batch, channels, L), one dtype with B and C; any strides.
        A: (channels, N), real, usually -exp(A_log). A, D and delta_bias may be float32 beside half-precision u.
        B, C: (batch, groups, N, L) or, for one group, (batch, N, L). Channel c belongs to group c // (channels / groups).
        delta_softplus: without it d is delta + delta_bias as given, and may be negative.
        reverse: run from the last token to the first; one for all, or one for each group. The four scans of a cross-scan are
            one call with four groups, the reversed two sharing u, delta, B, C with their partners in token order.
        backend: "auto", "eager", "native" (C++, see `native.py`), "triton", or "reference" (float64, one step per token,
            differentiable twice). For ONNX "auto" takes `plain.py`.
    Returns: y (batch, channels, L) in the dtype of u; without C the states h (batch, channels, N, L), float32 for half
        precision. Steps, decays and states are float32 throughout (float64 for float64): h sums hundreds of tokens.
        Under autocast u, delta, B, C are cast to its type first.
    Raises: ValueError: shapes or dtypes disagree, or the named backend cannot run this call.
    """
    args = arguments(
        u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=delta_softplus, reverse=reverse
    )
    if backend == "auto" and torch.onnx.is_in_onnx_export():
        return plain.forward(*args)
    return pick("selective_scan", BACKENDS, backend, args).forward(*args)
