"""Run directories and checkpoints: safetensors and JSON only, complete or absent, verified.

A checkpoint is written aside, each file flushed to the disk, described by a manifest (sizes and sha256), and renamed to its
name; only when it reads back as written are older ones removed. Reading takes the newest valid one and says why it
passed over the others.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from visionhybrid.models.checkpoint.finite import nonfinite, told

FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")
Tensors = dict[str, Tensor]


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message is one line."""


def pack(tree: Any) -> tuple[Any, Tensors]:
    """A nested structure as JSON and tensors: each tensor becomes `{"$tensor": key}`. `unpack` is the inverse, exactly."""
    tensors: Tensors = {}

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            tensors[path] = node
            return {"$tensor": path}
        if isinstance(node, Mapping):
            pairs = [[key, walk(value, f"{path}.{key}".lstrip("."))] for key, value in node.items()]
            if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
                return dict(pairs)
            return {"$pairs": pairs}
        if isinstance(node, (list, tuple)):
            items = [walk(value, f"{path}.{i}".lstrip(".")) for i, value in enumerate(node)]
            return {"$tuple": items} if isinstance(node, tuple) else items
        if node is None or type(node) in (bool, int, float, str):
            return node
        raise CheckpointError(f"cannot store {path!r}: no JSON for {type(node).__name__}")

    return walk(tree, ""), tensors


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given."""
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$tuple" in tree:
        return tuple(unpack(value, tensors) for value in tree["$tuple"])
    if "$pairs" in tree:
        return {key: unpack(value, tensors) for key, value in tree["$pairs"]}
    return {key: unpack(value, tensors) for key, value in tree.items()}


def whole(tensors: Mapping[str, Tensor]) -> Tensors:
    """Copies on the CPU, gathered from all processes where sharded (then every process must call this)."""
    found: Tensors = {}
    for name, value in tensors.items():
        value = value.detach()
        if hasattr(value, "full_tensor"):  # a DTensor of FSDP2
            value = value.full_tensor()
        found[name] = value.to("cpu", copy=True).contiguous()
    return found


def write(folder: Path, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> Path:
    """Write `folder/step_NNNNNNNN` with one safetensors file per entry of `tensors`, and `state.json`.

    Raises: CheckpointError: the disk is full or the written files do not read back; earlier checkpoints are untouched.
    """
    final = folder / f"step_{step:08d}"
    aside = folder / f".{final.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _require_space(folder, tensors)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        entries = {}
        for name, content in tensors.items():
            entries[f"{name}.safetensors"] = _put(
                aside / f"{name}.safetensors", safetensors.torch.save(content)
            )
        entries["state.json"] = _put(aside / "state.json", json.dumps(state).encode())
        manifest = {"format": FORMAT, "step": step, "files": entries}
        _put(aside / "manifest.json", json.dumps(manifest, indent=2).encode())
        _sync_folder(aside)
        if (reason := why_invalid(aside)) is not None:
            raise CheckpointError(f"{final}: what was written does not read back: {reason}")
        _rename(aside, final)
    except OSError as error:
        raise CheckpointError(_disk_message(error, folder, final.name, tensors)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def _require_space(folder: Path, tensors: Mapping[str, Tensors]) -> None:
    if _size(tensors) > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _size(tensors: Mapping[str, Tensors]) -> int:
    return sum(t.numel() * t.element_size() for content in tensors.values() for t in content.values())


def _put(path: Path, content: bytes) -> dict[str, Any]:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _sync_folder(path: Path) -> None:
    if os.name != "posix":  # only POSIX lets a directory be opened and flushed
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rename(aside: Path, final: Path) -> None:
    """Give the complete checkpoint its name. One of the same step (after a rollback) steps aside until then."""
    former = final.with_name(f".{final.name}.old")
    shutil.rmtree(former, ignore_errors=True)
    if final.exists():
        final.rename(former)
    aside.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(former, ignore_errors=True)


def _disk_message(error: OSError, folder: Path, name: str, tensors: Mapping[str, Tensors]) -> str:
    kept = newest(folder)[0]
    rest = f"the last good checkpoint is {kept}" if kept else "there is no earlier checkpoint"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"cannot write checkpoint {name} in {folder}: {error}; {rest}"
    need = _size(tensors) / 2**20
    free = shutil.disk_usage(folder).free / 2**20
    return f"disk full: checkpoint {name} needs {need:.1f} MiB in {folder}, {free:.1f} MiB are free; {rest}"


def why_invalid(path: Path, *, contents: bool = True) -> str | None:
    """Why the checkpoint cannot be used, or None if every file is as its manifest says (`contents=False`: by size only)."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        for name, entry in files.items():
            size = (path / name).stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes instead of {entry['size']}"
            if contents and _sha256(path / name) != entry["sha256"]:
                return f"{name} has another content than its manifest says"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is damaged"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint of `folder` and, one line each, why newer ones were passed over."""
    skipped = []
    for path in reversed(list(_checkpoints(folder))):
        if (reason := why_invalid(path)) is None:
            return path, skipped
        skipped.append(f"checkpoint {path.name} skipped: {reason}")
    return None, skipped


