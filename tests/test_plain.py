"""Forms of operators for one purpose, against the definitions: plain for ONNX, weights kept by tile for inference on a CPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from visionhybrid.kernels.neighborhood_attention import plain as neighborhood
from visionhybrid.kernels.neighborhood_attention import reference as neighborhood_reference
from visionhybrid.kernels.neighborhood_attention import shared
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


@pytest.mark.parametrize(
    ("sides", "kernel", "dilation"),
    [
        ((13, 17), [5, 5], [2, 3]),
        ((3, 20), [7, 5], [1, 4]),
        ((1, 1), [3, 3], [1, 1]),
        ((29, 16), [9, 3], [1, 5]),
    ],
)
@pytest.mark.parametrize("budget", [1, 10**7])
def test_weights_kept_by_tile(sides, kernel, dilation, budget, monkeypatch):
    monkeypatch.setattr(shared, "BUDGET", budget)
    q, k, v = (torch.randn(3, 2, 6, *sides, dtype=torch.float64).movedim(2, -1) for _ in range(3))
    rpb = torch.randn(2, *(2 * side - 1 for side in kernel), dtype=torch.float64)
    weights = shared.weights(q, k, rpb, kernel, dilation, 0.7)
    compact = neighborhood_reference.scores(q, k, rpb, kernel, dilation, 0.7).softmax(-1)
    for values in (v, q):
        torch.testing.assert_close(
            shared.aggregate(weights, values, kernel, dilation),
            neighborhood_reference.aggregate(compact, values, kernel, dilation),
        )
    torch.library.opcheck(shared.weights, (q, k, rpb, kernel, dilation, 0.7))
    torch.library.opcheck(shared.aggregate, (weights, v, kernel, dilation))


@pytest.mark.parametrize("frozen", [False, True], ids=["table learns", "table frozen"])
@pytest.mark.parametrize("budget", [1, 10**7])
@pytest.mark.parametrize(
    ("sides", "kernel", "dilation"),
    [((13, 17), [5, 5], [2, 3]), ((3, 20), [7, 5], [1, 4]), ((1, 1), [3, 3], [1, 1])],
)
def test_gradients_of_weights_kept_by_tile(sides, kernel, dilation, budget, frozen, monkeypatch):
    """Of weights that are used twice, the second time for what the first gave: against the definition's."""
    monkeypatch.setattr(shared, "BUDGET", budget)
    q, k, v = (torch.randn(3, 2, 6, *sides, dtype=torch.float64).movedim(2, -1) for _ in range(3))
    rpb = torch.randn(2, *(2 * side - 1 for side in kernel), dtype=torch.float64)
    leaves = [x.requires_grad_() for x in ((q, k, v) if frozen else (q, k, v, rpb))]
    cotangent = torch.randn_like(v)

    def gradients(weights, aggregate):
        once = aggregate(weights, v, kernel, dilation)
        return torch.autograd.grad(aggregate(weights, once + v, kernel, dilation), leaves, cotangent)

    compact = neighborhood_reference.scores(q, k, rpb, kernel, dilation, 0.7).softmax(-1)
    want = gradients(compact, neighborhood_reference.aggregate)
    got = gradients(shared.weights(q, k, rpb, kernel, dilation, 0.7), shared.aggregate)
    torch.testing.assert_close(got, want)


def test_weights_by_tile_are_for_processors():
    assert shared.unsupported(torch.empty(1, 1, 4, 4, 4)) is None
    assert shared.unsupported(torch.empty(1, 1, 4, 4, 4, device="meta")) == "CPU only"
    with FakeTensorMode():
        assert shared.unsupported(torch.empty(1, 1, 4, 4, 4)) == "plain tensors only"


def test_inference_leaves_nothing_that_training_cannot_use():
    q = torch.randn(1, 1, 5, 23, 2)  # sizes of no other test: nothing is kept for them yet
    with torch.inference_mode():
        neighborhood_reference.scores(q, q, None, [5, 5], [1, 2], 1.0)
    q.requires_grad_()
    neighborhood_reference.scores(q, q, None, [5, 5], [1, 2], 1.0).sum().backward()
