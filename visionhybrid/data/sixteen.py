"""16-bit pictures, which Pillow cannot hold, kept to the last bit; and the TIFF writer.

Pillow stores colour in 8 bits a channel. It can still decode a 16-bit file twice, once keeping the high byte of each
sample and once the low byte, by exchanging the byte order it believes the file to have; `read_colour` puts the two
together. Writing needs no trick: PNG and TIFF are short enough to write here.

Sources: PNG specification (W3C, 3rd edition, sections 5, 9 and 11), TIFF 6.0 and its supplement 2 (Deflate).
"""

from __future__ import annotations

import struct
import sys
import zlib
from io import BytesIO
from typing import BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin

_BAND = 1 << 22  # bytes compressed at a time
_TIFF_RGB, _TIFF_GREY, _UNASSOCIATED_ALPHA, _ADOBE_DEFLATE, _HORIZONTAL = 2, 1, 2, 8, 2


def is_sixteen(image: Image.Image) -> bool:
    """Whether the opened, not yet loaded `image` holds 16-bit colour of which Pillow would drop half."""
    return image.mode in ("RGB", "RGBA") and any(
        ";16" in _raw_mode(tile) for tile in getattr(image, "tile", ())
    )


def read_colour(file: BinaryIO) -> tuple[np.ndarray, Image.Image]:
    """Samples (H, W, 2, 3 or 4) uint16 of a file for which `is_sixteen` holds, and the loaded 8-bit image."""
    high, low = Image.open(file), Image.open(file)
    raw = {_raw_mode(tile) for tile in high.tile}
    if raw == {"LA;16B"}:  # PNG: four bytes a pixel, so that the decoder may as well deliver them as RGBA
        low.tile = [tile._replace(args="RGBA") for tile in low.tile]
        samples = np.asarray(low).view(">u2").astype(np.uint16)
        high.load()
        return samples, high
    swapped = {
        "L": "B",
        "B": "L",
        "N": "B" if sys.byteorder == "little" else "L",
    }  # N: the machine's own order
    for half, order in ((high, dict.fromkeys("LBN")), (low, swapped)):
        half.tile = [_with_mode(tile, order) for tile in half.tile]
    samples = np.asarray(high).astype(np.uint16) << 8
    samples |= np.asarray(low)
    if any(mode.startswith("RGBa") for mode in raw):
        samples = _divided_by_alpha(samples)
    return samples, high


def _with_mode(tile, order):
    """`tile` to be decoded in another byte order (None: its own), and as it stands: Pillow divides by half an alpha."""
    mode = _raw_mode(tile).replace("RGBa", "RGBA")
    name = mode[:-1] + (order[mode[-1]] or mode[-1])
    return tile._replace(args=(name, *tile.args[1:]) if isinstance(tile.args, tuple) else name)


