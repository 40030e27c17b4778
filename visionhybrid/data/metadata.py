"""What an image file says beside its samples: EXIF, orientation and resolution, as another file can hold them."""

from __future__ import annotations

import struct
import zlib

from PIL import Image

ORIENTATION = 0x0112
_EXIF_IFD, _GPS_IFD = 0x8769, 0x8825
# What a TIFF's directory says about its own layout rather than about the picture; never copied into another file.
_LAYOUT = frozenset(
    [
        *range(254, 267),
        273,
        *range(277, 285),
        *range(290, 294),
        296,
        *range(317, 326),
        330,
        332,
        *range(338, 348),
        *range(512, 533),
        700,
        33723,
        34377,
        34675,
    ]
)
# What Pillow raises over a damaged file.
DAMAGE = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, KeyError, IndexError, OverflowError, AttributeError,
    AssertionError, struct.error, zlib.error, ZeroDivisionError, NotImplementedError, RuntimeError, Warning,
)  # fmt: skip


def exif(image: Image.Image, notes: list[str]) -> tuple[bytes | None, int]:
    """The EXIF block with its orientation reset, and the orientation (1 to 8) that it gave; `notes` tells of damage."""
    try:
        found = image.getexif()
        orientation = found.get(ORIENTATION, 1)
        orientation = orientation if orientation in range(1, 9) else 1
        if image.format == "TIFF":
            for tag in _LAYOUT.intersection(found):
                del found[tag]
        if ORIENTATION in found:
            found[ORIENTATION] = 1
        if found.bigtiff:  # a block is written in that layout, too, but read in the classic one only
            for directory in {_EXIF_IFD, _GPS_IFD}.intersection(found):
                found.get_ifd(directory)
            found.bigtiff = False
        return (found.tobytes() if len(found) else None), orientation
    except DAMAGE:
        notes.append("damaged EXIF data dropped")
        return None, 1


def sized(block: bytes | None, size: tuple[int, int], *, layout: bool) -> Image.Exif:
    """An EXIF block with the pixel counts that it repeats brought up to `size` (width, height).

    layout: keep tags that say how a file stores its samples, which must not get into a TIFF.
    """
    found = Image.Exif()
    if block is None:
        return found
    found.load(block)
    if not layout:
        for tag in _LAYOUT.intersection(found):
            del found[tag]
    for directory, tags in ((found, (256, 257)), (found.get_ifd(_EXIF_IFD), (40962, 40963))):
        for tag, length in zip(tags, size, strict=True):
            if tag in directory:
                directory[tag] = length
    return found


def resolution(image: Image.Image) -> tuple[float, float] | None:
    """Dots per inch (x, y), if the file gives them and they make sense."""
    try:
        x, y = (float(d) for d in image.info.get("dpi") or ())
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 0 < x < 1e6 and 0 < y < 1e6 else None


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
