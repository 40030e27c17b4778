"""Linear attention: normalised, non-causal, with the feature map inside.

Sources: Katharopoulos et al., arXiv:2006.16236 (eq. 5, without the causal mask); Huage001/LinFusion@62ef289;
NVlabs/Sana `LiteLA`; LiT, arXiv:2501.12976; fla-org/flash-bidirectional-linear-attention@dd22276.
Differences: sums and normaliser are float32 whatever the inputs' type; elu(x) + 1 is exp(x) below zero; padding counts
neither in the sums nor in the mean.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from visionhybrid.kernels.dispatch import pick
from visionhybrid.kernels.linear_attention import eager, plain, reference
from visionhybrid.kernels.precision import autocast
from visionhybrid.kernels.shapes import Bool, Float, checked

BACKENDS: dict[str, Any] = {"reference": reference, "eager": eager}
if find_spec("triton"):  # it exists for Linux only
    from visionhybrid.kernels.linear_attention import triton

    BACKENDS["triton"] = triton
FEATURE_MAPS = ("elu", "relu", "softmax", "identity")
# name -> how the sums are normalised, eps
NORMS = {
    "linfusion": ("mean", 1e-4),
    "fbla": ("mean", 1e-6),
    "sana": ("sum", 1e-15),
    "none": ("none", 0.0),
}


def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "elu",
    norm: str = "fbla",
    eps: float | None = None,
    scale: float = 1.0,
    key_mask: Tensor | None = None,
    rotated: tuple[Tensor, Tensor] | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Any, ...]:
    """The checked, complete arguments that every backend takes."""
    mode, default = _named("norm", norm, NORMS)
    _named("feature_map", feature_map, dict.fromkeys(FEATURE_MAPS))
    if rotated is not None and mode == "none":
        raise ValueError(
            "linear_attention: rotated concerns the numerator beside a normaliser, norm 'none' has none"
        )
    q_rotated, k_rotated = (None, None) if rotated is None else rotated
    tensors = autocast(q, k, v, q_rotated, k_rotated)
    _check(*tensors)
    B, M = k.shape[0], k.shape[2]
    if key_mask is not None and (tuple(key_mask.shape) != (B, M) or key_mask.dtype != torch.bool):
        raise ValueError(
            f"linear_attention: key_mask must be boolean {(B, M)}, got {key_mask.dtype} {tuple(key_mask.shape)}"
        )
    eps = default if eps is None else float(eps)
    return *tensors, key_mask, feature_map, mode, eps, float(scale), group


@checked
def linear_attention(
    q: Float[Tensor, "b heads n d"],
    k: Float[Tensor, "b heads m d"],
    v: Float[Tensor, "b heads m e"],
    *,
    feature_map: str = "elu",
    norm: str = "fbla",
    eps: float | None = None,
    scale: float = 1.0,
    key_mask: Bool[Tensor, "b m"] | None = None,
    rotated: tuple[Float[Tensor, "b heads n d"], Float[Tensor, "b heads m d"]] | None = None,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b heads n e"]:
    """out[i] = scale * p[i] S / (p[i] . z + eps), S = avg_j r[j]^T v[j], z = avg_j r[j], p = phi(q), r = phi(k).

    O((N + M) D E) operations and one (D, E + 1) state per head instead of N x M weights.

    Args:
        q: (B, heads, N, D). k: (B, heads, M, D). v: (B, heads, M, E). Floating point, one dtype; any strides.
        feature_map: phi: "elu" (elu(x) + 1), "relu", "softmax" (over D), "identity".
        norm: "linfusion" and "fbla" average over the M keys (eps 1e-4 and 1e-6, flash-bidirectional-linear-attention's),
            "sana" sums (eps 1e-15; LiT too), "none" sums and does not divide.
        eps: instead of the norm's own; absolute, beside a mean or a sum as the norm says.
        scale: multiplies the result. LinFusion's code divides S by the number of queries, not of keys: scale M / N.
        key_mask: (B, M), True for keys that count. Padding may hold anything, NaN too; a row without keys gives 0.
        rotated: (q~, k~) of the shapes of q and k, taken as they are instead of p and r in the numerator only: rotary
            embedding beside a positive normaliser (MLLA, RALA, SANA-Video).
        group: the sequence is sharded over these ranks: q, k, v, key_mask are this rank's tokens (any number of them), sums
            and means run over all. One all-reduce of heads x D x (E + 1) numbers forward, one backward.
        backend: "auto", "eager", "triton", or "reference" (N x M weights in float64, differentiable twice). While
            `torch.export` traces, "auto" takes `plain.py`: operations that ONNX knows.
    Returns: dtype of q, tokens and heads laid out as in q. Sums are kept in float32 (float64 for float64).
        Under autocast q, k, v are cast to its type first, as for `scaled_dot_product_attention`.
    Raises: ValueError: shapes or dtypes disagree, an option is unknown, or the named backend cannot run this call.
    """
    args = arguments(
        q,
        k,
        v,
        feature_map=feature_map,
        norm=norm,
        eps=eps,
        scale=scale,
        key_mask=key_mask,
        rotated=rotated,
        group=group,
    )
    if backend == "auto" and group is None and torch.compiler.is_exporting():
        return plain.forward(*args[:-1])
    return pick("linear_attention", BACKENDS, backend, args).forward(*args)


def _named(what: str, name: str, table: dict[str, Any]) -> Any:
    if name not in table:
        raise ValueError(f"linear_attention: no {what} {name!r}; have {', '.join(table)}")
    return table[name]


def _check(q: Tensor, k: Tensor, v: Tensor, q_rotated: Tensor | None, k_rotated: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"linear_attention: {name} must be (B, heads, tokens, dim), got {tuple(x.shape)}"
            )
        if 0 in x.shape[1:]:
            raise ValueError(f"linear_attention: {name} has an empty axis, got {tuple(x.shape)}")
    if not q.is_floating_point():
        raise ValueError(f"linear_attention: q must be floating point, got {q.dtype}")
    B, heads, _, D = q.shape
    M = k.shape[2]
    expected = [
        ("k", k, (B, heads, M, D)),
        ("v", v, (B, heads, M, v.shape[3])),
        ("rotated q", q_rotated, tuple(q.shape)),
        ("rotated k", k_rotated, (B, heads, M, D)),
    ]
    for name, x, shape in expected:
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(
                f"linear_attention: {name} must be {shape} beside q {tuple(q.shape)} and k {tuple(k.shape)}, "
                f"got {tuple(x.shape)}"
            )
        if x is not None and x.dtype != q.dtype:
            raise ValueError(f"linear_attention: q and {name} need one dtype, got {q.dtype} and {x.dtype}")
