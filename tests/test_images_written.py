"""What is written to every kind of image file: whole, or not at all."""

from __future__ import annotations

import errno
import os
import resource
import struct
import subprocess
import sys
import zlib
from io import BytesIO

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import SIZE, SRGB, picture_of, samples, stored
from PIL import Image

from visionhybrid.data.images import (
    ImageError,
    Picture,
    atomic,
    encode_image,
    read_image,
    write_image,
)

# ---- writing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_what_is_written_is_read_back(tmp_path, suffix, bits, channels):
    x = samples(channels, bits)
    write_image(tmp_path / f"x.{suffix}", picture_of(x))
    back = read_image(tmp_path / f"x.{suffix}")
    want = np.atleast_3d(x)
    if suffix == "webp":
        want = np.round(want / 257).astype(np.uint16) if bits == 16 else want
    if channels < 3 and (suffix == "webp" or (suffix == "tif" and (bits, channels) == (16, 2))):
        want = want[..., [0, 0, 0, 1][: 3 if channels == 1 else 4]]
    assert back.bits == (8 if suffix == "webp" else bits)
    np.testing.assert_array_equal(stored(back), want)


def decoded(png: bytes) -> np.ndarray:
    """Samples of a 16-bit PNG, byte by byte as section 9 of its specification says."""
    chunks, place = {}, 8
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        kind, data = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        assert struct.unpack(">I", png[place + 8 + length : place + 12 + length]) == (
            zlib.crc32(kind + data),
        )
        chunks[kind] = chunks.get(kind, b"") + data
        place += 12 + length
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, rest) == (16, [0, 0, 0])
    channels = {0: 1, 4: 2, 2: 3, 6: 4}[colour]
    raw, step = zlib.decompress(chunks[b"IDAT"]), 2 * channels
    line = width * step
    assert len(raw) == height * (line + 1)
    above, out = bytes(line), []
    for y in range(height):
        kind, *row = raw[y * (line + 1) : (y + 1) * (line + 1)]
        for i in range(line):
            a, b, c = (row[i - step], above[i], above[i - step]) if i >= step else (0, above[i], 0)
            p = a + b - c
            paeth = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            row[i] = (row[i] + (0, a, b, (a + b) // 2, paeth)[kind]) % 256
        above = bytes(row)
        out.append(above)
    return np.frombuffer(b"".join(out), ">u2").reshape(height, width, channels)


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from(["noise", "ramp", "flat"]),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_other_programs_read_our_sixteen_bits(height, width, channels, kind, seed):
    x = np.random.default_rng(seed).integers(0, 65536, (height, width, channels), dtype=np.uint16)
    if kind != "noise":  # other rows take other PNG filters
        x = np.arange(height * width * channels, dtype=np.uint16).reshape(x.shape) * np.uint16(
            301 if kind == "ramp" else 0
        )
    picture = picture_of(x, icc=SRGB, dpi=(300.0, 150.0))
    np.testing.assert_array_equal(decoded(encode_image(picture, format="PNG")), x)
    tiff = tifffile.imread(BytesIO(encode_image(picture, format="TIFF")))
    want = x[..., [0, 0, 0, 1]] if channels == 2 else x
    np.testing.assert_array_equal(tiff.reshape(want.shape), want)


def test_large_sixteen_bit_files_come_in_several_bands(tmp_path, monkeypatch):
    monkeypatch.setattr("visionhybrid.data.sixteen._BAND", 200)
    x = samples(3, 16)
    for name in ("x.png", "x.tif"):
        write_image(tmp_path / name, picture_of(x))
        np.testing.assert_array_equal(stored(read_image(tmp_path / name)), x)
    with tifffile.TiffFile(tmp_path / "x.tif") as file:
        assert len(file.pages[0].dataoffsets) > 3


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_metadata_is_kept(tmp_path, suffix, bits):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8298] = 1, "Maker", "Rights"
    exif[0x8769] = {0x9003: "2026:01:02 03:04:05", 0xA002: 999, 0xA003: 888}
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0)}
    picture = picture_of(samples(3, bits), icc=SRGB, exif=exif.tobytes(), dpi=(300.0, 300.0))
    write_image(tmp_path / f"x.{suffix}", picture)
    with Image.open(tmp_path / f"x.{suffix}") as image:
        image.load()
        assert image.info["icc_profile"] == SRGB
        if suffix != "webp":  # which has no place for it
            assert image.info["dpi"] == pytest.approx((300, 300), rel=1e-3)
        got = image.getexif()
        assert got[0x010F].rstrip("\0") == "Maker"
        assert got[0x8298].rstrip("\0") == "Rights"
        details = got.get_ifd(0x8769)
        assert details[0x9003].rstrip("\0") == "2026:01:02 03:04:05"
        assert (details[0xA002], details[0xA003]) == (SIZE[1], SIZE[0])  # brought up to date
        assert got.get_ifd(0x8825)[2] == (1.0, 2.0, 3.0)
    back = read_image(tmp_path / f"x.{suffix}")
    assert back.icc == SRGB
    # A second generation loses nothing that the first had.
    write_image(tmp_path / f"y.{suffix}", back)
    again = read_image(tmp_path / f"y.{suffix}")
    assert (again.exif, again.icc, again.dpi) == (back.exif, back.icc, back.dpi)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_metadata_of_a_tiff_with_offsets_of_64_bits_is_kept(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x010F], exif[0x8769], exif[0x8825] = "Maker", {0x9003: "2026:01:02 03:04:05"}, {1: "N"}
    Image.fromarray(samples(3)).save(tmp_path / "x.tif", exif=exif.tobytes(), big_tiff=True)
    write_image(tmp_path / f"y.{suffix}", read_image(tmp_path / "x.tif"))
    with Image.open(tmp_path / f"y.{suffix}") as image:
        got = image.getexif()
        assert got[0x010F].rstrip("\0") == "Maker"
        assert got.get_ifd(0x8769)[0x9003].rstrip("\0") == "2026:01:02 03:04:05"
        assert got.get_ifd(0x8825)[1].rstrip("\0") == "N"


