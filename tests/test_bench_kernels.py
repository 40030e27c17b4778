"""The kernels suite of the bench: its promises, and that both sides of every comparison compute the same."""

from dataclasses import replace

import pytest
import torch

from visionhybrid.bench import __main__, harness, kernels

CPU = torch.device("cpu")


def test_kernels_suite_has_the_promised_targets() -> None:
    promised = {
        "linear_attention_4096": {"time": 1 / 18},
        "linear_attention_16384": {"time": 1 / 36},
        "linear_attention_linear": {"time": 1.1},
        "selective_scan_1": {"time": 1 / 25},
        "selective_scan_1_copy": {"time": 6},
        "selective_scan_16": {"time": 1 / 15},
        "sparse_linear_attention_8192": {"time": 1 / 6},
        "sparse_linear_attention_train": {"time": 1 / 4},
        "neighborhood_attention": {"time": 1 / 8, "memory": 1 / 4},
    }
    cases = kernels.cases()
    found = {each.name: {t.what: t.limit for t in each.targets} for each in cases if each.targets}
    assert found == promised
    assert all(each.judged for each in cases)
    with pytest.raises(ValueError, match=r"--only must be one of linear_attention, .*, got 'swin'"):
        kernels.cases(only="swin")


@pytest.mark.parametrize("only", ["selective_scan", "sparse_linear_attention", "window_attention"])
def test_kernels_suite_runs(only: str) -> None:
    """Small sizes: the harness itself compares what both sides compute."""
    for each in kernels.cases(quick=True, only=only):
        rows = harness.measure(replace(each, rounds=1), device=CPU).runners
        assert rows[-1].name in ("visionhybrid", kernels.COMPILED)


@pytest.mark.parametrize("each", kernels.cuda_cases(quick=True), ids=lambda case: case.name)
def test_the_gpu_suite_runs_on_a_cpu_too(each: harness.Case) -> None:
    small = [runner.output or runner.run for runner in each.build(CPU)]
    outs = [run() for run in small]
    assert outs[0].shape == outs[-1].shape
    assert each.targets


def test_an_operator_without_a_promise_on_a_gpu() -> None:
    assert kernels.cuda_cases(only="neighborhood_attention") == []
    with pytest.raises(ValueError, match=r"--only must be one of linear_attention, .*, got 'swin'"):
        kernels.cuda_cases(only="swin")
    with pytest.raises(ValueError, match="nothing of neighborhood_attention is measured on cuda"):
        __main__.run("kernels", only="neighborhood_attention", device="cuda", progress=False)
