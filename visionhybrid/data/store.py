"""Rows of tensors that were expensive to compute, on disk: computed once, read by any run and any number of processes.

    store = Store("runs/cache", {"kind": "moments", "vae": "..."})      # what every row depends on
    if key not in store: store.add(key, {"moments": tensor}); store.flush()
    rows = store.rows(keys)
    rows[0]["moments"]

A folder for each set of facts holds `facts.json` and files of many rows each, safetensors whose tensors have a row for each key.
A file gets its name only when it is complete, and is never changed: processes fill a store together without asking each
other, and at worst compute a row twice. Every row has a checksum; a damaged one counts as absent and is computed again.

All rows of a file are compared with their checksums when a store first takes it in. `checked.json` keeps the size and time of
files in which every row was right; as long as these hold, only their headers are read again, so that a start costs milliseconds
for each file and not its reading. A row is compared whenever it is read in any case, and a file in which that finds damage
gets a new time: the next scan reads it whole. `scan(full=True)`, or deleting `checked.json`, does so for all.

A store also notes under which `stamp` (path, size and time of a file) a key was found, so that a file that did not change need
not be read to know its key.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from visionhybrid.data.images import ImageError, atomic

FLUSH_BYTES = 32 << 20  # a file is written when its rows are so large,
FLUSH_SECONDS = 60.0  # or so much time went into them: no more is lost when a process is killed
CHECKED = "checked.json"  # name of a file -> its size and time (ns) when all its rows were right
_TYPES = {"F32": torch.float32, "F16": torch.float16, "I64": torch.int64}


class StoreError(ValueError):
    """The disk is full or does not let us write; what the store holds stays valid."""


def digest(*parts: bytes | memoryview) -> str:
    """128 bits of hash over `parts` and where each ends."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()


@dataclass(frozen=True, eq=False)
class _File:
    path: Path
    tensors: dict[
        str, tuple[torch.dtype, tuple[int, ...], int]
    ]  # name -> type, shape and first byte of a row

    def read(self, number: int) -> dict[str, bytes]:
        """Bytes of a row: name -> content."""
        with open(self.path, "rb") as file:
            found = {}
            for name, first, size in self._spans(number):
                file.seek(first)
                found[name] = file.read(size)
        return found

    def checksum(self, number: int, content: memoryview) -> str:
        """Of a row, `content` being the whole file."""
        return digest(*(content[first : first + size] for _, first, size in self._spans(number)))

    def _spans(self, number: int) -> Iterator[tuple[str, int, int]]:
        for name, (dtype, shape, first) in self.tensors.items():
            size = math.prod(shape) * dtype.itemsize
            yield name, first + number * size, size


