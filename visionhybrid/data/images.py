"""Image files in and out, with nothing lost that a restored picture should keep.

    picture = read_image("scan.tif")          # EXIF orientation already applied
    write_image("scan.png", picture)          # atomically: the whole file or none

Read: PNG, JPEG, WebP, TIFF, BMP, GIF, PPM, JPEG 2000 and AVIF; one, 8 and 16 bits; grey, colour, palette, alpha, CMYK. Written: PNG,
JPEG, WebP, TIFF. 16 bits, the ICC profile, EXIF and the resolution survive where the target format can hold them; of
several frames or pages the first is read, and `Picture.notes` says so.
"""

from __future__ import annotations

import os
import secrets
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from visionhybrid.data import metadata, sixteen
from visionhybrid.data.metadata import DAMAGE, one_line

READABLE = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"
}  # fmt: skip
READ_SUFFIXES = frozenset([*SUFFIXES, ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".jp2", ".avif"])
_LARGEST = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383, "TIFF": 2**31 - 1}  # pixels a side
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # what one begins with; + where offsets have 64 bits


class ImageError(ValueError):
    """A file that cannot be read or written: `path`, and the `reason` in one line."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(path, reason)  # both, so that it survives the way out of a worker process
        self.path, self.reason = Path(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image and what its file said about it.

    pixels: (1 or 3, H, W) float32 in [0, 1], as stored (no gamma is removed); alpha: (1, H, W) likewise, not premultiplied.
    bits: 8 or 16 a sample. format: Pillow's name of the file's format. icc: the profile of `pixels`. exif: a
    block as JPEG stores it, orientation already applied and reset to 1. dpi: (x, y). notes: what was changed on reading.
    """

    pixels: Tensor
    alpha: Tensor | None = None
    bits: int = 8
    format: str = "PNG"
    icc: bytes | None = field(default=None, repr=False)
    exif: bytes | None = field(default=None, repr=False)
    dpi: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.pixels.shape[2], self.pixels.shape[1]

    def save(self, path: str | Path, *, format: str | None = None, quality: int | None = None) -> None:
        """`write_image(path, self, ...)`."""
        write_image(path, self, format=format, quality=quality)


# ---- reading -----------------------------------------------------------------------------------------------------


def read_image(path: str | Path) -> Picture:
    """The picture in the file `path`.

    Raises: ImageError: no such file, a folder, no permission, not an image, truncated or damaged, of a kind with no
        meaning here (float or 32-bit samples), or more than 179 million pixels (Pillow's limit against bombs).
    """
    with _opened(path) as file:
        return _decode(file)


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) from the file's header alone, before orientation is applied. Raises ImageError as `read_image`."""
    with _opened(path) as file:
        return _open(file).size


@contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file, _quiet():
            if not os.fstat(file.fileno()).st_size:
                raise ImageError(path, "the file is empty")
            yield file
    except ImageError as error:
        raise ImageError(path, error.reason) from None
    except UnidentifiedImageError:
        raise ImageError(path, _unidentified(path)) from None
    except Image.DecompressionBombError as error:
        raise ImageError(path, f"too many pixels: {one_line(error)}") from None
    except MemoryError:
        raise ImageError(path, "not enough memory to read it") from None
    except DAMAGE as error:
        told = getattr(error, "strerror", None)  # the system's word, if it is the system that failed
        raise ImageError(path, told or f"truncated or damaged: {one_line(error)}") from error


def _unidentified(path: str | Path) -> str:
    with open(path, "rb") as file:
        if file.read(4) in _TIFF:
            return "a TIFF that is damaged, or of a kind that is not read; save it as grey or RGB of 8 or 16 bits"
    return f"not an image in one of the formats {', '.join(READABLE)}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's remarks on damaged metadata; in the main thread only, since warning filters are the process's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(file: BinaryIO) -> Image.Image:
    Image.init()  # formats that this Pillow was built without are then missing from Image.OPEN
    return Image.open(file, formats=[name for name in READABLE if name in Image.OPEN])


