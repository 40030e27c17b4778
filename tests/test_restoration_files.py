"""`restore_path` for files and folders, in good days and bad."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from restoring import Enlarge, grown, noise

from visionhybrid.data.images import ImageError, Picture, read_image, write_image
from visionhybrid.infer.engine import Engine
from visionhybrid.infer.restoration import restore_path

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def save(path: Path, channels: int = 3, bits: int = 8, size=(9, 7), **options) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    x = noise(*size, channels, dtype=np.uint16 if bits == 16 else np.uint8)
    planes = torch.from_numpy(x.astype(np.float32) / (2**bits - 1)).permute(2, 0, 1)
    colours = 3 if channels > 2 else 1
    picture = Picture(
        pixels=planes[:colours], alpha=planes[colours:] if channels in (2, 4) else None, bits=bits, **options
    )
    write_image(path, picture)
    return x


def samples(path: Path) -> np.ndarray:
    picture = read_image(path)
    planes = picture.pixels if picture.alpha is None else torch.cat([picture.pixels, picture.alpha])
    return np.round(planes.permute(1, 2, 0).numpy() * (2**picture.bits - 1)).astype(int)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(
    ("name", "channels", "bits"),
    [(f"x.{s}", c, b) for s in ("png", "tif") for c in (1, 2, 3, 4) for b in (8, 16)]
    + [("x.webp", 3, 8), ("x.webp", 4, 8)],
)
def test_every_kind_of_file_comes_back_as_it_was(tmp_path, name, channels, bits, in_chans):
    x = save(tmp_path / name, channels, bits, icc=SRGB, dpi=(300.0, 300.0))
    report = restore_path(Enlarge(in_chans=in_chans), tmp_path / name, f"{tmp_path}/out/")
    assert report.ok
    assert [(d.source, d.target, d.size) for d in report.done] == [
        (tmp_path / name, tmp_path / "out" / name, (14, 18))
    ]
    got = samples(tmp_path / "out" / name)
    if (name, channels, bits) == ("x.tif", 2, 16):
        x = x[..., [0, 0, 0, 1]]
    np.testing.assert_array_equal(got, grown(x))
    picture = read_image(tmp_path / "out" / name)
    assert (picture.bits, picture.icc) == (bits, SRGB)
    assert picture.dpi is None if name == "x.webp" else picture.dpi == pytest.approx((300, 300), rel=1e-3)


@pytest.mark.parametrize(("in_chans", "mode"), [(1, "L"), (3, "L"), (1, "RGB"), (3, "RGB")])
def test_jpeg_files_stay_grey_or_coloured(tmp_path, in_chans, mode):
    x = np.add.outer(np.arange(16) * 4, np.arange(24) * 6).astype(np.uint8)
    x = x if mode == "L" else np.dstack([x, x[::-1], x[:, ::-1]])
    Image.fromarray(x).save(tmp_path / "x.jpg", quality=100, subsampling=0)
    assert restore_path(Enlarge(in_chans=in_chans), tmp_path / "x.jpg", tmp_path / "y.jpg", quality=100).ok
    with Image.open(tmp_path / "y.jpg") as image:
        assert image.mode == mode
        assert np.abs(np.asarray(image).astype(int) - grown(x)).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_come_out_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    x = noise(9, 7, 3)
    Image.fromarray(x).save(tmp_path / "x.png", exif=exif)
    upright = samples(tmp_path / "x.png")
    assert upright.shape == ((9, 7, 3) if orientation < 5 else (7, 9, 3))
    restore_path(Enlarge(), tmp_path / "x.png", tmp_path / "y.png")
    np.testing.assert_array_equal(samples(tmp_path / "y.png"), grown(upright))


def test_one_file_and_the_name_it_gets(tmp_path):
    save(tmp_path / "x.png")
    (tmp_path / "folder").mkdir()
    cases = [
        (dict(target=tmp_path / "y.jpg"), "y.jpg", "JPEG"),
        (dict(target=tmp_path / "folder"), "folder/x.png", "PNG"),
        (dict(target=f"{tmp_path}/new/", suffix="_x2"), "new/x_x2.png", "PNG"),
        (dict(target=f"{tmp_path}/new/", format="jpeg"), "new/x.jpg", "JPEG"),
        (dict(target=f"{tmp_path}/new/", format="webp", suffix="2"), "new/x2.webp", "WEBP"),
        (dict(target=f"{tmp_path}/deep/er/", format="TIFF"), "deep/er/x.tif", "TIFF"),
    ]
    for options, name, format in cases:
        report = restore_path(Enlarge(), tmp_path / "x.png", **options)
        assert [d.target for d in report.done] == [tmp_path / name]
        with Image.open(tmp_path / name) as image:
            assert image.format == format


def test_mistakes_are_refused_before_any_work(tmp_path):
    model = Enlarge()
    save(tmp_path / "in" / "x.png")
    save(tmp_path / "in" / "x.jpg")
    save(tmp_path / "y.png")
    (tmp_path / "empty").mkdir()
    here, source = tmp_path, tmp_path / "in" / "x.png"
    (here / "link.png").symlink_to(source)
    cases = [
        (here / "none.png", here / "z.png", {}, "no such file or folder"),
        (here / "empty", here / "out", {}, "no images in this folder"),
        (source, source, {"overwrite": True}, "this would replace a source image"),
        (source, here / "link.png", {"overwrite": True}, "this would replace a source image"),
        (here / "in", here / "in", {"suffix": "_x2"}, "the same folder"),
        (here / "in", here / "out", {"format": "png"}, r"x\.jpg and .*x\.png would both become .*out/x\.png"),
        (here / "in", here / "y.png", {}, "is a file"),
        (here / "in", here / "new.png", {}, r"new\.png: named like a file"),
        ("", here / "z.png", {}, "one of them is empty"),
        (source, here / "z.png", {"suffix": "/../../z"}, "suffix is put after a name"),
        (source, here / "z", {}, "give it the suffix"),
        (source, here / "z.bmp", {}, r"no format for the suffix '\.bmp'"),
        (source, here / "z.png", {"format": "jpg"}, "not that of the format"),
        (source, here / "z.png", {"format": "exr"}, "no format 'exr' to write"),
        (source, here / "z.png", {"quality": 101}, "quality goes from 1 to 100"),
        (source, here / "z.png", {"on_error": "shrug"}, "'skip' or 'raise'"),
        (source, here / "y.png", {}, "exists already"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for given, target, options, message in cases:
        with pytest.raises(ValueError, match=message):
            restore_path(model, given, target, **options)
    assert model.sizes == []
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_with_broken_files_among_good_ones(tmp_path):
    x = save(tmp_path / "in/a.png")
    save(tmp_path / "in/z.tif", bits=16)
    save(tmp_path / "in/sub/deep.png")
    (tmp_path / "in/empty.png").write_bytes(b"")
    (tmp_path / "in/half.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:150])
    (tmp_path / "in/text.jpg").write_text("no image")
    (tmp_path / "in/notes.txt").write_text("passed over")
    (tmp_path / "in/.hidden.png").write_text("passed over")
    (tmp_path / "in/dangling.png").symlink_to(tmp_path / "nowhere.png")
    report = restore_path(Enlarge(), tmp_path / "in", tmp_path / "out")
    assert not report.ok
    assert [d.source.name for d in report.done] == ["a.png", "z.tif"]
    reasons = {path.name: reason for path, reason in report.failed}
    assert set(reasons) == {"empty.png", "half.png", "text.jpg", "dangling.png"}
    assert "empty" in reasons["empty.png"]
    assert "damaged" in reasons["half.png"]
    assert "not an image" in reasons["text.jpg"]
    assert "No such file" in reasons["dangling.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "z.tif"]
    np.testing.assert_array_equal(samples(tmp_path / "out/a.png"), grown(x))
    with pytest.raises(ImageError, match="No such file"):
        restore_path(Enlarge(), tmp_path / "in", tmp_path / "out", overwrite=True, on_error="raise")


def test_trees_targets_inside_and_going_on(tmp_path):
    for name in ("a.png", "s/b.jpg", "s/t/c.bmp", "x.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(9, 7, 3)).save(tmp_path / name)
    first = restore_path(Enlarge(), tmp_path, tmp_path / "out", recursive=True)
    names = ["a.png", "s/b.jpg", "s/t/c.png", "x.png"]
    assert [d.target.relative_to(tmp_path / "out").as_posix() for d in first.done] == names
    assert first.ok
    (tmp_path / "out/s/b.jpg").unlink()
    stamp = (tmp_path / "out/a.png").stat().st_mtime_ns
    second = restore_path(Enlarge(), tmp_path, tmp_path / "out", recursive=True)
    assert [d.source.name for d in second.done] == ["b.jpg"]
    assert [(path.name, "exists already" in reason) for path, reason in second.skipped] == [
        ("a.png", True), ("c.bmp", True), ("x.gif", True)
    ]  # fmt: skip
    assert second.ok
    assert (tmp_path / "out/a.png").stat().st_mtime_ns == stamp
    third = restore_path(Enlarge(), tmp_path, tmp_path / "out", recursive=True, overwrite=True)
    assert len(third.done) == 4


def test_notes_say_what_was_lost(tmp_path):
    save(tmp_path / "deep.png", bits=16)
    assert restore_path(Enlarge(), tmp_path / "deep.png", tmp_path / "y.jpg").done[0].notes == (
        "16 bits rounded to 8",
    )
    frames = [Image.fromarray(np.full((5, 5), 50 * i, np.uint8)) for i in range(3)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    report = restore_path(Enlarge(), tmp_path / "film.gif", tmp_path / "still.png")
    assert report.done[0].notes == ("the first of 3 frames or pages",)


def test_a_format_that_cannot_hold_the_result_is_found_before_the_work(tmp_path):
    model = Enlarge(scale=4)
    save(tmp_path / "long.webp", size=(1, 5000))
    save(tmp_path / "clear.png", channels=4)
    report = restore_path(model, tmp_path / "long.webp", tmp_path / "out.webp")
    assert "WEBP holds at most 16383 pixels a side" in report.failed[0][1]
    report = restore_path(model, tmp_path / "clear.png", tmp_path / "out.jpg")
    assert "JPEG cannot hold transparency" in report.failed[0][1]
    assert model.sizes == []


def test_a_full_disk_ends_the_run(tmp_path, monkeypatch):
    for name in "abc":
        save(tmp_path / "in" / f"{name}.png")
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    report = restore_path(Enlarge(), tmp_path / "in", tmp_path / "out")
    assert [d.source.name for d in report.done] == ["a.png"]
    assert [(p.name, r) for p, r in report.failed] == [
        ("b.png", f"{tmp_path / 'out/b.png'}: cannot be written: No space left on device")
    ]
    assert [(p.name, r) for p, r in report.skipped] == [("c.png", "not reached: the disk cannot be written")]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.png"]


def test_out_of_memory_in_one_file_spares_the_others(tmp_path):
    class Small(Enlarge):
        def forward(self, x):
            if x.shape[-1] == 7 and x.shape[-2] == 9:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return super().forward(x)

    save(tmp_path / "in/a.png")
    save(tmp_path / "in/b.png", size=(5, 5))
    report = restore_path(Small(), tmp_path / "in", tmp_path / "out")
    assert [d.source.name for d in report.done] == ["b.png"]
    assert "not enough memory even for a tile of 9 pixels" in report.failed[0][1]


def test_a_mistake_in_the_model_is_not_taken_for_a_bad_file(tmp_path):
    class Wrong(Enlarge):
        def forward(self, x):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    save(tmp_path / "a.png")
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        restore_path(Wrong(), tmp_path / "a.png", tmp_path / "b.png")


def test_a_folder_that_cannot_be_made(tmp_path):
    save(tmp_path / "in/sub/a.png")
    save(tmp_path / "in/b.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sub").write_text("a file in the way")
    report = restore_path(Enlarge(), tmp_path / "in", tmp_path / "out", recursive=True)
    assert [d.source.name for d in report.done] == ["b.png"]
    assert report.failed[0][1].startswith(f"{tmp_path / 'out/sub/a.png'}: its folder cannot be made: ")


def test_ctrl_c_leaves_no_half_file(tmp_path, monkeypatch):
    save(tmp_path / "in/a.png")
    save(tmp_path / "in/b.png")
    real, calls = os.replace, []

    def replace(a, b):
        calls.append(b)
        if len(calls) > 1:
            raise KeyboardInterrupt
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        restore_path(Enlarge(), tmp_path / "in", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.png"]


# The signal comes from within, 20 ms after the fourth tile, somewhere in the encoding or writing of a file: another process
# might be too late for it on a busy machine.
KILLED = """
import os, signal, sys, threading, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
sys.path.insert(0, sys.argv[1])
from restoring import Enlarge
from visionhybrid.infer.restoration import restore_path
class Mortal(Enlarge):
    tiles = 0
    def forward(self, x):
        self.tiles += 1
        if self.tiles == 4:
            threading.Timer(0.02, os.kill, (os.getpid(), int(sys.argv[4]))).start()
        return super().forward(x)