def test_a_tiff_turned_into_other_formats_leaves_its_layout_behind(tmp_path):
    Image.fromarray(samples(3)).save(
        tmp_path / "x.tif", tiffinfo={270: "described", 305: "program"}, dpi=(72, 72)
    )
    picture = read_image(tmp_path / "x.tif")
    for name in ("y.png", "y.jpg", "y.webp", "y.tif"):
        write_image(tmp_path / name, picture)
        with Image.open(tmp_path / name) as image:
            image.load()
            tags = set(image.getexif())
            assert {270, 305} <= tags
            if name != "y.tif":
                assert not tags & {256, 257, 258, 259, 273, 279}


def test_jpeg_quality(tmp_path):
    x = np.asarray(Image.effect_noise((64, 64), 40).convert("RGB"))
    sizes = []
    for quality in (20, 60, None, 100):
        write_image(tmp_path / "x.jpg", picture_of(x), quality=quality)
        sizes.append((tmp_path / "x.jpg").stat().st_size)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] / 3
    with pytest.raises(ImageError, match="quality goes from 1 to 100, got 0"):
        write_image(tmp_path / "x.jpg", picture_of(x), quality=0)


def test_values_outside_are_clamped(tmp_path):
    write_image(tmp_path / "x.png", Picture(pixels=torch.tensor([[[-3.0, 0.5, 7.0]]])))
    np.testing.assert_array_equal(stored(read_image(tmp_path / "x.png"))[0, :, 0], [0, 128, 255])


# ---- all or nothing ----------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ImageError, match=r"x\.png: cannot be written: No space left on device$"):
        write_image(tmp_path / "x.png", picture_of(samples(3)))
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_a_real_limit_on_the_file_size_leaves_nothing(tmp_path):
    code = (
        "import sys, torch\n"
        "from visionhybrid.data.images import Picture, ImageError, write_image\n"
        "try:\n    write_image(sys.argv[1], Picture(pixels=torch.rand(3, 300, 300), bits=16))\n"
        "except ImageError as error:\n    sys.exit(str(error))\n"
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.png")],
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert run.returncode == 1
    assert run.stderr.strip().endswith("x.png: cannot be written: File too large")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    def interrupted():
        with atomic(tmp_path / "x.png") as file:
            file.write(b"half")
            assert [p.name[0] for p in tmp_path.iterdir()] == [
                "."
            ]  # hidden, so no folder run takes it for an image
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_no_folder_to_write_to(tmp_path):
    with pytest.raises(ImageError, match="cannot be written: No such file"):
        write_image(tmp_path / "none" / "x.png", picture_of(samples(3)))


def test_new_files_have_ordinary_permissions(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_image(tmp_path / "x.png", picture_of(samples(3)))
    assert (tmp_path / "x.png").stat().st_mode == (tmp_path / "plain").stat().st_mode
