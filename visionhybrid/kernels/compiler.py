"""C++ beside an operator: compiled at its first call, for the CPU at hand, and kept.

Plain functions of pointers, reached by ctypes: no headers of PyTorch's, so a second or two, and a result that outlives its version.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from torch import Tensor


def _compiler() -> list[str] | None:
    """The command of a C++ compiler: what CXX names, else the first one on PATH."""
    given = shlex.split(os.environ.get("CXX", ""))
    choices = [given] if given else [["c++"], ["g++"], ["clang++"]]
    return next((words for words in choices if shutil.which(words[0])), None)


# Looked up once: `unsupported` is also asked while PyTorch traces.
COMPILER = _compiler()
# OpenMP is PyTorch's own on Linux; elsewhere compilers need a library for it, and one thread does the work.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-march=native",
    "-shared",
    "-fPIC",
    *(["-fopenmp"] * (sys.platform == "linux")),
]


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if os.name != "posix":
        return "its C++ is for Linux and macOS"
    if COMPILER is None:
        return "needs a C++ compiler: none of c++, g++, clang++ is on PATH, and CXX names no other"
    return None


@functools.cache
def library(source: Path) -> ctypes.CDLL:
    """The functions of `source`, compiled unless that was done before.

    Results lie in `$XDG_CACHE_HOME/visionhybrid` (`~/.cache/visionhybrid`), named by source, compiler and CPU: a home directory
    may serve several machines.

    Raises:
        RuntimeError: the compiler fails; the message has its words.
    """
    assert COMPILER is not None, "the caller asks `missing` first"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visionhybrid"
    version = _run([*COMPILER, "--version"], source)
    parts = [source.read_bytes(), " ".join([*COMPILER, *FLAGS]).encode(), version.encode(), _cpu().encode()]
    made = folder / f"{source.parent.name}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            _run([*COMPILER, *FLAGS, str(source), "-o", f"{own}/made.so"], source)
            os.replace(f"{own}/made.so", made)
    return ctypes.CDLL(str(made))


def _run(command: list[str], source: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{source.parent.name}: cannot compile {source}, use backend='eager'; "
            f"{shlex.join(command)} said: {done.stderr.strip()[:2000]}"
        )
    return done.stdout


def _cpu() -> str:
    """What decides which instructions there are."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    wanted = ("model name", "flags", "Features", "CPU part")
    found = {line for line in lines if line.startswith(wanted)}
    return "|".join([platform.machine(), platform.processor(), *sorted(found)])


def address(x: Tensor | None) -> ctypes.c_void_p:
    """A pointer to the elements; null for None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())
