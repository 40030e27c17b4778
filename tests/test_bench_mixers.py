"""The `mixers` suite measures every mixer, and what it measures is right."""

import pytest
import torch

from visionhybrid.bench import harness, mixers
from visionhybrid.mixers import list_mixers


@pytest.mark.parametrize("each", mixers.cases(quick=True), ids=lambda each: each.name)
def test_mixers_of_the_suite_are_as_exact_as_it_asks(each: harness.Case) -> None:
    softmax, own = each.build(torch.device("cpu"))
    assert softmax.output is not None
    want, got = softmax.output(), own.run()
    assert (got - want).norm() <= own.tolerance * want.norm()
    assert softmax.run().shape == got.shape


def test_mixers_suite_has_every_mixer() -> None:
    named = {name for name, _ in mixers.CHOICES.values()}
    assert named == set(list_mixers()) - {"softmax"}
    with pytest.raises(ValueError, match=r"--only must be one of agent, .*got 'hat'"):
        mixers.cases(only="hat")
