"""One process at a time in a run directory: two would take each other's files for what a killed run has left."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the run directory `out`, made if it is not there, against other processes until the block or this process ends.

    The lock is the system's: nothing is left of it after `kill -9`. Where a file system knows no locks, nothing is held.

    Raises:
        ValueError: another process holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with open(out / ".lock", "a+b", buffering=0) as file:
        try:
            # POSIX's lock, not BSD's: loading processes do not inherit it, so it ends with its holder.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            who = file.read(100).decode("ascii", "replace") or "unknown"
            raise ValueError(
                f"{out}: another process trains here ({who}); choose another directory"
            ) from None
        except OSError:
            pass  # no locks there
        with suppress(OSError):  # a full disk; what is to be written later says so
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}".encode("ascii", "replace"))
        yield
