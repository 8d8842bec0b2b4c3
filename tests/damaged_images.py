"""Files that are no whole image, each with the reason that is given for it."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photograph(mode="RGB", size=(40, 30)):
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0])
    return Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], 2).astype(np.uint8)).convert(mode)


def bomb(side=60000):
    """A PNG whose header promises more pixels than anyone should decode."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = b""
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")):
        chunks += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunks


def animation(kind):
    frames = [photograph(), photograph().rotate(90), photograph().rotate(180)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


def scans(count):
    """A progressive JPEG whose last scan comes so often."""
    data = saved(photograph(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


DAMAGED = {
    "empty": (b"", "empty"),
    "text": (b"this is no image", "no image of a known format"),
    "html": (b"<html><body>404</body></html>", "no image of a known format"),
    "truncated jpeg": (saved(photograph(), "JPEG")[:-40], "truncated"),
    "half a jpeg": (saved(photograph(), "JPEG", quality=95)[:700], "truncated"),
    "truncated png": (saved(photograph())[:-60], "truncated|broken"),
    "jpeg header only": (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", "no image|[tT]runcated"),
    "bomb": (bomb(), "bomb"),
    "larger than any": (bomb(10_000), "bomb"),
    "animated gif": (animation("GIF"), "several frames"),
    "animated webp": (animation("WEBP"), "several frames"),
    "scans": (scans(200), "209 scans, more than 200"),
    "pages": (animation("TIFF"), "several frames"),
    "float": (saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "no known range"),
}
