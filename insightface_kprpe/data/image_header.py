"""Reads the format and size of a compressed image from its header, before anything is decoded.

OpenCV decodes anything, and a file of a few hundred kilobytes may claim a billion pixels.
"""

from __future__ import annotations

import struct

_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"hevx", b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")
_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_STANDALONE = {0x01, *range(0xD0, 0xD9)}  # JPEG markers without a segment


def image_kind(data: bytes) -> str:
    """JPEG, PNG, GIF, BMP, WebP, TIFF, AVIF or HEIC; "" for everything else."""
    for kind, starts in _STARTS.items():
        if data.startswith(starts):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp":
        brands = (data[8:12], *(data[at : at + 4] for at in range(16, min(64, len(data)), 4)))
        # Both formats may call themselves mif1; only one names avif.
        if any(brand in _AVIF_BRANDS for brand in brands):
            return "AVIF"
        if any(brand in _HEIF_BRANDS for brand in brands):
            return "HEIC"
    return ""


def image_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in pixels that a compressed image claims; None if its header is truncated or damaged."""
    try:
        return _SIZES[image_kind(data)](data)
    except (KeyError, IndexError, struct.error, ValueError):
        return None


def _jpeg(data: bytes) -> tuple[int, int]:
    at = 2
    while True:
        if data[at] != 0xFF:
            raise ValueError("no marker")
        marker = data[at + 1]
        if marker == 0xFF:  # markers may be padded
            at += 1
        elif marker in _STANDALONE:
            at += 2
        elif marker in _START_OF_FRAME:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]


def _png(data: bytes) -> tuple[int, int]:
    return struct.unpack_from(">II", data, 16)


def _gif(data: bytes) -> tuple[int, int]:
    return struct.unpack_from("<HH", data, 6)


def _bmp(data: bytes) -> tuple[int, int]:
    if struct.unpack_from("<I", data, 14)[0] == 12:  # OS/2's head
        return struct.unpack_from("<HH", data, 18)
    width, height = struct.unpack_from("<ii", data, 18)
    return abs(width), abs(height)  # a negative height: from top to bottom


def _webp(data: bytes) -> tuple[int, int]:
    form = data[12:16]
    if form == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if form == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _tiff(data: bytes) -> tuple[int, int]:
    order = "<" if data[:2] == b"II" else ">"
    large = struct.unpack_from(f"{order}H", data, 2)[0] == 43
    at = struct.unpack_from(f"{order}Q", data, 8)[0] if large else struct.unpack_from(f"{order}I", data, 4)[0]
    count = struct.unpack_from(f"{order}{'Q' if large else 'H'}", data, at)[0]
    first, step = (at + 8, 20) if large else (at + 2, 12)
    sides = {}
    for entry in range(first, first + step * min(count, 4096), step):
        tag, kind = struct.unpack_from(f"{order}HH", data, entry)
        if tag in (256, 257):  # width, height
            form = {3: "H", 4: "I", 16: "Q"}[kind]
            sides[tag] = struct.unpack_from(f"{order}{form}", data, entry + (12 if large else 8))[0]
    return sides[256], sides[257]


def _heif(data: bytes) -> tuple[int, int]:
    """The largest of the sizes that it lists: of the whole image, its tiles and its thumbnail."""
    sizes, at = [], data.find(b"ispe")
    while at >= 0:
        sizes.append(struct.unpack_from(">II", data, at + 8))
        at = data.find(b"ispe", at + 4, 1 << 20)  # the property is in the header; the rest is compressed pixels
    return max(sizes, key=lambda size: size[0] * size[1])


_STARTS = {
    "JPEG": b"\xff\xd8",
    "PNG": b"\x89PNG\r\n\x1a\n",
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": b"BM",
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}
_SIZES = {
    "JPEG": _jpeg,
    "PNG": _png,
    "GIF": _gif,
    "BMP": _bmp,
    "WebP": _webp,
    "TIFF": _tiff,
    "AVIF": _heif,
    "HEIC": _heif,
}