class Rows(Sequence[dict[str, Tensor] | None]):
    """Rows by number, without the keys: some 40 bytes for each, so that millions can be handed to loading processes."""

    def __init__(self, files: list[_File], places: np.ndarray, checksums: np.ndarray) -> None:
        self._files, self._places, self._checksums = files, places, checksums

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Tensor] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The tensors of a row; None where there is none.

        Raises: StoreError: it is damaged or gone, which the scan did not see yet.
        """
        number, row = map(int, self._places[index])
        if number < 0:
            return None
        file = self._files[number]
        try:
            content = file.read(row)
        except OSError as error:
            raise StoreError(f"cache: {file.path}: {error.strerror}; start again to make it anew") from None
        if digest(*content.values()) != self._checksums[index].decode():
            with suppress(OSError):  # a cache that is only read cannot be made anew either
                os.utime(file.path)  # so that the next scan does not trust it
            raise StoreError(f"cache: row {row} of {file.path} is damaged; start again to make it anew")
        return {
            name: torch.frombuffer(bytearray(content[name]), dtype=dtype).view(shape)
            for name, (dtype, shape, _) in file.tensors.items()
        }


class Store:
    """Rows under keys; all rows of a store have tensors of the same names and shapes.

    Args:
        folder: of all stores. facts: JSON-able, what the rows depend on besides what their keys say.
    Raises: StoreError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, facts: Mapping[str, Any]) -> None:
        text = json.dumps(facts, indent=1, sort_keys=True)
        self.folder = Path(folder) / f"{facts['kind']}-{digest(text.encode())[:16]}"
        self.stamps: dict[str, str] = {}
        self._places: dict[str, tuple[_File, int, str]] = {}  # key -> file, row, checksum
        self._known: set[str] = set()
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._new_stamps: dict[str, str] = {}
        self._since = time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "facts.json").exists():
                self._write(self.folder / "facts.json", text.encode())
        except OSError as error:
            raise StoreError(f"cache.folder: {self.folder}: {error.strerror}") from None
        # of processes that were killed; nobody writes a file for a day
        for rest in self.folder.glob(".*.tmp"):
            with suppress(OSError):  # another process was as tidy, or this cache is only read
                if time.time() - rest.stat().st_mtime > 86400:
                    rest.unlink()

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self._waiting

    def __len__(self) -> int:
        return len(self._places) + len(self._waiting)

    def scan(self, *, full: bool = False) -> list[str]:
        """Take in the files that appeared since the last scan.

        Args:
            full: compare every row of these with its checksum, also where `checked.json` says that this was done.
        Returns: a line for each in which something is damaged.
        """
        new = [path for path in sorted(self.folder.glob("*.safetensors")) if path.name not in self._known]
        self._known.update(path.name for path in new)
        notes, right = [], {}
        before = {} if full or not new else self._checked()
        with ThreadPoolExecutor() as threads:  # reading and hashing let each other run
            opened = threads.map(lambda path: _open(path, before.get(path.name)), new)
            for path, found in zip(new, opened, strict=True):
                if isinstance(found, OSError):  # which may pass: the file stays
                    notes.append(f"cache: {path} cannot be read ({found.strerror}), its rows are made anew")
                    continue
                if isinstance(found, str):
                    notes.append(f"cache: {path} is damaged ({found}) and is made anew")
                    with suppress(OSError):
                        path.unlink()
                    continue
                file, rows, stamps, state = found
                good = {key: (file, i, checksum) for i, (key, checksum, fits) in enumerate(rows) if fits}
                self._places |= good
                self.stamps |= stamps
                if bad := sum(not fits for _, _, fits in rows):
                    notes.append(f"cache: {bad} of {len(rows)} rows of {path} are damaged and are made anew")
                elif before.get(path.name) != state:
                    right[path.name] = state
        if right:
            with suppress(StoreError):  # without it the files are read whole next time, no more
                self._write(self.folder / CHECKED, json.dumps(self._checked() | right).encode())
        return notes

    def _checked(self) -> dict[str, list[int]]:
        """Processes that write it together may lose each other's lines: those files are then read once more."""
        try:
            found = json.loads((self.folder / CHECKED).read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def rows(self, keys: Sequence[str | None]) -> Rows:
        """What is on the disk under `keys`, in their order; None stands for nothing.

        Raises: StoreError: some are not there.
        """
        if lost := [key for key in keys if key is not None and key not in self._places]:
            raise StoreError(
                f"cache: {len(lost)} rows that other processes should have made are not in {self.folder}"
            )
        found = [(None, -1, "") if key is None else self._places[key] for key in keys]
        files = list(dict.fromkeys(file for file, _, _ in found if file is not None))
        number = {id(file): i for i, file in enumerate(files)}
        places = np.array([(number.get(id(file), -1), row) for file, row, _ in found], np.int32)
        return Rows(files, places, np.array([checksum.encode() for _, _, checksum in found], "S32"))

    def note(self, stamp: str, key: str) -> None:
        """Remember that what has this stamp has this key."""
        if stamp and self.stamps.get(stamp) != key:
            self.stamps[stamp] = self._new_stamps[stamp] = key

    def add(self, key: str, row: Mapping[str, Tensor]) -> None:
        """Store float32, float16 and int64 tensors; they are on the disk after the next `flush`, or when enough have come."""
        self._waiting[key] = {name: value.detach().cpu().contiguous() for name, value in row.items()}
        size = sum(t.numel() * t.element_size() for t in self._waiting[key].values()) * len(self._waiting)
        if size >= FLUSH_BYTES or time.monotonic() - self._since > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Put what waits on the disk.

        Raises: StoreError: it does not fit or cannot be written; nothing half-written is left.
        """
        rows, stamps = self._waiting, self._new_stamps
        self._since = time.monotonic()
        if not rows and not stamps:
            return
        names = sorted(next(iter(rows.values()), {}))
        tensors = {name: torch.stack([row[name] for row in rows.values()]) for name in names}
        checksums = [digest(*(row[name].numpy().tobytes() for name in names)) for row in rows.values()]
        about = {"keys": list(rows), "checksums": checksums, "stamps": stamps}
        metadata = {name: json.dumps(value) for name, value in about.items()}
        path = self.folder / f"{time.time_ns():x}-{secrets.token_hex(4)}.safetensors"
        self._write(path, safetensors.torch.save(tensors, metadata))
        self._waiting, self._new_stamps = {}, {}
        self.scan()

    def _write(self, path: Path, content: bytes) -> None:
        try:
            with atomic(path) as file:
                file.write(content)
        except ImageError as error:
            room = f"{len(content) / 2**20:.1f} MiB"
            with suppress(OSError):  # the folder is gone
                room += f", {shutil.disk_usage(self.folder).free / 2**20:.1f} MiB are free"
            raise StoreError(
                f"cache.folder: {error} ({room}); what is cached stays valid, the same command continues"
            ) from None


_Opened = tuple[_File, list[tuple[str, str, bool]], dict[str, str], list[int]]


def _open(path: Path, before: list[int] | None) -> _Opened | str | OSError:
    """A file's layout, for each row its key, checksum and whether that is right, the stamps, and its size and time.

    Where these are `before` the rows are not compared. Returns why, if it is not one of ours.
    """
    try:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            state = [stat.st_size, stat.st_mtime_ns]
            length = int.from_bytes(file.read(8), "little")
            if 8 + length > stat.st_size:
                raise ValueError("cut off")
            layout, about = _layout(path, file.read(length), stat.st_size)
            named = list(zip(about["keys"], about["checksums"], strict=True))
            fits = [True] * len(named)
            if state != before:
                file.seek(0)
                content = memoryview(file.read())
                fits = [layout.checksum(row, content) == checksum for row, (_, checksum) in enumerate(named)]
        rows = [(key, checksum, right) for (key, checksum), right in zip(named, fits, strict=True)]
        return layout, rows, about["stamps"], state
    except OSError as error:
        return error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        return str(error) or type(error).__name__


def _layout(path: Path, head: bytes, size: int) -> tuple[_File, dict[str, Any]]:
    """Of a file of `size` bytes that begins with eight for the length of `head`."""
    start = 8 + len(head)
    header = json.loads(head)
    about = {name: json.loads(value) for name, value in header.pop("__metadata__").items()}
    # names in order, as the checksums take them
    tensors = {
        name: (_TYPES[entry["dtype"]], tuple(entry["shape"][1:]), start + entry["data_offsets"][0])
        for name, entry in sorted(header.items())
    }
    if size != start + max((entry["data_offsets"][1] for entry in header.values()), default=0):
        raise ValueError("cut off")
    if any(entry["shape"][0] != len(about["keys"]) for entry in header.values()):
        raise ValueError("not a row for each key")
    names = [*about["keys"], *about["checksums"], *about["stamps"], *about["stamps"].values()]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("keys, checksums and stamps are text")
    return _File(path, tensors), about
