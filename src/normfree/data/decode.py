"""From a file's bytes to pixels, or to one short reason why not."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

from normfree.common.checks import required
from normfree.common.files import kind_of
from normfree.common.text import first_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
"""Formats that are decoded, an MPO as the JPEG it is: none of Pillow's that starts another program (PostScript)."""

ORIENTATION = 0x0112
"""EXIF's tag for how the camera was held."""


class DamagedImage(ValueError):
    """Bytes that are no image, or none that can be trusted; the message is the reason, without a name."""


def decode(source: bytes | str | Path, channels: int = 3) -> Any:
    """Decode a still image of any format in :data:`FORMATS`, in any colour that Pillow reads.

    Sixteen bits are scaled to eight, CMYK and palettes are converted, transparency is laid on white, and a
    photograph is turned as its EXIF data say.

    Args:
        source: an encoded image, or the path of one.
        channels: 3 for RGB, 1 for grey.

    Returns:
        A PIL image of mode RGB or L.

    Raises:
        DamagedImage: if it is empty, truncated, animated, no image, or so large that decoding it is an attack
            (Pillow's limit, 89 million pixels).
        ImportError: Pillow is not installed.
    """
    Image = required("PIL.Image", "decoding images")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _opened(source) as image:
                # A photograph with a preview beside it (MPO) also has frames; its first is the picture.
                if getattr(image, "is_animated", False) and image.format != "MPO":
                    raise DamagedImage("it has several frames, of which none is the image")
                return to_eight_bits(_upright(image), channels)
    except DamagedImage:
        raise
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise DamagedImage(_reason(source, error)) from error


def header_size(source: bytes | str | Path) -> tuple[int, int] | None:
    """Width and height as an image's header says; None of what is no image, which decoding will tell."""
    Image = required("PIL.Image", "decoding images")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with _opened(source) as image:
                return image.size
    except Exception:  # a damaged file makes Pillow raise almost anything
        return None


def _opened(source: bytes | str | Path) -> Any:
    """An image whose header has been read, of one of our formats; a path has to lead to a file."""
    from PIL import Image

    if not isinstance(source, bytes) and (kind := kind_of(source)) != "file":
        raise DamagedImage("there is no such file" if kind == "nothing" else f"it is {kind}, no file")
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)


def to_eight_bits(image: Any, channels: int = 3) -> Any:
    """Convert a PIL image of any mode to RGB or grey; Pillow's own conversion clips sixteen bits to white."""
    wanted = "RGB" if channels == 3 else "L"
    if image.mode == wanted:
        image.load()  # while the file is open
        return image
    if image.mode == "F":
        raise DamagedImage("floating-point pixels have no known range")
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = _on_white(image)
    return image.convert(wanted)


def _on_white(image: Any) -> Any:
    """Lay transparency on white: the colours of transparent pixels are whatever the encoder left there."""
    from PIL import Image

    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    if image.getexif().get(ORIENTATION, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _reason(source: bytes | str | Path, error: Exception) -> str:
    """One line, without the address of a buffer in it."""
    if not source or (not isinstance(source, bytes) and kind_of(source) == "file" and not os.path.getsize(source)):
        return "it is empty"
    if type(error).__name__ == "UnidentifiedImageError":
        return "it is no image of a known format"
    return first_line(error)
