"""Counted operations of our operators: those of the same arithmetic written out in matrix products."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from visionhybrid.kernels.linear_attention import linear_attention
from visionhybrid.kernels.linear_attention.plain import forward as plain
from visionhybrid.kernels.neighborhood_attention import (
    neighborhood_aggregate,
    neighborhood_attention,
    neighborhood_scores,
)
from visionhybrid.kernels.selective_scan import selective_scan
from visionhybrid.kernels.sparse_linear_attention import sparse_linear_attention
from visionhybrid.kernels.window_attention import window_attention


def operations(run, backward=False):
    with FlopCounterMode(display=False) as counter:
        out = run()
        if backward:
            (out[0] if isinstance(out, tuple) else out).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("norm", ["fbla", "none"])
def test_linear_attention(norm, device):
    q, k, v = (
        torch.rand(2, 3, n, d, device=device, requires_grad=True) for n, d in ((50, 8), (70, 8), (70, 4))
    )
    products = 2 * 3 * 2 * (70 * 8 * 4 + 50 * 8 * (5 if norm == "fbla" else 4))
    assert operations(lambda: linear_attention(q, k, v, norm=norm)) == products
    assert operations(lambda: linear_attention(q, k, v, norm=norm), backward=True) > 2.9 * products
    mode = "mean" if norm == "fbla" else "none"
    # There the normaliser of the keys and queries is a product, too.
    written_out = operations(lambda: plain(q, k, v, None, None, None, "elu", mode, 1e-6, 1.0))
    assert written_out - products == 0 if norm == "none" else abs(written_out - products) < 0.05 * products


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_neighborhood_attention(device):
    B, heads, H, W, D = 2, 3, 9, 5, 4
    q, k, v = (torch.rand(B, heads, H, W, D, device=device, requires_grad=True) for _ in range(3))
    where = dict(kernel_size=7, dilation=1)
    pairs = B * heads * H * W * 7 * 5  # no more than five columns are there
    assert operations(lambda: neighborhood_attention(q, k, v, **where)) == 2 * pairs * 2 * D
    assert operations(lambda: neighborhood_attention(q, k, v, **where), backward=True) == 2 * pairs * 7 * D
    weights = torch.rand(B, heads, H, W, 49, device=device)
    assert operations(lambda: neighborhood_scores(q, k, **where)) == 2 * pairs * D
    assert operations(lambda: neighborhood_aggregate(weights, v, **where)) == 2 * pairs * D
    half = dict(kernel_size=3, dilation=4)  # rows 0, 4, 8 and columns 0, 4: three and two keys
    assert operations(lambda: neighborhood_scores(q, k, **half)) == 2 * B * heads * H * W * 3 * 2 * D


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_selective_scan(device):
    u, delta, A, B, C, D = (
        torch.rand(*shape, device=device, requires_grad=True)
        for shape in ((2, 6, 11), (2, 6, 11), (6, 3), (2, 3, 11), (2, 3, 11), (6,))
    )
    assert operations(lambda: selective_scan(u, delta, A, B)) == 2 * 2 * 6 * 11 * (3 * 3 + 1)
    whole = 2 * 2 * 6 * 11 * (3 * 4 + 2)
    assert operations(lambda: selective_scan(u, delta, A, B, C, D)) == whole
    assert operations(lambda: selective_scan(u, delta, A, B, C, D), backward=True) == 3 * whole


def test_sparse_linear_attention():
    q, k, v = (torch.rand(1, 2, 128, 16) for _ in range(3))
    kept = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    kept[..., :2] = True
    options = dict(block_q=32, block_k=32, variant="sparse")
    run = lambda: sparse_linear_attention(q, k, v, block_map=kept, **options)  # noqa: E731
    assert operations(run) == 2 * 2 * (4 * 2) * 32 * 32 * 32


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_window_attention(device):
    q, k, v = (torch.rand(1, 8, 8, 2, d, device=device, requires_grad=True) for d in (4, 4, 6))
    run = lambda: window_attention(q, k, v, window_size=4, key_window_size=6)  # noqa: E731
    pairs = 8 * 8 * 2 * 36
    assert operations(run) == 2 * pairs * (4 + 6)
    assert operations(run, backward=True) == 2 * pairs * (4 * 4 + 3 * 6)
