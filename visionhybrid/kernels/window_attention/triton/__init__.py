"""Window attention on a GPU: forward and backward by four kernels that read windows from the map where they lie.

The backward computes the weights again from q, k and the softmax's normaliser. No program adds into what another writes:
no atomics, the same result every time. With bfloat16 inputs the bias is rounded to bfloat16, as the eager backend does: its
reading is what bounds these kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from visionhybrid.kernels.window_attention import ops
from visionhybrid.kernels.window_attention.triton import kernels

INTERPRETED = triton.knobs.runtime.interpret
WIDEST = 128
# Programs to fill a GPU with when the windows are split; more than any has multiprocessors.
PROGRAMS = 512


def blocks(kernel: Any, queries: int, keys: int, D: int, E: int, exact: bool) -> dict[str, int]:
    """Tile sizes, warps and stages; larger tiles spill (tests/test_aot.py). `exact` float32 products lack matrix units."""
    block_d, block_e = (max(16, triton.next_power_of_2(width)) for width in (D, E))
    wide = max(block_d, block_e)
    sums_keys = kernel is kernels._bwd_kv
    if exact:
        rows, columns, warps = 32, 32, 4
        if wide > 64 and kernel in (kernels._bwd_q, kernels._bwd_kv):
            rows, warps = 16, 8
        elif wide > 64:
            warps = 8
        elif wide > 32 and sums_keys:
            rows = 16
    elif wide > 64:
        rows, columns, warps = (32, 32, 4) if sums_keys else (64, 32, 8)
    else:
        rows, columns, warps = 32 if sums_keys else 64, 64, 8 if kernel is kernels._bwd_bias else 4
    return dict(
        BLOCK_N=min(max(16, triton.next_power_of_2(queries)), rows),
        BLOCK_M=min(max(16, triton.next_power_of_2(keys)), columns),
        BLOCK_D=block_d,
        BLOCK_E=block_e,
        num_warps=warps,
        num_stages=1 if exact and wide > 64 and kernel is kernels._bwd_bias else 2,
    )


class _Call:
    """What all kernels of one call take alike."""

    def __init__(
        self,
        q: Tensor,
        v: Tensor,
        bias: Tensor | None,
        window: list[int],
        reach: list[int],
        shift: list[int],
        scale: float,
    ) -> None:
        B, H, W, heads, D = q.shape
        self.bias = bias
        if bias is not None:
            self.bias = (bias.to(q.dtype) if q.dtype == torch.bfloat16 else bias).contiguous()
        self.queries, self.keys = window[0] * window[1], reach[0] * reach[1]
        grid = (H // window[0], W // window[1])
        self.windows, self.heads = B * grid[0] * grid[1], heads
        self.sizes = (scale, (H, W), grid, heads, D, v.shape[4], tuple(shift))
        self.exact = q.dtype == torch.float32
        self.flags = dict(
            window=tuple(window),
            reach=tuple(reach),
            BIAS=bias is not None,
            SHIFTED=any(shift),
            PRECISION="ieee" if self.exact else "tf32",
        )

    def run(self, kernel: Any, tensors: tuple[Tensor | None, ...], maps: tuple[Tensor, ...]) -> None:
        """Launches a program a block of every window and head; the kernel takes strides of `maps`."""
        constants = self.constants(kernel)
        tokens = constants["BLOCK_M" if kernel is kernels._bwd_kv else "BLOCK_N"]
        programs = triton.cdiv(self.queries, tokens) * self.windows * self.heads
        kernel[programs,](*tensors, *self.sizes, *(x.stride() for x in maps), **constants)

    def constants(self, kernel: Any) -> dict[str, Any]:
        D, E = self.sizes[4:6]
        return self.flags | blocks(kernel, self.queries, self.keys, D, E, self.exact)

    def bias_gradient(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor
    ) -> Tensor:
        """Windows are split over programs, the parts added in a fixed order."""
        constants = self.constants(kernels._bwd_bias)
        tiles = triton.cdiv(self.queries, constants["BLOCK_N"]) * triton.cdiv(self.keys, constants["BLOCK_M"])
        splits = max(1, min(self.windows, triton.cdiv(PROGRAMS, tiles * self.heads)))
        per_program = triton.cdiv(self.windows, splits)
        parts = q.new_empty(splits, self.heads, self.queries, self.keys, dtype=torch.float32)
        kernels._bwd_bias[self.heads, tiles, splits](
            grad, q, k, v, self.bias, lse, delta, parts, *self.sizes, *(x.stride() for x in (grad, q, k, v)),
            self.windows, per_program, **constants,
        )  # fmt: skip
        return parts.sum(0)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: list[int],
    reach: list[int],
    shift: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output map, and log2 of each softmax's normaliser, (B, rows, columns, heads, N)."""
    call = _Call(q, v, bias, window, reach, shift, scale)
    out = v.new_empty(v.shape)
    lse = q.new_empty(q.shape[0], *call.sizes[2], call.heads, call.queries, dtype=torch.float32)
    call.run(kernels._fwd, (q, k, v, call.bias, out, lse), (q, k, v, out))
    return out, lse


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_learns: bool,
    window: list[int],
    reach: list[int],
    shift: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias (empty if nobody wants it)."""
    call = _Call(q, v, bias, window, reach, shift, scale)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    call.run(kernels._bwd_q, (grad, q, k, v, call.bias, out, lse, delta, dq), (grad, q, k, v, out, dq))
    call.run(kernels._bwd_kv, (grad, q, k, v, call.bias, lse, delta, dk, dv), (grad, q, k, v, dk, dv))
    dbias = call.bias_gradient(grad, q, k, v, lse, delta).to(bias.dtype) if bias_learns else q.new_empty(0)
    return dq, dk, dv, dbias


OPERATOR = ops.define("triton", attention, attention_backward)


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: Any, reach: Any, *options: Any
) -> str | None:
    if not (q.is_cuda or INTERPRETED):
        return "needs a GPU, or TRITON_INTERPRET=1"
    if q.dtype == torch.float64:
        return "computes in float32"
    if INTERPRETED and q.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    if max(q.shape[4], v.shape[4]) > WIDEST:
        return f"head dims end at {WIDEST}, got {max(q.shape[4], v.shape[4])}"
    if torch.compiler.is_exporting():
        return "an exported graph takes the plain operators of the eager backend"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: Any, reach: Any, shift: Any, scale: float
) -> Tensor:
    return OPERATOR(q, k, v, bias, [*window], [*reach], [*shift], scale)[0]