def _checkpoints(folder: Path) -> Iterator[Path]:
    """Oldest first."""
    if folder.is_dir():
        yield from sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=step_of)


def step_of(path: Path) -> int:
    """step_00001200 -> 1200."""
    return int(path.name.removeprefix("step_"))


def read(path: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """The tensors of each file and the state. The checkpoint must be valid (`why_invalid`)."""
    try:
        tensors = {
            file.stem: safetensors.torch.load_file(file) for file in sorted(path.glob("*.safetensors"))
        }
        return tensors, json.loads((path / "state.json").read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error}") from None


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` complete checkpoints and the one of step `best`; keep everything while none is.

    Called after `write`, which has read the newest one back; the older ones are not read again.
    """
    valid = [path for path in _checkpoints(folder) if why_invalid(path, contents=False) is None]
    for path in valid[:-keep]:
        if step_of(path) != best:
            aside = path.with_name(f".{path.name}.gone.tmp")  # killed in between, `clean` does the rest
            path.rename(aside)
            shutil.rmtree(aside)


def clean(out: Path, folder: Path) -> None:
    """Finish what a killed process left in the run directory `out` and its `folder` of checkpoints.

    What was half written or half removed goes, a checkpoint that had stepped aside comes back.
    """
    for path in out.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not folder.is_dir():
        return
    for path in folder.glob(".step_*.old"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(".old"))
        if final.exists():
            shutil.rmtree(path)
        else:
            path.rename(final)
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path)


def write_text(path: Path, text: str) -> None:
    """Replace `path` as a whole: a reader sees the old text or the new. Raises: OSError that names the file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            _put(aside, text.encode())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the disk inside names a file: `path` where it names none by itself, as that of a full disk."""
    try:
        yield
    except SafetensorError as error:  # as which its errors of the disk come
        raise OSError(f"{path}: cannot be written: {error}") from None
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error


def load_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor], what: str) -> None:
    """Copy `source` into the tensors of `target`, sharded ones included; names and shapes must agree.

    Raises: CheckpointError naming both sides, or what is NaN or infinite there and not here.
    """
    if target.keys() != source.keys():
        missing, extra = sorted(target.keys() - source.keys()), sorted(source.keys() - target.keys())
        raise CheckpointError(
            f"{what} has other tensors than the checkpoint: missing {missing[:3]}, unexpected {extra[:3]}"
        )
    bad = nonfinite(source)
    if bad and bad.keys() - nonfinite(target):
        raise CheckpointError(
            f"{what}: {told(bad, len(source))} in the checkpoint; remove its folder to continue from the one before"
        )
    for name, value in target.items():
        if value.shape != source[name].shape:
            raise CheckpointError(
                f"{what}: {name} is {tuple(value.shape)} here and {tuple(source[name].shape)} in the checkpoint"
            )
        with torch.no_grad():
            value.copy_(like(source[name], value))


def like(value: Tensor, model: Tensor) -> Tensor:
    """`value` on the device of `model`, sharded as it is."""
    if not hasattr(model, "full_tensor"):
        return value.to(model.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(model, DTensor)
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements)
