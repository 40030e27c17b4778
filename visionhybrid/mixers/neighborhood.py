"""Neighbourhood attention and its generalisation: windows that slide, stride or tile, over images and videos.

Papers: Hassani et al., arXiv:2204.07143, arXiv:2209.15001 (dilation), arXiv:2504.16922 (strides). Windows as SHI-Labs/NATTEN
@8c8729f cuts them: shifted inwards at borders, so that every query keeps its number of keys.
Text: every image query sees all of it beside its window (NATTEN's "additional keys"), text queries see everything.
FreeSwim's inward window (arXiv:2511.14712; WillWu111/FreeSwim@9f35a72) is `kernel_size=[None, 2 * h + 1, 2 * w + 1]` with
half-widths h and w, 15 and 26 for Wan at 480x832, and `scale=(log(3120, 1560) / head_dim) ** 0.5`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from visionhybrid.kernels.neighborhood_attention import neighborhood_attention
from visionhybrid.mixers.base import Cost, Halo, local_cost, per_axis
from visionhybrid.mixers.local import Local
from visionhybrid.mixers.registry import register


@register(
    "neighborhood",
    purpose="attention to a window around each token: sliding, strided, blocked, dilated, causal",
    paper="arXiv:2504.16922",
    source="SHI-Labs/NATTEN@8c8729f",
    license="MIT",
    grids=(1, 2, 3),
    text=True,
    masks=False,
    parameters=False,
    training_free=True,
)
class Neighborhood(Local):
    """out[x] = softmax over the keys of x's window (and the text).

    Args (each one value, or one for each axis of the grid):
        kernel_size: tokens of the window; None is the whole axis.
        stride: queries that share a window, at most `kernel_size`: 1 slides, `kernel_size` cuts the map into blocks.
        dilation: step between the keys of a window.
        causal: keys up to the query only.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        head_dim: int,
        scale: float | None = None,
        kernel_size: int | Sequence[int | None] | None = 13,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
    ) -> None:
        super().__init__(dim=dim, heads=heads, head_dim=head_dim, scale=scale)
        self.kernel_size, self.stride, self.dilation, self.causal = kernel_size, stride, dilation, causal

    def _windows(self, grid: Sequence[int]) -> dict[str, list[int]]:
        """The operator's keywords for this grid."""
        names = ("kernel_size", "stride", "dilation", "causal")
        given = {name: per_axis("neighborhood", name, getattr(self, name), len(grid)) for name in names}
        sizes = zip(given["kernel_size"], grid, strict=True)
        given["kernel_size"] = [side if size is None else size for size, side in sizes]
        return given

    def image(
        self, q: Tensor, k: Tensor, v: Tensor, text: tuple[Tensor, Tensor], *, scale: float | None
    ) -> Tensor:
        extra, windows = text if text[0].shape[2] else None, self._windows(q.shape[2:-1])
        return neighborhood_attention(q, k, v, extra=extra, scale=scale, **windows).flatten(2, -2)

    def halo(self, grid: Sequence[int]) -> Halo:
        size, stride, dilation, _ = (values[0] for values in self._windows(grid).values())
        return Halo(rows=(size + stride) * dilation, multiple=stride * dilation)

    def cost(self, *, grid: Sequence[int], text_tokens: int = 0, bytes_per: int = 2) -> Cost:
        given = self._windows(grid)
        axes = zip(grid, given["kernel_size"], given["dilation"], strict=True)
        keys = prod(min(size, -(-side // step)) for side, size, step in axes)
        return local_cost(prod(grid), text_tokens, keys, self, bytes_per)
