"""Folders of images with captions: where they are found, what is refused."""

import json
import os
import shutil

import pytest
from pictures import numbered_pictures

from visionhybrid.data.captions import open_captions


def captions(root, *, column="text", skip=False, hold_out=0):
    found = open_captions(str(root), "train", "validation", column=column, skip=skip, hold_out=hold_out)
    train, held_out, notes = found
    return *(dict(zip(x.names, x.captions, strict=True)) for x in (train, held_out)), notes


def test_captions_beside_their_images_and_in_metadata(tmp_path):
    numbered_pictures(tmp_path, 2)
    (tmp_path / "0.txt").write_text(" a zero\n")
    (tmp_path / "1.txt").write_text("not this one")
    numbered_pictures(tmp_path / "sub", 2, first=2)
    (tmp_path / "metadata.csv").write_text('file_name,text\n1.png,"a one, in quotes"\nsub/2.png,a two\n')
    (tmp_path / "sub" / "metadata.jsonl").write_text('{"file_name": "3.png", "text": "a three", "x": 1}\n\n')
    train, held_out, notes = captions(tmp_path)
    wanted = {"0.png": "a zero", "1.png": "a one, in quotes", "sub/2.png": "a two", "sub/3.png": "a three"}
    assert train == held_out == wanted
    assert notes == []
    train, held_out, _ = captions(tmp_path, hold_out=3)
    assert list(held_out) == ["0.png", "sub/3.png"]
    assert list(train) == ["1.png", "sub/2.png"]


