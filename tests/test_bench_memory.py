"""What the bench weighs and counts: memory by each instrument, the floor of time and traffic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bench_case import CPU, MIB, fill
from torch import Tensor, nn

from visionhybrid.bench import floor, memory

# --- memory


@pytest.mark.parametrize("instrument", [memory.resident, memory.live])
def test_memory_of_a_known_workload_and_of_its_double(instrument: Callable[..., int | None]) -> None:
    # The larger first: its peak must not linger.
    two, one = instrument(fill(64)), instrument(fill(32))
    if one is None or two is None:
        pytest.skip("this system does not tell the peak of the resident set")
    assert one == pytest.approx(64 * MIB, rel=0.15)
    assert two == pytest.approx(128 * MIB, rel=0.15)


def test_live_counts_a_storage_once_and_forgets_the_dead() -> None:
    def run() -> Tensor:
        x = torch.ones(MIB)  # 4 MiB
        for _ in range(5):
            x = x + 1  # the old one dies: 8 MiB at most
        view = x[: MIB // 2].view(2, -1)
        view.mul_(2)  # no new storage
        return view

    assert memory.live(run) == 8 * MIB


def test_live_leaves_out_what_was_there_before() -> None:
    x = torch.ones(MIB)
    assert memory.live(lambda: x.add_(1)) == 0


def test_live_counts_what_autograd_keeps() -> None:
    weight = torch.ones(MIB, requires_grad=True)

    def forward() -> Tensor:
        y = weight
        for _ in range(4):
            y = y.exp()  # keeps its result for the backward pass
        return y

    with torch.no_grad():
        without = memory.live(forward)
    assert without == 8 * MIB
    assert memory.live(forward) == 16 * MIB


def test_held_counts_parameters_buffers_gradients_and_optimiser_state_once() -> None:
    model = nn.BatchNorm1d(1024)  # weight, bias, mean, var of 4 KiB, and one int64
    optimiser = torch.optim.Adam(model.parameters())
    alone = 4 * 4096 + 8
    assert memory.held([model]) == memory.held([model, model, model.weight]) == alone
    model(torch.randn(4, 1024)).square().sum().backward()
    assert memory.held([model]) == alone + 2 * 4096
    optimiser.step()
    # Two moments for each of two parameters, and a step counter for each.
    assert memory.held([model, optimiser]) == alone + 2 * 4096 + 4 * 4096 + 2 * 4
    model.packed = torch.zeros(MIB)
    assert memory.held([model]) == alone + 2 * 4096 + 4 * MIB


def test_held_refuses_what_it_cannot_weigh() -> None:
    with pytest.raises(TypeError, match="got str"):
        memory.held(["weights"])


# --- floor


def test_floor_is_the_larger_of_arithmetic_and_traffic() -> None:
    peaks = floor.Peaks(flops={"float32": 100.0, "bfloat16": 400.0}, bytes=10.0)
    assert peaks.floor(1000, 20, torch.float32) == 10
    assert peaks.floor(1000, 20, torch.bfloat16) == 2.5
    assert peaks.floor(1000, 200, torch.float32) == 20


def test_operations_of_known_layers() -> None:
    x = torch.randn(2, 4, 8, 8)
    assert (
        floor.operations(lambda: nn.functional.conv2d(x, torch.randn(6, 4, 3, 3))) == 2 * 2 * 6 * 36 * 4 * 9
    )
    q = torch.randn(1, 2, 16, 8)
    assert floor.operations(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * (
        2 * 2 * 16 * 16 * 8
    )


def test_peaks_are_positive_and_of_both_dtypes() -> None:
    peaks = floor.measure_peaks(CPU, seconds=0.0)
    assert set(peaks.flops) == {"float32", "bfloat16"}
    assert all(rate > 1e6 for rate in (*peaks.flops.values(), peaks.bytes))
