"""The suite of whole models: its promises, A2Mamba's definitions and time by stage. Nothing here is judged by a clock."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from visionhybrid.bench import a2mamba, models


@pytest.mark.parametrize("only", models.SYSTEMS)
def test_models_suite_has_the_promised_targets(only: str) -> None:
    promised = {
        "hat_small_x4": {
            ("visionhybrid", "time"): 1 / 3,
            ("visionhybrid", "memory"): 1 / 2,
            ("visionhybrid bf16", "time"): 1 / 6,
        },
        "nextvit_small": {("visionhybrid", "time"): 0.72, ("visionhybrid bf16", "time"): 0.35},
        "a2mamba_tiny": {("visionhybrid", "time"): 0.1, ("visionhybrid bf16", "time"): 0.1},
        "a2mamba_tiny_caformer": {
            ("visionhybrid", "time"): 2.2 * 2.69 / 4.13,
            ("visionhybrid", "memory"): 1.5,
        },
    }
    no_worse = {("visionhybrid", "time"): 1.0, ("visionhybrid", "memory"): 1.0}
    for each in models.cases(only=only):
        targets = {(target.runner, target.what): target.limit for target in each.targets}
        assert targets == promised.get(each.name, no_worse)
        assert each.judged
    assert not any(each.judged for each in models.cases(only=only, quick=True))


def test_a2mamba_by_stage_and_size(tmp_path: Path) -> None:
    found = a2mamba.by_stage((32, 64), 1)
    assert list(found) == [32, 64]
    assert all(len(seconds) == 4 and min(seconds) > 0 for seconds in found.values())
    grown = {side: [side**2.0, 5.0, side**3.0, side**4.0] for side in (224, 512, 1024)}
    assert a2mamba.exponents(grown) == pytest.approx([1, 0, 1.5, 2])
    assert a2mamba.by_stage_table(grown)["rows"][-1] == ["power", "1.00", "0.00", "1.50", "2.00"]
    a2mamba.plot(found, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
    assert models.series(only="hat") == []


def test_a2mamba_definitions_are_the_model() -> None:
    """Without its tiles and blocks, and in other code after it closes."""
    model, x = timm.create_model("vh_a2mamba_nano", num_classes=3).eval(), torch.randn(1, 3, 64, 40)
    with torch.inference_mode():
        want = model(x)
        with a2mamba.definitions():
            counted = model(x)
        torch.testing.assert_close(counted, want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(x), want, atol=0, rtol=0)
