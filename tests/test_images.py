"""What is read of every kind of image file, and what is refused."""

from __future__ import annotations

import errno
import pickle
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import RNG, SIZE, picture_of, samples, stored
from PIL import Image, ImageOps

from visionhybrid.data.images import (
    ImageError,
    Picture,
    image_size,
    read_image,
    write_image,
)

# ---- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "bmp"])
def test_eight_bits_are_read_exactly(tmp_path, suffix, channels):
    if suffix == "bmp" and channels in (2, 4):
        channels -= 1  # Pillow writes BMP without alpha
    x = samples(channels)
    Image.fromarray(x).save(
        tmp_path / f"x.{suffix}", **({"lossless": True, "exact": True} if suffix == "webp" else {})
    )
    picture = read_image(tmp_path / f"x.{suffix}")
    want = np.atleast_3d(x)
    if suffix == "webp" and channels < 3:  # WebP has no grey
        want = want[..., [0, 0, 0, 1][: 3 if channels == 1 else 4]]
    np.testing.assert_array_equal(stored(picture), want)
    assert picture.bits == 8
    assert picture.size == (SIZE[1], SIZE[0])
    assert image_size(tmp_path / f"x.{suffix}") == picture.size


def test_one_bit_palette_and_transparent_palette(tmp_path):
    x = samples(1) > 127
    Image.fromarray(x).save(tmp_path / "bit.png")
    np.testing.assert_array_equal(stored(read_image(tmp_path / "bit.png"))[..., 0], 255 * x)
    Image.fromarray(x).save(tmp_path / "fax.tif", compression="group4")
    np.testing.assert_array_equal(stored(read_image(tmp_path / "fax.tif"))[..., 0], 255 * x)

    indices, palette = samples(1) % 5, RNG.integers(0, 256, (5, 3), dtype=np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putpalette(palette.tobytes())
    image.putdata(indices.flatten().tolist())
    image.save(tmp_path / "p.png")
    np.testing.assert_array_equal(stored(read_image(tmp_path / "p.png")), palette[indices])
    image.save(tmp_path / "t.png", transparency=bytes([0, 80, 255, 255, 255]))
    picture = read_image(tmp_path / "t.png")
    np.testing.assert_array_equal(stored(picture)[..., :3], palette[indices])
    np.testing.assert_array_equal(stored(picture)[..., 3], np.array([0, 80, 255, 255, 255])[indices])


def png16(x: np.ndarray, extra: bytes = b"", interlace: bool = False) -> bytes:
    """A 16-bit PNG by the plainest possible means: no filter, no choice."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def rows(part):
        return b"".join(b"\0" + row.astype(">u2").tobytes() for row in part) if part.size else b""

    height, width, channels = x.shape
    passes = [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]
    data = b"".join(rows(x[a::c, b::d]) for a, b, c, d in passes) if interlace else rows(x)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, interlace)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra
        + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    )  # fmt: skip


@pytest.mark.parametrize("interlace", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bit_png_is_read_exactly(tmp_path, channels, interlace):
    x = samples(channels, 16).reshape(*SIZE, channels)
    (tmp_path / "x.png").write_bytes(png16(x, interlace=interlace))
    picture = read_image(tmp_path / "x.png")
    assert picture.bits == 16
    np.testing.assert_array_equal(stored(picture), x)


@pytest.mark.parametrize("channels", [1, 3])
def test_one_transparent_colour_of_a_sixteen_bit_png(tmp_path, channels):
    x = samples(channels, 16).reshape(*SIZE, channels)
    x[2, 3] = x[5, 1]
    key = struct.pack(f">{channels}H", *x[5, 1])
    extra = struct.pack(">I", len(key)) + b"tRNS" + key + struct.pack(">I", zlib.crc32(b"tRNS" + key))
    (tmp_path / "x.png").write_bytes(png16(x, extra))
    got = stored(read_image(tmp_path / "x.png"))
    np.testing.assert_array_equal(got[..., :-1], x)
    np.testing.assert_array_equal(got[..., -1], 65535 * (x != x[5, 1]).any(-1))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "how", [{}, {"compression": "zlib"}, {"compression": "zlib", "predictor": True}, {"tile": (16, 16)}]
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bit_tiff_is_read_exactly(tmp_path, channels, how, order):
    x = samples(channels, 16)
    kind = {"photometric": "minisblack" if channels == 1 else "rgb"}
    if channels == 4:
        kind["extrasamples"] = ["unassalpha"]
    tifffile.imwrite(tmp_path / "x.tif", x, byteorder=order, **kind, **how)
    picture = read_image(tmp_path / "x.tif")
    assert picture.bits == 16
    np.testing.assert_array_equal(stored(picture), np.atleast_3d(x))


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bit_colours_multiplied_by_alpha_are_divided_again(tmp_path, order):
    x = samples(4, 16)
    x[0, 0], x[0, 1], x[0, 2, 3] = 0, (1, 2, 3, 65535), 1
    x[..., :3] = np.minimum(x[..., :3], x[..., 3:])
    tifffile.imwrite(tmp_path / "x.tif", x, byteorder=order, photometric="rgb", extrasamples=["assocalpha"])
    got = stored(read_image(tmp_path / "x.tif"))
    np.testing.assert_array_equal(got[..., 3], x[..., 3])
    np.testing.assert_array_equal(got[0, :2], x[0, :2])
    again = got[..., :3] * (x[..., 3:] / 65535)
    assert np.abs(again - x[..., :3]).max() <= 0.5


def test_sixteen_bit_tiff_where_white_is_zero(tmp_path):
    x = samples(1, 16)
    tifffile.imwrite(tmp_path / "x.tif", x, photometric="miniswhite")
    np.testing.assert_array_equal(stored(read_image(tmp_path / "x.tif"))[..., 0], 65535 - x)


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    image = Image.fromarray(np.full((16, 16, 3), (200, 90, 30), np.uint8)).convert("CMYK")
    image.save(tmp_path / "x.jpg", quality=95)
    picture = read_image(tmp_path / "x.jpg")
    assert len(picture.pixels) == 3
    assert picture.icc is None
    assert "CMYK" in picture.notes[0]
    assert (picture.pixels.mean((1, 2)) * 255 - torch.tensor([200.0, 90, 30])).abs().max() < 4


def test_lab_becomes_rgb_without_its_profile(tmp_path):
    Image.new("RGB", (9, 7), (200, 90, 30)).convert("LAB").save(tmp_path / "x.tif")
    picture = read_image(tmp_path / "x.tif")
    assert (picture.icc, picture.notes) == (None, ("Lab converted to sRGB",))
    assert (picture.pixels.mean((1, 2)) * 255 - torch.tensor([200.0, 90, 30])).abs().max() < 4


def test_the_first_of_several_frames_is_read_and_said(tmp_path):
    frames = [Image.fromarray(np.full((9, 9, 3), 40 * i, np.uint8)) for i in range(3)]
    for name in ("x.gif", "x.webp", "x.tif", "x.png"):
        frames[1].save(
            tmp_path / name,
            save_all=True,
            append_images=[frames[2]],
            **({"lossless": True} if "w" in name else {}),
        )
        picture = read_image(tmp_path / name)
        assert picture.notes == ("the first of 2 frames or pages",)
        assert (stored(picture) == 40).all()


def test_the_pictures_that_a_telephone_puts_behind_the_first_are_no_frames(tmp_path):
    first, second = (Image.fromarray(np.full((16, 16, 3), value, np.uint8)) for value in (40, 80))
    first.save(tmp_path / "x.mpo", save_all=True, append_images=[second])
    (tmp_path / "x.mpo").rename(tmp_path / "x.jpg")
    picture = read_image(tmp_path / "x.jpg")
    assert (picture.format, picture.notes) == ("JPEG", ())
    assert (stored(picture) == 40).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_orientation_is_applied_and_reset(tmp_path, suffix, orientation):
    x = np.zeros((16, 24, 3), np.uint8)
    x[:8, :8], x[:8, 8:16], x[8:, 16:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "Maker"
    Image.fromarray(x).save(tmp_path / f"x.{suffix}", exif=exif, dpi=(100, 200))
    with Image.open(tmp_path / f"x.{suffix}") as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    picture = read_image(tmp_path / f"x.{suffix}")
    np.testing.assert_array_equal(stored(picture), upright)
    assert picture.size == ((24, 16) if orientation < 5 else (16, 24))
    if suffix != "webp":
        assert picture.dpi == pytest.approx((100, 200) if orientation < 5 else (200, 100), rel=1e-3)
    write_image(tmp_path / f"y.{suffix}", picture)
    with Image.open(tmp_path / f"y.{suffix}") as image:
        image.load()
        assert image.getexif().get(0x0112, 1) == 1
        assert image.getexif()[0x010F].rstrip("\0") == "Maker"
        assert image.size == picture.size


# ---- refusing ----------------------------------------------------------------------------------------------------


def broken(kind: str) -> bytes:
    out = BytesIO()
    image = Image.fromarray(RNG.integers(0, 256, (60, 60, 3), dtype=np.uint8))
    if kind == "float":
        image = image.convert("F")
    if kind == "integer":
        image = image.convert("I")
    image.save(out, "TIFF" if kind in ("float", "integer") else kind)
    data = out.getvalue()
    return data if kind in ("float", "integer") else data[: len(data) // 2]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, world", "not an image"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "not an image",
        ),  # Pillow would start Ghostscript
        (b"\x89PNG\r\n\x1a\n", "damaged|not an image"),
        (broken("PNG"), "truncated or damaged"),
        (broken("JPEG"), "truncated or damaged"),
        (broken("WEBP"), "truncated or damaged|not an image"),
        (broken("TIFF"), "truncated or damaged|not an image"),
        (broken("BMP"), "truncated or damaged"),
        (broken("float"), "float samples"),
        (broken("integer"), "32-bit integer samples"),
        (
            b"II*\0\x08\0\0\0\0\0\0\0\0\0",
            "a TIFF that is damaged, or of a kind that is not read|truncated or damaged: Invalid",
        ),
    ],
)
def test_bad_files_are_one_line_errors(tmp_path, data, reason):
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(ImageError, match=reason) as caught:
        read_image(tmp_path / "x.png")
    assert str(caught.value).startswith(str(tmp_path / "x.png"))
    assert "\n" not in str(caught.value)
    assert caught.value.path == tmp_path / "x.png"


def test_missing_files_folders_and_permissions(tmp_path, monkeypatch):
    with pytest.raises(ImageError, match="No such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="Is a directory"):
        read_image(tmp_path)
    (tmp_path / "x.png").write_bytes(b"x")

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x.png"))

    monkeypatch.setattr("builtins.open", refuse)  # chmod does not stop root
    with pytest.raises(ImageError, match=r"x\.png: Permission denied$"):
        read_image(tmp_path / "x.png")


def test_an_error_survives_the_way_out_of_a_worker():
    error = pickle.loads(pickle.dumps(ImageError("x.png", "the file is empty")))
    assert (str(error), error.path.name, error.reason) == (
        "x.png: the file is empty",
        "x.png",
        "the file is empty",
    )


def test_a_decompression_bomb(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(10_000_000))
    (tmp_path / "x.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )
    with pytest.raises(ImageError, match="too many pixels"):
        read_image(tmp_path / "x.png")


def test_separate_planes_of_sixteen_bits_are_refused_not_misread(tmp_path):
    tifffile.imwrite(
        tmp_path / "x.tif", np.moveaxis(samples(3, 16), -1, 0), photometric="rgb", planarconfig="separate"
    )
    with pytest.raises(ImageError, match="separate colour planes"):
        read_image(tmp_path / "x.tif")


@given(st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"]), st.data())
@settings(max_examples=150, deadline=None)
def test_damage_never_escapes_as_another_error(tmp_path_factory, kind, data):
    out = BytesIO()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    image.save(out, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
    raw = bytearray(out.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, min(len(raw), 300) - 1) | st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(raw)
    try:
        picture = read_image(path)
    except ImageError:
        return
    assert torch.isfinite(picture.pixels).all()


def test_a_format_that_cannot_hold_the_picture(tmp_path):
    with pytest.raises(ImageError, match="JPEG cannot hold transparency"):
        write_image(tmp_path / "x.jpg", picture_of(samples(4)))
    with pytest.raises(ImageError, match="WEBP holds at most 16383 pixels a side, not 16384 x 1"):
        write_image(tmp_path / "x.webp", Picture(pixels=torch.zeros(1, 1, 16384)))
    with pytest.raises(ImageError, match=r"no format for the suffix '\.xyz'; have \.png"):
        write_image(tmp_path / "x.xyz", picture_of(samples(3)))
    assert list(tmp_path.iterdir()) == []
