"""Window attention together with the projections around it, for inference on a CPU.

One row of windows at a time goes from the map through projection, attention and projection to the result. The joint q, k, v of
the map never exist (three times the map, always memory fresh from the system), and pixels are put in the order of windows
once, before they are projected.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from visionhybrid.kernels import dispatch
from visionhybrid.kernels.window_attention.eager import Rows
from visionhybrid.kernels.window_attention.grid import Grid


def suits(x: Tensor) -> bool:
    """Whether `x` is plain data on a CPU, of which no graph is made, and the eager backend is what would run."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and dispatch.PREFERRED in ("auto", "eager")
    )


def attention_in_bands(
    x: Tensor,
    before: Callable[[Tensor], Tensor],
    after: Callable[[Tensor], Tensor],
    bias: Tensor | None,
    *,
    num_heads: int,
    window_size: int,
    shift: int = 0,
    scale: float | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """after(window_attention(*before(x), bias, ...)), (B, H, W, C) -> (B, H, W, C').

    Args:
        before: joint projection of pixels, (B, H, W, C) -> (B, H, W, 3 * heads * D): all of q, then k, then v.
        after: of pixels, (B, H, W, heads * D) -> (B, H, W, C'). Both are given a row of windows at a time, as pixels in any order.
        bias, window_size, shift, scale: as in `window_attention`.
        onto: (B, H, W, C'), to which the result is added in place, and which is returned then.
    """
    size = (window_size, window_size)
    C = x.shape[3]
    grid = Grid(x, num_heads, bias, size, size, (shift, shift))
    attend, out = None, onto
    for b in range(len(x)):
        for row in range(grid.rows):
            pixels = grid.windows(x[b].unsqueeze(2), row, size).reshape(1, window_size, -1, C)
            qkv = before(pixels).reshape(grid.columns, *size, 3, num_heads, -1)
            if attend is None:
                head_dim = qkv.shape[5]
                attend = Rows(grid, qkv, qkv, head_dim**-0.5 if scale is None else scale)
            attended = attend(row, *qkv.unbind(3)).to(qkv.dtype)  # (columns, N, heads, D)
            pixels = after(attended.reshape(1, window_size, -1, num_heads * head_dim))
            if out is None:
                out = pixels.new_empty(*x.shape[:3], pixels.shape[3])
            band = grid.as_band(pixels.reshape(grid.columns, -1, pixels.shape[3]))
            grid.put(out[b], row, band, add=onto is not None)
    assert out is not None
    return out