def _divided_by_alpha(samples: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint16 whose colours were multiplied by alpha -> as if they had not been; black where alpha is 0."""
    colours, alpha = samples[..., :3].astype(np.uint32), samples[..., 3:].astype(np.uint32)
    plain = (colours * 65535 + alpha // 2) // np.maximum(alpha, 1)  # 65535^2 + 32767 is below 2^32
    samples[..., :3] = np.where(alpha > 0, plain.clip(max=65535), 0)
    return samples


def _raw_mode(tile) -> str:
    return str(tile.args[0] if isinstance(tile.args, tuple) else tile.args)


def encode_png(
    samples: np.ndarray, *, icc: bytes | None, exif: bytes | None, dpi: tuple[float, float] | None
) -> bytes:
    """A PNG of `samples` (H, W, 1 to 4) uint16: grey, grey + alpha, RGB or RGBA."""
    height, width, channels = samples.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    out = BytesIO()
    out.write(b"\x89PNG\r\n\x1a\n")
    _chunk(out, b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    if icc:
        _chunk(out, b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc))
    if dpi:
        _chunk(out, b"pHYs", struct.pack(">IIB", *(round(d / 0.0254) for d in dpi), 1))  # per metre
    if exif:
        _chunk(out, b"eXIf", exif.removeprefix(b"Exif\0\0"))
    packer = zlib.compressobj(6)
    above = np.zeros((1, width * channels * 2), np.uint8)
    rows = max(1, _BAND // above.size)
    for top in range(0, height, rows):
        band = samples[top : top + rows].astype(">u2").view(np.uint8).reshape(-1, above.size)
        _chunk(out, b"IDAT", packer.compress(_filtered(band, above, 2 * channels).tobytes()))
        above = band[-1:]
    _chunk(out, b"IDAT", packer.flush())
    _chunk(out, b"IEND", b"")
    return out.getvalue()


def _filtered(band: np.ndarray, above: np.ndarray, pixel: int) -> np.ndarray:
    """Rows with the PNG filter byte in front; each row takes the filter with the smallest sum of |signed byte|."""
    up = np.concatenate([above, band[:-1]])
    left, corner = np.zeros_like(band), np.zeros_like(band)
    left[:, pixel:], corner[:, pixel:] = band[:, :-pixel], up[:, :-pixel]
    choices = [band, band - left, band - up, band - _paeth(left, up, corner)]
    cost = np.stack(
        [np.abs(choice.view(np.int8).astype(np.int16)).sum(1, dtype=np.int64) for choice in choices]
    )
    best = cost.argmin(0)
    out = np.empty((len(band), band.shape[1] + 1), np.uint8)
    out[:, 0] = np.array([0, 1, 2, 4], np.uint8)[best]
    for i, choice in enumerate(choices):
        out[best == i, 1:] = choice[best == i]
    return out


def _paeth(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    a, b, c = (x.astype(np.int16) for x in (left, up, corner))
    to_a, to_b, to_c = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    return np.where((to_a <= to_b) & (to_a <= to_c), left, np.where(to_b <= to_c, up, corner))


def _chunk(out: BinaryIO, kind: bytes, data: bytes) -> None:
    if data or kind == b"IEND":
        out.write(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
        )


def encode_tiff(
    samples: np.ndarray, *, icc: bytes | None, exif: Image.Exif, dpi: tuple[float, float] | None
) -> bytes:
    """A Deflate TIFF of `samples` (H, W, 1 to 4) uint8 or uint16.

    8 bits too, because Pillow 13 cannot write an EXIF directory into a compressed TIFF. Grey with alpha of 16 bits is
    written as RGBA, which more programs (Pillow is one) read.
    """
    order, bits = ("<u2", 16) if samples.dtype == np.uint16 else ("u1", 8)
    if samples.shape[2] == 2 and bits == 16:
        samples = samples[:, :, [0, 0, 0, 1]]
    height, width, channels = samples.shape
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    for tag in exif:
        ifd[tag] = exif.get_ifd(tag) if tag in (0x8769, 0x8825) else exif[tag]
    rows = max(1, _BAND // (bits // 8 * width * channels))
    strips = []
    for top in range(0, height, rows):
        band = samples[top : top + rows]
        step = band.copy()
        step[:, 1:] -= band[:, :-1]  # horizontal differencing, modulo 2^bits
        strips.append(zlib.compress(step.astype(order).tobytes(), 6))
    sizes = [len(strip) for strip in strips]
    ifd[256], ifd[257], ifd[277], ifd[278] = width, height, channels, rows
    ifd[258], ifd[339], ifd[284] = (bits,) * channels, (1,) * channels, 1
    ifd[259], ifd[317] = _ADOBE_DEFLATE, _HORIZONTAL
    ifd[262] = _TIFF_RGB if channels > 2 else _TIFF_GREY
    if channels in (2, 4):
        ifd[338] = _UNASSOCIATED_ALPHA
    if icc:
        ifd[34675] = icc
    if dpi:
        ifd[282], ifd[283], ifd[296] = dpi[0], dpi[1], 2  # per inch
    ifd[279] = tuple(sizes)
    ifd[273] = tuple(int(start) for start in np.cumsum([0, *sizes[:-1]]))  # made absolute by `save`
    out = BytesIO()
    ifd.save(out)
    for strip in strips:
        out.write(strip)
    return out.getvalue()
