"""Opening a checkpoint file that nobody vouches for.

Nothing in a file is executed: torch files go through `torch.load(weights_only=True)` with a short list of harmless types,
safetensors files hold no code. The kind of a file is told by its first bytes, never by its name.
"""

from __future__ import annotations

import argparse
import json
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

# A file may claim at most this many times its own size: as unpacked zip entries, or as tensors with zero strides.
MAX_EXPANSION = 16

# In a run or checkpoint directory of ours, a timm hub folder, or a diffusers one; the first that exists is read.
WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
    "diffusion_pytorch_model.safetensors",
)

# What else published checkpoints hold: command lines, and best scores as numpy numbers (named by numpy 1 or numpy 2).
_multiarray = import_module("numpy._core.multiarray" if hasattr(np, "_core") else "numpy.core.multiarray")
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    *(cls for cls in vars(np.dtypes).values() if isinstance(cls, type) and issubclass(cls, np.dtype)),
    *(
        (getattr(_multiarray, name), f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
]


@dataclass(frozen=True)
class Opened:
    """Content of a file: `kind` is "torch", "torch (old format)" or "safetensors"; `folder` holds a folder's config."""

    path: Path
    kind: str
    content: Any
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    folder: Mapping[str, Any] = field(default_factory=dict[str, Any])


def read(path: str | Path, *, key: str | None = None) -> Opened:
    """Open a checkpoint file or folder on the CPU.

    Args:
        path: file (.pth, .pt, .ckpt, .bin, .safetensors, any name), run directory, checkpoint directory, or timm hub folder.
        key: in a checkpoint directory, the file wanted ("model" or "ema"; the averaged weights are preferred).
    Raises:
        ValueError: one line with path and reason: no such file, not a checkpoint, truncated, forbidden contents.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _read_folder(path, key)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if size == 0:
        raise ValueError(f"{path}: the file is empty")
    if head[8:9] == b"{" and size > 8:
        return _read_safetensors(path)
    if head[:4] == b"PK\x03\x04":
        _check_zip(path, size)
        return Opened(path, "torch", _torch_load(path, size, mmap=True))
    if head[:1] == b"\x80":
        return Opened(path, "torch (old format)", _torch_load(path, size, mmap=False))
    raise ValueError(f"{path}: not a checkpoint, {_guess(head)}")


def _guess(head: bytes) -> str:
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "but a web page: the download failed"
    if text.startswith(b"version https://git-lfs"):
        return "but a Git LFS pointer: run `git lfs pull`"
    return f"it begins with {head[:8]!r}"


def _read_folder(path: Path, key: str | None) -> Opened:
    # A checkpoint directory, RUN/checkpoints/step_N, is described by the config of its run.
    config = next(
        (f for f in (path / "config.json", path.parent.parent / "config.json") if f.is_file()), None
    )
    folder = _read_json(config) if config else {}
    candidates = [path / name for name in WEIGHT_FILES]
    steps = [path, *sorted((path / "checkpoints").glob("step_*"), reverse=True)]
    if key in ("ema", "model"):
        candidates = [step / f"{key}.safetensors" for step in steps]
    elif (path / "ema.safetensors").is_file():
        candidates = [path / "ema.safetensors"]
    elif not (path / "model.safetensors").is_file():
        candidates += [step / name for step in steps[1:] for name in ("ema.safetensors", "model.safetensors")]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise ValueError(
            f"{path}: a folder without weights; looked for {', '.join(WEIGHT_FILES)} and checkpoints/step_*"
        )
    opened = read(found)
    return Opened(opened.path, opened.kind, opened.content, opened.metadata, folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _read_safetensors(path: Path) -> Opened:
    try:
        opened: Any = safe_open(path, framework="pt", device="cpu")
        with opened as file:
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
            return Opened(path, "safetensors", content, file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged safetensors file: {_first_line(error)}") from error


def _check_zip(path: Path, size: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path}: truncated or damaged archive: {_first_line(error)}") from error
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > MAX_EXPANSION * size:
        raise ValueError(f"{path}: refused, {size} bytes claim to unpack to {unpacked}")
    leaves = {entry.filename.rpartition("/")[2] for entry in entries}
    if "constants.pkl" in leaves:
        raise ValueError(f"{path}: a TorchScript program, not weights; save its state_dict() instead")
    if "data.pkl" not in leaves:
        raise ValueError(f"{path}: a zip archive, but not one that torch.save wrote (no data.pkl)")


def _torch_load(path: Path, size: int, *, mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old pickle protocols and storage classes; a refusal is an error
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: {_reason(path, error)}") from error
    except (  # what a damaged pickle can raise; the list is torch's unpickler's own
        RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError,
        struct.error, OverflowError, MemoryError, RecursionError, NotImplementedError,
    ) as error:  # fmt: skip
        raise ValueError(
            f"{path}: truncated or damaged file: {_first_line(error) or type(error).__name__}"
        ) from error
    claimed = sum(t.numel() * t.element_size() for t in _tensors(content) if not t.is_sparse)
    if claimed > MAX_EXPANSION * size:
        raise ValueError(f"{path}: refused, {size} bytes claim to hold {claimed} bytes of tensors")
    return content


def _tensors(content: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif depth < 8 and isinstance(content, (Mapping, list, tuple)):
        several = cast("Mapping[Any, Any] | list[Any] | tuple[Any, ...]", content)
        for value in several.values() if isinstance(several, Mapping) else several:
            yield from _tensors(value, depth + 1)


def _reason(path: Path, error: Exception) -> str:
    """One sentence for a refused pickle; names the forbidden global where there is one."""
    hit = re.search(r"(?:GLOBAL|global:?) ([\w.]+\.[\w.]+)", str(error))
    names = [hit[1]] if hit else sorted(_pickled_globals(path))
    if names:
        return f"refused, it would run {', '.join(names)}; only tensors and plain values are read; of a model, save state_dict()"
    return "not a checkpoint that torch.save wrote: " + (_unpickler_line(error) or _first_line(error))


def _unpickler_line(error: Exception) -> str:
    hit = re.search(r"WeightsUnpickler error:\s*(\S[^\n]*)", str(error))
    return hit[1] if hit else ""


def _pickled_globals(path: Path) -> set[str]:
    """Names that a bare pickle would import, read without running it (protocols that torch's reader does not know)."""
    names: set[str] = set()
    strings: list[str] = []
    try:
        for opcode, value, _ in pickletools.genops(path.read_bytes()[:1_000_000]):
            if opcode.name == "GLOBAL":
                names.add(str(value).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                names.add(".".join(strings[-2:]))
            elif isinstance(value, str):
                strings.append(value)
    except ValueError:  # the rest is not a pickle; what was found so far still names the culprit
        pass
    return names


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]
