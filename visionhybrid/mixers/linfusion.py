"""LinFusion's generalised linear attention, whose gates act on the hidden states before the projections.

Paper: Liu et al., arXiv:2409.02097. Code: Huage001/LinFusion@62ef289 `src/linfusion/attention.py`. Parameters carry the
authors' names, so `"<i>.to_q_.0.weight"` of a published file is `to_q_.0.weight` here.
Differences: sums in float32; elu(x) + 1 is exp(x) below zero; padding can be masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from visionhybrid.kernels.linear_attention import linear_attention
from visionhybrid.mixers.base import Cost, Mixer, linear_cost
from visionhybrid.mixers.projection import Projection
from visionhybrid.mixers.registry import register
from visionhybrid.mixers.sharding import Shards


@register(
    "linfusion",
    purpose="linear attention with gated queries and keys, distilled into Stable Diffusion's UNets",
    paper="arXiv:2409.02097",
    source="Huage001/LinFusion@62ef289",
    license="Apache-2.0",
    grids=(),
    text=True,
    masks=True,
    parameters=True,
    training_free=False,
)
class LinFusion(Mixer):
    """out_i = p_i S / (p_i . z + 1e-4), S and z means of r_j^T v_j and r_j, p and r = elu + 1 of q and k.

    q and k are projections of `x + to_q_(x)` and `x + to_k_(x)`, which `hidden` gives.

    Args:
        mid_dim: width of the two networks; None is `dim` (SD 1.5, 2.1), SDXL's weights have `dim // 16`; -1 leaves them out,
            and then, as in the authors' code, `hidden` doubles x.
        zero_init: start the last layer of both networks at zero, so that q and k begin as the pretrained model's. The
            authors draw them as PyTorch does.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        head_dim: int,
        mid_dim: int | None = None,
        zero_init: bool = True,
    ) -> None:
        super().__init__(dim=dim, heads=heads, head_dim=head_dim)
        if mid_dim is not None and mid_dim != -1 and mid_dim < 1:
            raise ValueError(
                f"linfusion: mid_dim must be positive, None for dim, or -1 for no networks, got {mid_dim}"
            )
        self.mid_dim = dim if mid_dim is None else mid_dim
        self.to_q_, self.to_k_ = (_network(dim, self.mid_dim, zero_init) for _ in "qk")

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, dim) -> what goes to the projections of q and of k."""
        return _gated(x, self.to_q_), _gated(x, self.to_k_)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Sequence[int],
        text_tokens: int = 0,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        self.check(q, k, v, grid, text_tokens)
        # The authors divide S by the number of queries, z by that of keys; it shows where the two differ.
        scale = k.shape[2] / q.shape[2]
        return linear_attention(q, k, v, norm="linfusion", scale=scale, key_mask=key_mask)

    def sharded(
        self, q: Tensor, k: Tensor, v: Tensor, *, shards: Shards, key_mask: Tensor | None = None
    ) -> Tensor:
        own = None if key_mask is None else shards.own(key_mask)
        return linear_attention(q, k, v, norm="linfusion", key_mask=own, group=shards.group)

    def cost(self, *, grid: Sequence[int], text_tokens: int = 0, bytes_per: int = 2) -> Cost:
        tokens = text_tokens + prod(grid)
        mid = max(self.mid_dim, 0)
        networks = Cost(macs=4 * tokens * self.dim * mid, bytes=4 * tokens * (self.dim + mid) * bytes_per)
        return linear_cost(tokens, tokens, self, bytes_per) + networks


def _gated(x: Tensor, network: nn.Module) -> Tensor:
    """x + network(x), in the network's own output where that is a tensor of its own and of the same type."""
    y = network(x)
    return x + y if y is x or y.dtype != x.dtype else y.add_(x)


def _network(dim: int, mid: int, zero_init: bool) -> nn.Module:
    if mid == -1:
        return nn.Identity()
    network = nn.Sequential(
        Projection(dim, mid), nn.LayerNorm(mid), nn.LeakyReLU(inplace=True), Projection(mid, dim)
    )
    if zero_init:
        nn.init.zeros_(network[3].weight)
        nn.init.zeros_(network[3].bias)
    return network
