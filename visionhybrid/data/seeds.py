"""Randomness as a function of what is being done, never of what was done before.

Every random decision of a run is drawn from a seed that is a hash of its place (run seed, epoch, index, ...), so a run that
was killed and resumed, or that uses another number of workers, takes the same decisions.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mix(*parts: int | str) -> int:
    """A 63-bit hash of `parts`: the same on every machine, different for any other parts or order."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's CPU generator start from `seed` inside and are as before outside."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def seed_all(seed: int) -> None:
    """Python, NumPy, torch on the CPU and on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
