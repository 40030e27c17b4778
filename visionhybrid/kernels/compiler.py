"""C++ beside an operator: compiled at its first call, for the CPU at hand, and kept.

Plain functions of pointers, reached by ctypes: no headers of PyTorch's, so a second or two, and a result that outlives its version.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from torch import Tensor

CXX = os.environ.get("CXX", "").strip()
SECONDS = 600  # more than a compiler takes on the busiest machine


def _compiler() -> list[str] | None:
    """The command of a C++ compiler: what CXX names, else the first one on PATH."""
    try:
        choices = [shlex.split(CXX)] if CXX else [["c++"], ["g++"], ["clang++"]]
    except ValueError:  # an open quotation
        return None
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
    if COMPILER is None and CXX:
        return f"needs a C++ compiler: CXX={CXX!r} names none"
    if COMPILER is None:
        return "needs a C++ compiler: none of c++, g++, clang++ is on PATH, and CXX names no other"
    return None


@functools.cache
def library(source: Path) -> ctypes.CDLL:
    """The functions of `source`, compiled unless that was done before.

    Results lie in `$XDG_CACHE_HOME/visionhybrid` (`~/.cache/visionhybrid`), named by source, compiler and CPU, since a home
    directory may serve several machines, and by what they hold: one that is damaged is made anew. Where nothing can be kept (no
    home, no permission, a full disk) each process compiles for itself.

    Raises:
        RuntimeError: the compiler fails, or what it made cannot be loaded; the message has its words.
    """
    assert COMPILER is not None, "the caller asks `missing` first"
    version = _run([*COMPILER, "--version"], source)
    parts = [source.read_bytes(), " ".join([*COMPILER, *FLAGS]).encode(), version.encode(), _cpu().encode()]
    name = f"{source.parent.name}-{_digest(b'|'.join(parts))}"
    if (kept := _kept(name)) is not None:
        return _opened(kept, source)
    with _aside(source) as own:
        made = Path(own) / "made.so"
        _run([*COMPILER, *FLAGS, str(source), "-o", str(made)], source)
        if not made.is_file():
            raise RuntimeError(_failure(source, f"{shlex.join(COMPILER)} left no file"))
        return _opened(_keep(name, made.read_bytes()) or made, source)


def _folder() -> Path | None:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visionhybrid"
    except RuntimeError:  # a user without a home
        return None


def _kept(name: str) -> Path | None:
    """The result of this name that holds what its name says."""
    folder = _folder()
    with contextlib.suppress(OSError):
        for path in sorted(folder.glob(f"{name}-*.so")) if folder else []:
            if path.stem == f"{name}-{_digest(path.read_bytes())}":
                return path
    return None


def _keep(name: str, content: bytes) -> Path | None:
    """Where `content` is now for other processes; None: nowhere."""
    folder = _folder()
    if folder is None:
        return None
    path = folder / f"{name}-{_digest(content)}.so"
    aside = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        return None
    return path


def _opened(path: Path, source: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path.absolute()))
    except OSError as error:  # such as a folder from which nothing may be run
        raise RuntimeError(_failure(source, f"{error}; XDG_CACHE_HOME chooses another folder")) from None


def _aside(source: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="visionhybrid-")
    except OSError as error:
        raise RuntimeError(_failure(source, f"no folder for temporary files: {error}")) from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _run(command: list[str], source: Path) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(_failure(source, str(error))) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        line = next((line for line in lines if "error" in line), lines[0])
        raise RuntimeError(_failure(source, f"{shlex.join(command)} said: {line[:500]}"))
    return done.stdout


def _failure(source: Path, reason: str) -> str:
    return f"{source.parent.name}: cannot compile {source}, use backend='eager'; {reason}"


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
