"""Settings of every test: few threads (the suite runs in two processes), Triton interpreted where there is no GPU."""

import contextlib
import os

# Read when the libraries are imported, so they must stand before the first import of torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VISIONHYBRID_CHECK", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest
import torch

# The same examples in every run: a suite that guards a merge must not fail by the luck of a draw.
hypothesis.settings.register_profile("suite", derandomize=True)
hypothesis.settings.load_profile("suite")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same numbers whichever process runs it, in whatever order."""
    torch.manual_seed(0)


@pytest.fixture
def told(monkeypatch):
    """What the bar of `train.validate` is told of the part that is done."""
    from visionhybrid.train import session

    found = []

    @contextlib.contextmanager
    def bar(enabled, text):
        yield found.append

    monkeypatch.setattr(session, "bar", bar)
    return found


@pytest.fixture
def toy_system(monkeypatch):
    """The made-up system of `toy.py` among those that checkpoints are recognised by."""
    from toy import TOY

    from visionhybrid.models import registry

    monkeypatch.setitem(registry.SYSTEMS, "toy", TOY)


@pytest.fixture
def toy():
    from toy import Toy, randomised

    return randomised(Toy(num_classes=5, depth=3))