def _decode(file: BinaryIO) -> Picture:
    image = _open(file)
    notes = []
    if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
        image.seek(0)
        notes.append(f"the first of {frames} frames or pages")
    tags = getattr(image, "tag_v2", {})
    turned = tags.get(metadata.ORIENTATION, 1)  # of a TIFF, which Pillow itself turns upright as it loads
    if tags.get(284) == 2 and 16 in tags.get(258, ()):
        raise ImageError("", "16-bit TIFF with separate colour planes is not supported; save it interleaved")
    if sixteen.is_sixteen(image):
        samples, image = sixteen.read_colour(file)
        peak, icc = 65535, image.info.get("icc_profile")
        if isinstance(
            key := image.info.get("transparency"), tuple
        ):  # PNG: one colour stands for "transparent"
            samples = np.dstack([samples, 65535 * (samples != np.array(key)).any(-1).astype(np.uint16)])
    else:
        image.load()
        samples, peak, icc = samples_of(image, notes)
    pixels = (
        torch.from_numpy(samples).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    )
    pixels /= peak
    exif, orientation = metadata.exif(image, notes)
    pixels = _upright(pixels, orientation)
    dpi = metadata.resolution(image)
    if dpi and (orientation >= 5 or turned in range(5, 9)):
        dpi = dpi[1], dpi[0]
    colours = 3 if len(pixels) > 2 else 1
    return Picture(
        pixels=pixels[:colours],
        alpha=pixels[colours:] if len(pixels) > colours else None,
        bits=8 if peak == 255 else 16,
        format="JPEG" if image.format == "MPO" else image.format or "PNG",
        icc=icc,
        exif=exif,
        dpi=dpi,
        notes=tuple(notes),
    )


def samples_of(image: Image.Image, notes: list[str]) -> tuple[np.ndarray, int, bytes | None]:
    """Samples (H, W, 1 to 4) of a PIL image, their largest value, and the ICC profile that belongs to them.

    `notes` is told of conversions. Raises: ImageError: float or 32-bit samples; it names the mode in place of a path.
    """
    icc, mode = image.info.get("icc_profile"), image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        return *_grey16(image), icc
    if mode in ("I", "F"):
        raise ImageError(
            f"image of mode {mode}",
            f"{'32-bit integer' if mode == 'I' else 'float'} samples have no white point; save as 8 or 16 bits",
        )
    if mode == "CMYK":
        image, icc = _from_cmyk(image, icc), None
        notes.append("CMYK converted to sRGB")
    elif mode == "LAB":
        image, icc = image.convert("RGB"), None
        notes.append("Lab converted to sRGB")
    elif mode in ("1", "L", "LA", "La"):
        image = image.convert("LA" if image.has_transparency_data else "L")
    else:  # palette, YCbCr, premultiplied
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    samples = np.array(image)
    return samples.reshape(*samples.shape[:2], -1), 255, icc


def _grey16(image: Image.Image) -> tuple[np.ndarray, int]:
    samples = np.array(image).astype(np.uint16)[..., None]
    tags = getattr(image, "tag_v2", {})
    peak = 4095 if tags.get(258) == (12,) else 65535
    if tags.get(262) == 0:  # white is zero: Pillow turns round 8 bits only
        samples = peak - samples
    if isinstance(key := image.info.get("transparency"), int):
        samples = np.concatenate([samples, peak * (samples != key).astype(np.uint16)], -1)
    return samples, peak


def _from_cmyk(image: Image.Image, icc: bytes | None) -> Image.Image:
    if icc:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(icc))
            converted = ImageCms.profileToProfile(
                image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            return converted or image.convert("RGB")
        except (ImageCms.PyCMSError, OSError):  # a broken profile, or one that is not of CMYK
            pass
    return image.convert("RGB")


def _upright(x: Tensor, orientation: int) -> Tensor:
    """Undo the EXIF orientation (1 to 8) of x (C, H, W)."""
    if orientation >= 5:
        x = x.transpose(1, 2)
    flips = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation, [])
    return x.flip(flips).contiguous() if flips or orientation >= 5 else x


# ---- writing -----------------------------------------------------------------------------------------------------