def test_splits_have_folders_of_their_own(tmp_path):
    for split, first in (("train", 0), ("validation", 4)):
        for number in range(first, first + 2):
            numbered_pictures(tmp_path / split, 1, first=number)
            (tmp_path / split / f"{number}.txt").write_text(f"number {number}")
    train, held_out, _ = captions(tmp_path, hold_out=2)
    assert (list(train), list(held_out)) == (["0.png", "1.png"], ["4.png", "5.png"])
    shutil.rmtree(tmp_path / "validation")
    train, held_out, _ = captions(tmp_path, hold_out=2)
    assert (list(train), list(held_out)) == (["1.png"], ["0.png"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.txt": "a"}, r"1 of 2 images in .* have no caption, first 1\.png; text\.missing=skip"),
        ({"0.txt": "a", "1.txt": " \n"}, "1 of 2 images"),
        ({"metadata.csv": "file_name,text\n0.png,a\n1.png\n"}, "1 of 2 images"),
        (
            {"metadata.csv": "file_name,caption\n0.png,a\n"},
            "line 2: no column 'text'; it has file_name, caption",
        ),
        ({"metadata.jsonl": '{"file_name": "0.png", "text": 3}'}, "line 1: 'text' is not text"),
        ({"metadata.jsonl": '{"file_name": "0.png"'}, "line 1: not JSON"),
        ({"metadata.jsonl": "[1]"}, "line 1: expected an object"),
        (
            {
                "metadata.jsonl": "\n".join(
                    json.dumps({"file_name": f"{i}.png", "text": "a"}) for i in range(3)
                )
            },
            r"name 1 images that are not there, first 2\.png",
        ),
    ],
)
def test_what_is_wrong_with_captions(files, message, tmp_path):
    numbered_pictures(tmp_path, 2)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        captions(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"0.txt": b"a", "1.txt": "caf\xe9".encode("latin-1")},
            r"1 of 2 captions .*1\.txt: not UTF-8: .* byte 3",
        ),
        ({"metadata.csv": "file_name,text\n0.png,a".encode("utf-16")}, r"metadata\.csv: not UTF-8"),
        ({"metadata.csv": b'file_name,text\n0.png,"' + b"x" * 200_000}, r"metadata\.csv, line 1: not CSV"),
        ({"metadata.jsonl": b"[" * 100_000}, r"metadata\.jsonl, line 1: not JSON"),
        (
            {"metadata.jsonl": rb'{"file_name": "0.png", "text": "\ud800"}'},
            "line 1: 'text' has half of a surr",
        ),
        ({"metadata.jsonl": rb'{"file_name": "0.png", "text": 1' + b"0" * 5000 + b"}"}, "line 1: "),
    ],
    ids=["Latin-1", "UTF-16", "endless", "nested", "surrogate", "long number"],
)
def test_hostile_captions_are_one_line(files, message, tmp_path):
    numbered_pictures(tmp_path, 2)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^data: .*{message}") as error:
        captions(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_what_editors_do_to_text_does_not_matter(mark, end, tmp_path):
    """Marks at the beginning, ends of lines, and in JSON and CSV what some take for the end of a line."""
    texts = ["a\u2028cat", "a\x85dog", "a\x0cfox"]
    for folder in ("beside", "json", "csv"):
        numbered_pictures(tmp_path / folder, 3)
    for i, text in enumerate(texts):
        (tmp_path / "beside" / f"{i}.txt").write_bytes(f"{mark}{text}{end}".encode())
    rows = [json.dumps({"file_name": f"{i}.png", "text": t}, ensure_ascii=False) for i, t in enumerate(texts)]
    (tmp_path / "json" / "metadata.jsonl").write_bytes(f"{mark}{end.join(rows)}{end}".encode())
    rows = ["file_name,text", *(f'{i}.png,"{text}"' for i, text in enumerate(texts))]
    (tmp_path / "csv" / "metadata.csv").write_bytes(f"{mark}{end.join(rows)}{end}".encode())
    for folder in ("beside", "json", "csv"):
        assert list(captions(tmp_path / folder)[0].values()) == texts, folder


def test_metadata_are_found_where_pictures_are(tmp_path):
    """Behind links to folders, too, once each, and not where nothing is looked for."""
    numbered_pictures(tmp_path / "elsewhere", 1)
    (tmp_path / "elsewhere" / "metadata.csv").write_text("file_name,text\n0.png,behind a link\n")
    (tmp_path / "data" / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "data" / ".ipynb_checkpoints" / "metadata.csv").write_text("file_name,text\n9.png,old\n")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "1.png").mkdir()  # a folder, whatever its name
    assert captions(tmp_path / "data")[0] == {"linked/0.png": "behind a link"}


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    numbered_pictures(tmp_path, 1)
    (tmp_path / "0.txt").write_text("a")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def closed(path):  # permissions do not stop everyone who runs tests
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ValueError, match=r"closed: the folder cannot be read: Permission denied"):
        captions(tmp_path)


def test_captions_that_cannot_be_read_can_be_left_out_and_are_counted(tmp_path):
    numbered_pictures(tmp_path, 3)
    for i, content in enumerate([b"a", b"\xff", b" "]):
        (tmp_path / f"{i}.txt").write_bytes(content)
    train, _, notes = captions(tmp_path, skip=True)
    assert train == {"0.png": "a"}
    assert [note.partition(" in ")[0] for note in notes] == [
        "skipped: 1 of 3 captions",
        "skipped: 1 of 3 images",
    ]
    (tmp_path / "0.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="2 of 3 captions"):
        captions(tmp_path, skip=True)


def test_missing_captions_can_be_left_out_and_are_counted(tmp_path):
    numbered_pictures(tmp_path, 3)
    (tmp_path / "metadata.csv").write_text("file_name,words\n2.png,two\n9.png,nine\n")
    train, _, notes = captions(tmp_path, skip=True, column="words")
    assert train == {"2.png": "two"}
    assert "skipped: metadata of" in notes[0]
    assert "1 images that are not there" in notes[0]
    assert "skipped: 2 of 3 images" in notes[1]
    (tmp_path / "metadata.csv").unlink()
    with pytest.raises(ValueError, match="3 of 3 images"):
        captions(tmp_path, skip=True)
    with pytest.raises(ValueError, match="no such folder"):
        captions(tmp_path / "none")