restore_path(Mortal(scale=4), sys.argv[2], sys.argv[3], progress=False)
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_whole_files_only_and_goes_on(tmp_path, sign):
    for i in range(16):
        save(tmp_path / "in" / f"{i:02}.png", size=(150, 150), bits=16)
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(Path(__file__).parent),
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        str(int(sign)),
    ]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode != 0
    whole = [p for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")]
    assert 0 < len(whole) < 16
    assert all(read_image(p).size == (600, 600) for p in whole)
    if sign == signal.SIGINT:
        assert len(whole) == len(list((tmp_path / "out").iterdir()))
    report = restore_path(Enlarge(scale=4), tmp_path / "in", tmp_path / "out")
    assert report.ok
    assert len(report.done) == 16 - len(whole)


def test_memory_of_a_long_run_stays_flat(tmp_path):
    for i in range(12):
        save(tmp_path / "in" / f"{i:02}.png", size=(40 + i, 40))
    alive = {}

    class Counting(Enlarge):
        def forward(self, x):
            if x.shape[-2] in (42, 51):  # the third picture and the last
                alive[x.shape[-2]] = sum(type(o) is torch.Tensor for o in gc.get_objects())
            return super().forward(x)

    gc.collect()
    gc.disable()  # what only the collector would free counts as alive
    try:
        restore_path(Counting(), tmp_path / "in", tmp_path / "out")
    finally:
        gc.enable()
    assert alive[51] <= alive[42]


def test_progress_shows_on_a_terminal_and_nowhere_else(tmp_path, monkeypatch, capsys):
    from visionhybrid.infer import progress

    save(tmp_path / "in/[red]a.png")
    restore_path(Enlarge(), tmp_path / "in", tmp_path / "out", progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's word for: take this for a terminal
    monkeypatch.setenv("TERM", "xterm")

    class Slow(Enlarge):
        def forward(self, x):
            time.sleep(0.3)
            return super().forward(x)

    restore_path(Slow(), tmp_path / "in", tmp_path / "out", overwrite=True)
    shown = capsys.readouterr().err
    assert "[red]a.png (1 of 1)" in shown  # a name is no markup
    assert "%" in shown


def test_the_fraction_done_only_grows(tmp_path):
    fractions = []
    Engine(Enlarge(in_chans=1), tile=8).picture(
        Picture(pixels=torch.rand(3, 20, 20), alpha=torch.rand(1, 20, 20)), fractions.append
    )
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1)
    assert len(fractions) > 4 * 4