def write_image(
    path: str | Path, picture: Picture, *, format: str | None = None, quality: int | None = None
) -> None:
    """Write `picture`, clamped to [0, 1] and rounded, under a temporary name in the same folder, then rename it.

    Args:
        format: "PNG", "JPEG", "WEBP" or "TIFF"; by default what the suffix of `path` says.
        quality: 1 to 100 for JPEG (default 95) and WebP (default: lossless). JPEG from 90 up keeps full colour resolution.
    16 bits are kept by PNG and TIFF and rounded to 8 by JPEG and WebP.
    Raises: ImageError: the format is unknown or cannot hold this picture, or the file cannot be written.
    """
    path = Path(path)
    data = _named(path, encode_image, picture, format=format or format_of(path), quality=quality)
    with atomic(path) as file:
        file.write(data)


def format_of(path: str | Path) -> str:
    """The format that the suffix of `path` stands for. Raises: ImageError: none that can be written."""
    try:
        return SUFFIXES[Path(path).suffix.lower()]
    except KeyError:
        raise ImageError(
            path, f"no format for the suffix {Path(path).suffix!r}; have {', '.join(SUFFIXES)}"
        ) from None


def misfit(format: str, size: tuple[int, int], alpha: bool) -> str | None:
    """Why a picture of `size` (width, height) cannot be stored as `format`; None if it can."""
    if format not in _LARGEST:
        return f"no format {format!r} here; have {', '.join(_LARGEST)}"
    if max(size) > _LARGEST[format]:
        return f"{format} holds at most {_LARGEST[format]} pixels a side, not {size[0]} x {size[1]}; use PNG or TIFF"
    if alpha and format == "JPEG":
        return "JPEG cannot hold transparency; use PNG, WebP or TIFF"
    return None


def encode_image(picture: Picture, *, format: str, quality: int | None = None) -> bytes:
    """The bytes of the file that `write_image` would write. Raises: ValueError: `format` cannot hold this picture."""
    format = format.upper()
    if reason := misfit(format, picture.size, picture.alpha is not None):
        raise ValueError(reason)
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"quality goes from 1 to 100, got {quality}")
    exif = metadata.sized(picture.exif, picture.size, layout=format != "TIFF")
    block = exif.tobytes() if len(exif) else None
    deep = picture.bits == 16 and format in ("PNG", "TIFF")
    samples = _quantised(picture, 65535 if deep else 255)
    if deep and format == "PNG":
        return sixteen.encode_png(samples, icc=picture.icc, exif=block, dpi=picture.dpi)
    if format == "TIFF":
        return sixteen.encode_tiff(samples, icc=picture.icc, exif=exif, dpi=picture.dpi)
    options: dict[str, Any] = {"icc_profile": picture.icc, "exif": block, "dpi": picture.dpi}
    if format == "JPEG":
        quality = 95 if quality is None else quality
        options |= {"quality": quality, "subsampling": 0 if quality >= 90 else 2}
    elif format == "WEBP":
        options |= {"lossless": quality is None, "quality": 80 if quality is None else quality, "exact": True}
    out = BytesIO()
    image = Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)
    image.save(out, format, **{k: v for k, v in options.items() if v is not None})
    return out.getvalue()


def _quantised(picture: Picture, peak: int) -> np.ndarray:
    """Samples (H, W, C) uint8 or uint16, alpha last; a band of rows at a time, so that no second float copy exists."""
    planes = [picture.pixels] + ([] if picture.alpha is None else [picture.alpha])
    width, height = picture.size
    out = np.empty((height, width, sum(map(len, planes))), np.uint8 if peak == 255 else np.uint16)
    rows = max(1, (1 << 22) // width)
    for top in range(0, height, rows):
        band = torch.cat([plane[:, top : top + rows] for plane in planes])
        out[top : top + rows] = band.float().clamp(0, 1).mul(peak).round().permute(1, 2, 0).numpy()
    return out


def _named(path: Path, call, *args, **options):
    """`call`, its complaint turned into an ImageError that names `path`."""
    try:
        return call(*args, **options)
    except (OSError, ValueError, struct.error) as error:
        raise ImageError(path, one_line(error)) from error


@contextmanager
def atomic(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name only when complete and on the disk; on any failure nothing is left.

    Raises: ImageError: it cannot be written (no folder, no permission, disk full).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ImageError(path, f"cannot be written: {error.strerror or one_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
