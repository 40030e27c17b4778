"""Caches that somebody else has had in hands: what is damaged is made anew, what cannot be read now is not thrown away."""

import json
import os
import shutil

import pytest
import torch

from visionhybrid.data.store import Store, StoreError


@pytest.fixture
def filled(tmp_path):
    """A store of three rows, and its file."""
    store = opened(tmp_path)
    for i in range(3):
        store.add(f"key{i}", {"a": torch.full((4,), float(i))})
    store.flush()
    return next(store.folder.glob("*.safetensors"))


def opened(folder):
    return Store(folder, {"kind": "numbers"})


def rewritten(path, change):
    """The file with a header that `change` had in hands."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["__metadata__"].update(keys='[["a"], ["b"], ["c"]]'),
        lambda header: header["__metadata__"].update(checksums="[1, 2, 3]"),
        lambda header: header["__metadata__"].update(stamps="[1]"),
        lambda header: header["__metadata__"].update(stamps="null"),
        lambda header: header["a"].update(shape=[]),
        lambda header: header["a"].update(shape=[3, "x"]),
        lambda header: header["a"].update(data_offsets=[0, "x"]),
        lambda header: header.pop("__metadata__"),
    ],
    ids=["keys", "checksums", "stamps", "no stamps", "no shape", "shape", "offsets", "no metadata"],
)
def test_a_damaged_header_is_a_damaged_file(change, filled, tmp_path):
    rewritten(filled, change)
    store = opened(tmp_path)
    (note,) = store.scan()
    assert "is damaged (" in note
    assert (len(store), filled.exists()) == (0, False)


def test_headers_that_nest_are_damage_too(filled, tmp_path):
    filled.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    (filled.parent / "checked.json").write_bytes(b"[" * 100_000)
    store = opened(tmp_path)
    (note,) = store.scan()
    assert "is damaged (" in note


def test_a_file_that_cannot_be_read_now_stays(filled, tmp_path, monkeypatch):
    """Where a disk or a network fails for a while nothing is thrown away."""
    fstat = os.fstat

    def failing(number):
        if os.path.samestat(fstat(number), os.stat(filled)):
            raise OSError(5, "Input/output error")
        return fstat(number)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", failing)
        store = opened(tmp_path)
        (note,) = store.scan()
    assert "cannot be read (Input/output error), its rows are made anew" in note
    assert len(store) == 0
    again = opened(tmp_path)
    assert (again.scan(), len(again)) == ([], 3)


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere", "/dev/null/below"])
def test_where_no_folder_can_be_is_one_line(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"^cache.folder: .*: (Not a directory|No such file or directory)$"):
        opened(tmp_path / place)


def test_a_folder_that_goes_away_is_one_line(filled, tmp_path):
    store = opened(tmp_path)
    store.add("more", {"a": torch.zeros(4)})
    shutil.rmtree(store.folder)
    with pytest.raises(StoreError, match=r"cannot be written: No such file .*the same command continues$"):
        store.flush()


def test_names_that_are_no_files_do_no_harm(filled, tmp_path):
    folder = filled.parent
    (folder / "folder.safetensors").mkdir()
    (folder / "circle.safetensors").symlink_to("circle.safetensors")
    (folder / ".old.tmp").mkdir()
    os.utime(folder / ".old.tmp", (1, 1))
    store = opened(tmp_path)
    assert ["cannot be read" in note for note in store.scan()] == [True, True]
    assert len(store) == 3
