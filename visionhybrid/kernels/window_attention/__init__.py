"""Softmax attention inside windows of a channels-last map.

Sources: shifted windows arXiv:2103.14030 (Swin), overlapping windows arXiv:2309.05239 (HAT, its OCAB).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import Tensor

from visionhybrid.kernels.dispatch import pick
from visionhybrid.kernels.precision import autocast
from visionhybrid.kernels.shapes import Float, checked
from visionhybrid.kernels.window_attention import eager, reference

BACKENDS: dict[str, Any] = {"reference": reference, "eager": eager}
if find_spec("triton"):  # it exists for Linux only
    from visionhybrid.kernels.window_attention import triton

    BACKENDS["triton"] = triton


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise ValueError(f"window_attention: {name} must be an int or (height, width), got {value!r}")
    return pair


def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    window_size: int | tuple[int, int],
    key_window_size: int | tuple[int, int] | None = None,
    shift: int | tuple[int, int] = 0,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """The checked, complete arguments that every backend takes."""
    op = "window_attention"
    q, k, v = autocast(q, k, v)
    window = _pair("window_size", window_size)
    reach = window if key_window_size is None else _pair("key_window_size", key_window_size)
    step = _pair("shift", shift)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 5:
            raise ValueError(f"{op}: {name} must be (B, H, W, heads, D), got shape {tuple(t.shape)}")
        if t.dtype != q.dtype or not t.is_floating_point():
            raise ValueError(
                f"{op}: q, k, v need one floating dtype, got {q.dtype} for q and {t.dtype} for {name}"
            )
        if t.shape[:4] != q.shape[:4]:
            raise ValueError(
                f"{op}: q, k, v differ in (B, H, W, heads): {tuple(q.shape[:4])} for q, {tuple(t.shape[:4])} for {name}"
            )
        if 0 in t.shape:
            raise ValueError(f"{op}: {name} is empty, got shape {tuple(t.shape)}")
    if q.shape[4] != k.shape[4]:
        raise ValueError(f"{op}: q and k need the same head dim, got {q.shape[4]} and {k.shape[4]}")
    for axis, side, w, e, s in zip(("H", "W"), q.shape[1:3], window, reach, step, strict=True):
        if w < 1 or side % w:
            raise ValueError(
                f"{op}: {axis} must be a multiple of the window {w}, got {side}; pad the map first"
            )
        if e < w or (e - w) % 2:
            raise ValueError(
                f"{op}: key_window_size must be window_size plus an even number, got {e} for window {w}"
            )
        if not 0 <= s < w:
            raise ValueError(f"{op}: shift must be in [0, {w}), got {s}")
    if any(step) and reach != window:
        raise ValueError(f"{op}: shift and key_window_size exclude each other, got {step} and {reach}")
    if bias is not None:
        expected = (q.shape[3], window[0] * window[1], reach[0] * reach[1])
        if tuple(bias.shape) != expected:
            raise ValueError(
                f"{op}: bias must be (heads, queries, keys) = {expected}, got {tuple(bias.shape)}"
            )
    return q, k, v, bias, window, reach, step, q.shape[4] ** -0.5 if scale is None else float(scale)


@checked
def window_attention(
    q: Float[Tensor, "b height width heads d"],
    k: Float[Tensor, "b height width heads d"],
    v: Float[Tensor, "b height width heads e"],
    bias: Float[Tensor, "heads queries keys"] | None = None,
    *,
    window_size: int | tuple[int, int],
    key_window_size: int | tuple[int, int] | None = None,
    shift: int | tuple[int, int] = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b height width heads e"]:
    """Attention of the tokens of each window to the keys of the same, or of a larger concentric, window.

    The map is cut into a grid of windows from its upper left corner. For each window and head

        out = softmax(scale * q k^T + bias + mask) v

    with queries in row-major order of the window, keys in row-major order of the key window. The attention matrix exists
    for a few windows at a time only, in the backward pass too, which computes it again.

    Args:
        q, k, v: maps, channels last; strided views (of a joint `qkv`, say) are welcome. One dtype.
        bias: added to the logits of every window, any floating dtype. Usually a relative position bias.
        window_size: tokens (height, width); the map's sides must be multiples of it.
        key_window_size: larger windows of keys and values, same centres, same grid. Keys outside the map are zeros that take
            part in the softmax with logit `bias` (not masked), as HAT's weights expect.
        shift: the map is rolled up and left by `shift` before it is cut and rolled back after; windows of the last row and
            column, which then hold pieces from opposite borders, get -100 between pieces, also where the map is one window
            high. (Minus 100, not infinity: the convention of Swin's and HAT's weights.)
        scale: default `d ** -0.5`.
        backend: "auto", "eager", "triton", or "reference" (slow, float64).
    Returns:
        dtype of `v`. Products accumulate in float32 (float64 for float64), float16 computes in float32 throughout.
    Raises:
        ValueError: shapes, dtypes or sizes disagree, or the named backend cannot run this call.
    Source: XPixelGroup/HAT@1638a9a `hat_arch.py`, `WindowAttention` and `OCAB`.
    """
    args = arguments(
        q, k, v, bias, window_size=window_size, key_window_size=key_window_size, shift=shift, scale=scale
    )
    return pick("window_attention", BACKENDS, backend, args).forward(*args)
