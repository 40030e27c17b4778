"""Feed-forward networks of a diffusion transformer's blocks, by name in `FEED_FORWARD`.

Each takes (B, N, C) on a grid, or a rank's tokens of it, and gives the same shape.
"""

from __future__ import annotations

from collections.abc import Callable

from diffusers.models.transformers.sana_transformer import GLUMBConv
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from visionhybrid.mixers.base import Halo
from visionhybrid.mixers.hyena import CausalFilter
from visionhybrid.mixers.projection import Projection
from visionhybrid.mixers.sharding import Shards

Grid = tuple[int, int]


class FeedForward(nn.Module):
    """DiT's MLP."""

    def __init__(self, dim: int, ratio: float, *, tokens: int = 0) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1, self.act, self.fc2 = Projection(dim, hidden), nn.GELU("tanh"), Projection(hidden, dim)

    def forward(self, x: Tensor, grid: Grid, group: ProcessGroup | None = None) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class MixFeedForward(GLUMBConv):
    """SANA's Mix-FFN: a gated MLP with a 3x3 depthwise convolution over the image."""

    def __init__(self, dim: int, ratio: float, *, tokens: int = 0) -> None:
        super().__init__(dim, dim, ratio, norm_type=None, residual_connection=False)

    def forward(self, x: Tensor, grid: Grid, group: ProcessGroup | None = None) -> Tensor:
        if group is not None:  # this rank's tokens, that see one row more on either side
            around, own = Shards(group, grid).around(x.unsqueeze(1), Halo(1))
            return self(around.squeeze(1), (around.shape[2] // grid[1], grid[1]))[:, own]
        image = x.transpose(1, 2).unflatten(2, grid)  # (B, C, H, W)
        return super().forward(image).flatten(2).transpose(1, 2)


class HyenaFeedForward(nn.Module):
    """Hyena-X as a channel mixer: a product of three projections, filtered along the channels.

    keshik6/grafting@6ace8b5 `src/operators/mlp/mlp_hyena_x.py`; arXiv:2506.05340. Each of the `tokens` places has four taps of its
    own, that run over the channels of all three projections as one row. So only this many tokens can be mixed.
    """

    def __init__(self, dim: int, ratio: float, *, tokens: int) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.in_proj, self.out_proj = Projection(dim, 3 * hidden), Projection(hidden, dim)
        self.short_filter = CausalFilter(tokens, 4)

    def forward(self, x: Tensor, grid: Grid, group: ProcessGroup | None = None) -> Tensor:
        if group is not None:
            raise ValueError(
                "hyena feed-forward: has filters for all tokens, of which ranks would have a part"
            )
        if x.shape[1] != self.short_filter.in_channels:
            raise ValueError(
                f"hyena feed-forward: has filters for {self.short_filter.in_channels} tokens, got {x.shape[1]}"
            )
        q, k, v = self.short_filter(self.in_proj(x)).chunk(3, 2)
        return self.out_proj(q * k * v)


# name -> made of (dim, hidden over outer width, tokens of the grid it is trained on)
FEED_FORWARD: dict[str, Callable[..., nn.Module]] = {
    "mlp": FeedForward,
    "mix_ffn": MixFeedForward,
    "hyena": HyenaFeedForward,
}
