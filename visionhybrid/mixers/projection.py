"""The linear layer of mixers and of our own transformers."""

from __future__ import annotations

from torch import Tensor, nn

from visionhybrid.kernels.product import linear


class Projection(nn.Linear):
    """`nn.Linear` by the quicker matrix product, see `kernels.product`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
