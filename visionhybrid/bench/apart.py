"""A case measured in a process of its own.

What a process ran before changes what it measures: after large tensors have been freed, glibc keeps more memory instead of taking
it from the system again, and whoever runs later is spared the page faults. Two suites in one process, or the same one in another
order, then give other ratios.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from visionhybrid.bench.floor import Peaks
from visionhybrid.bench.harness import Case, Result, measure


def measure_apart(
    case: Case,
    *,
    device: torch.device,
    peaks: Peaks | None = None,
    report: Callable[[str, float], None] = lambda text, done: None,
) -> Result:
    """`harness.measure` in a new process with as many threads as this one has; `case` is sent there, so it has no closures.

    Raises:
        ValueError, ModuleNotFoundError: what `measure` raises there.
        RuntimeError: the process ended without a word.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    arguments = (there, case, device, peaks, torch.get_num_threads())
    child = context.Process(target=_measure, args=arguments, daemon=True)
    child.start()
    there.close()
    try:
        while not isinstance(said := here.recv(), Result):
            if isinstance(said, Exception):
                raise said
            report(*said)
        return said
    except EOFError:
        child.join()
        raise RuntimeError(
            f"bench {case.name}: the measuring process ended with {child.exitcode}; out of memory?"
        ) from None
    finally:
        child.terminate()
        child.join()


def _measure(there: Connection, case: Case, device: torch.device, peaks: Peaks | None, threads: int) -> None:
    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            said: Result | Exception = measure(
                case, device=device, peaks=peaks, report=lambda text, done: there.send((text, done))
            )
        except (ValueError, ModuleNotFoundError) as error:
            said = error
    there.send(said)
