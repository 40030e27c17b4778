"""The cache of encoded rows: what comes back, what is made anew, and caches that somebody else has had in hands."""

import errno
import json
import os
import shutil

import pytest
import torch

from visionhybrid.data import store as store_module
from visionhybrid.data.store import Store, StoreError

FACTS = {"kind": "test", "of": 1}


def row(number):
    return {"a": torch.full((2, 3), float(number)), "b": torch.tensor([number, -number])}


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


def damage(path, *, seen=True):
    """One bit of the last row. Not `seen`: under the size and time of the whole file."""
    before = path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before, before + seen))


def test_rows_come_back_and_other_facts_are_another_store(tmp_path):
    store = Store(tmp_path, FACTS)
    for number in range(5):
        store.add(f"key{number}", row(number))
        if number == 2:
            store.flush()
    store.flush()
    again = Store(tmp_path, FACTS)
    assert again.scan() == []
    assert len(again) == 5
    for number in range(5):
        found = again.rows([f"key{number}"])[0]
        assert torch.equal(found["a"], row(number)["a"])
        assert torch.equal(found["b"], row(number)["b"])
    other = Store(tmp_path, {**FACTS, "of": 2})
    other.scan()
    assert len(other) == 0
    assert json.loads((again.folder / "facts.json").read_text()) == FACTS


def test_a_damaged_row_is_absent_and_a_cut_file_goes(tmp_path):
    store = Store(tmp_path, FACTS)
    for start in (0, 3):
        for number in range(start, start + 3):
            store.add(f"key{number}", row(number))
        store.flush()
    first, second = files(tmp_path)
    damage(first)
    second.write_bytes(second.read_bytes()[:-1])
    again = Store(tmp_path, FACTS)
    notes = again.scan()
    assert "1 of 3 rows" in notes[0]
    assert "cut off" in notes[1]
    assert [f"key{i}" in again for i in range(6)] == [True, True, False, False, False, False]
    for number in (2, 3):
        again.add(f"key{number}", row(number))
    again.flush()
    rows = again.rows(["key3", None, "key2", "key0"])
    assert torch.equal(rows[2]["a"], row(2)["a"])
    assert rows[1] is None
    # damage after the scan is seen when the row is read
    (path,) = [path for path in files(tmp_path) if path != first]
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(StoreError, match="damaged"):
        rows[0]
    assert torch.equal(rows[3]["b"], row(0)["b"])
    path.unlink()
    with pytest.raises(StoreError, match=r"No such file.*start again"):
        rows[0]
    with pytest.raises(StoreError, match="1 rows that other processes should have made"):
        again.rows(["key0", "key9"])


def test_a_file_is_compared_once_and_again_when_it_changed(tmp_path, monkeypatch):
    store = Store(tmp_path, FACTS)
    for number in range(3):
        store.add(f"key{number}", row(number))
    store.flush()
    (path,) = files(tmp_path)
    compared = []
    whole = store_module._File.checksum
    monkeypatch.setattr(
        store_module._File,
        "checksum",
        lambda self, number, content: compared.append(number) or whole(self, number, content),
    )

    def scanned(**how):
        compared.clear()
        again = Store(tmp_path, FACTS)
        return again, again.scan(**how), len(compared)

    assert scanned()[1:] == ([], 0)
    assert scanned(full=True)[1:] == ([], 3)
    os.utime(path)
    assert scanned()[1:] == ([], 3)
    assert scanned()[1:] == ([], 0)
    (store.folder / store_module.CHECKED).write_text("{")  # unreadable: as if it were not there
    assert scanned()[1:] == ([], 3)
    # damage that shows in neither size nor time is found where it is read, or where one asks for it
    damage(path, seen=False)
    again, notes, count = scanned()
    assert (len(again), notes, count) == (3, [], 0)
    again, notes, count = scanned(full=True)
    assert (len(again), count) == (2, 3)
    assert "1 of 3 rows" in notes[0]
    again = scanned()[0]
    with pytest.raises(StoreError, match=r"row 2 of .* is damaged; start again"):
        again.rows(["key2"])[0]
    again, notes, count = scanned()
    assert (len(again), count) == (2, 3)
    assert "1 of 3 rows" in notes[0]
    again.add("key2", row(2))
    again.flush()
    again = scanned()[0]
    assert torch.equal(again.rows(["key2"])[0]["a"], row(2)["a"])


def test_a_full_disk_is_an_error_and_what_is_there_stays(tmp_path, monkeypatch):
    store = Store(tmp_path, FACTS)
    store.add("key0", row(0))
    store.flush()
    store.add("key1", row(1))
    with monkeypatch.context() as patch:
        patch.setattr(
            os,
            "fsync",
            lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")),
        )
        with pytest.raises(StoreError, match=r"No space left.*what is cached stays valid"):
            store.flush()
    assert (
        len(list(store.folder.iterdir())) == 3
    )  # the facts, the first file, what was checked: nothing half-written
    again = Store(tmp_path, FACTS)
    assert again.scan() == []
    assert ("key0" in again, "key1" in again) == (True, False)


def test_what_a_killed_process_left_goes(tmp_path):
    folder = Store(tmp_path, FACTS).folder
    old, new = folder / ".1.safetensors.ab.tmp", folder / ".2.safetensors.cd.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    store = Store(tmp_path, FACTS)
    assert store.scan() == []
    assert (old.exists(), new.exists()) == (False, True)


def test_rows_are_written_before_too_many_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "FLUSH_BYTES", 3 * 40)  # of three rows
    store = Store(tmp_path, FACTS)
    for number in range(7):
        store.add(f"key{number}", row(number))
    assert len(files(tmp_path)) == 2
    monkeypatch.setattr(store_module, "FLUSH_SECONDS", -1.0)
    store.add("key7", row(7))
    assert len(Store(tmp_path, FACTS).scan() or files(tmp_path)) == 3


# ---- in other hands


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
