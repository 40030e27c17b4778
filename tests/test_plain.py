"""The forms of operators that are exported to ONNX, against the definitions."""

import pytest
import torch

from visionhybrid.kernels.neighborhood_attention import plain as neighborhood
from visionhybrid.kernels.neighborhood_attention import reference as neighborhood_reference
from visionhybrid.kernels.selective_scan import plain as scan
from visionhybrid.kernels.selective_scan import selective_scan


@pytest.mark.parametrize(
    ("spatial", "kernel", "dilation"),
    [((13, 17), [5, 5], [2, 3]), ((3, 20), [7, 5], [1, 4]), ((1, 1), [3, 3], [1, 1]), ((11,), [4], [3])],
)
@pytest.mark.parametrize("table", [False, True])
def test_neighborhood_halves(spatial, kernel, dilation, table):
    q, k, v = (torch.randn(2, 3, *spatial, 6, dtype=torch.float64) for _ in range(3))
    rpb = torch.randn(3, *(2 * side - 1 for side in kernel), dtype=torch.float64) if table else None
    args = (q, k, rpb, kernel, dilation, 0.7)
    want = neighborhood_reference.scores(*args)
    torch.testing.assert_close(neighborhood.scores(*args), want)
    weights = want.softmax(-1)
    torch.testing.assert_close(
        neighborhood.aggregate(weights, v, kernel, dilation),
        neighborhood_reference.aggregate(weights, v, kernel, dilation),
    )


@pytest.mark.parametrize("length", [1, 2, 37, 64])
@pytest.mark.parametrize("output", [False, True])
def test_scan(length, output):
    u, delta, B, C = (
        torch.randn(2, *shape, length, dtype=torch.float64) for shape in ((6,), (6,), (2, 3), (2, 3))
    )
    A, D, bias = -torch.rand(6, 3).double(), torch.randn(6).double(), torch.randn(6).double()
    tail = (C, D) if output else (None, None)
    want = selective_scan(
        u,
        delta,
        A,
        B,
        *tail,
        delta_bias=bias,
        delta_softplus=True,
        reverse=[False, True],
        backend="reference",
    )
    torch.testing.assert_close(scan.forward(u, delta, A, B, *tail, bias, True, [False, True]), want)
