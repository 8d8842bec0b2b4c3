"""Damaged images are told from whole ones, and every colour comes out right."""

import struct
import warnings
import zlib

import numpy as np
import pytest
from damaged_images import DAMAGED, bomb, photograph, saved
from PIL import Image

from normfree.data.records import DamagedImage, decode, header_size


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_has_one_reason(name):
    data, reason = DAMAGED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DamagedImage, match=reason) as caught:
            decode(data)
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value)


def test_a_header_is_read_without_complaint():
    assert header_size(bomb()) in (None, (60000, 60000))
    assert header_size(saved(photograph())) == (40, 30)
    assert header_size(b"") is None


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_come_back_exactly(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(np.asarray(decode(saved(photograph(), kind, **options))), np.asarray(photograph()))


def test_a_path_and_bytes_are_the_same(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(photograph()))
    assert np.array_equal(np.asarray(decode(tmp_path / "a.png")), np.asarray(decode(saved(photograph()))))


def test_cmyk_is_converted():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for kind in ("JPEG", "TIFF"):
        pixel = np.asarray(decode(saved(red, kind)))[4, 4]
        assert np.abs(pixel.astype(int) - [255, 0, 0]).max() <= 3, kind  # JPEG rounds


def test_sixteen_bits_are_scaled():
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    pixels = np.asarray(decode(saved(Image.fromarray(ramp))))
    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels[:, :, 0].astype(float) - ramp / 257).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "YCbCr"])
def test_every_mode_becomes_rgb_and_grey(mode):
    image = photograph(mode)
    data = saved(image, "JPEG" if mode == "YCbCr" else "PNG")
    assert decode(data).mode == "RGB" and decode(data, 1).mode == "L"
    wanted = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(np.asarray(decode(data)).astype(int) - wanted).max() <= (40 if mode == "YCbCr" else 0)


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparency_is_laid_on_white(mode):
    if mode == "RGBA":
        image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))  # red, and not to be seen
        image.putpixel((0, 0), (0, 0, 0, 255))
        data = saved(image)
    else:
        image = Image.new("P", (4, 4), 1)
        image.putpalette([0, 0, 0, 200, 0, 0])
        image.putpixel((0, 0), 0)
        data = saved(image, transparency=1)
    pixels = np.asarray(decode(data))
    assert pixels[0, 0].tolist() == [0, 0, 0]
    assert pixels[2, 2].tolist() == [255, 255, 255]


def png(bits, colour, row, width, transparent):
    """A PNG of one row of pixels of any depth, with a transparent colour."""
    body = b""
    header = struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)
    for kind, part in (
        (b"IHDR", header),
        (b"tRNS", transparent),
        (b"IDAT", zlib.compress(b"\0" + row)),
        (b"IEND", b""),
    ):
        body += struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (png(8, 2, bytes((0, 0, 0, 9, 9, 9)), 2, bytes(6)), [255, 9]),
        (
            png(16, 2, struct.pack(">6H", 1000, 2000, 3000, 2560, 2560, 2560), 2, struct.pack(">3H", 1000, 2000, 3000)),
            [255, 10],
        ),
        (png(8, 0, bytes((7, 9)), 2, b"\0\7"), [255, 9]),
        (png(4, 0, b"\x05\xaf", 4, b"\0\x0a"), [0, 85, 255, 255]),
        (png(2, 0, b"\x1b", 4, b"\0\1"), [0, 255, 170, 255]),
        (png(1, 0, b"\xa0", 3, b"\0\0"), [255, 255, 255]),
        (png(16, 0, struct.pack(">2H", 0, 2570), 2, bytes(2)), [255, 10]),
    ],
    ids=["RGB", "RGB of 16 bits", "grey", "grey of 4 bits", "grey of 2 bits", "grey of 1 bit", "grey of 16 bits"],
)
def test_a_colour_that_a_png_calls_transparent_is_laid_on_white(data, wanted):
    for channels in (1, 3):
        pixels = np.asarray(decode(data, channels)).reshape(len(wanted), -1)
        assert pixels[:, 0].tolist() == wanted


def test_a_grey_tiff_is_scaled_by_its_bits():
    entries = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 1), (279, 3)]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    tags = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    data = head + tags + bytes(4) + b"\xff\xf8\x00"  # levels 4095 and 2048
    assert np.asarray(decode(data, 1)).tolist() == [[255, 127]]


def test_a_photograph_is_turned_as_its_camera_was():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = decode(saved(photograph(), "PNG", exif=exif))
    assert turned.size == (30, 40)
    assert np.array_equal(np.asarray(turned), np.asarray(photograph().rotate(-90, expand=True)))


def test_a_photograph_with_a_preview_beside_it_is_one_image():
    data = saved(photograph(), "MPO", save_all=True, append_images=[photograph(size=(8, 6))])
    assert decode(data).size == (40, 30)


GREY = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257


def test_grey_of_sixteen_bits_has_the_zero_and_the_transparency_of_its_format():
    plain = np.asarray(decode(saved(Image.fromarray(GREY), "PNG"), 1))
    assert np.array_equal(plain.ravel(), np.arange(256))
    assert np.array_equal(np.asarray(decode(saved(Image.fromarray(GREY), "TIFF"), 1)), plain)
    inverted = decode(saved(Image.fromarray(GREY), "TIFF", tiffinfo={262: 0}), 1)
    assert np.array_equal(np.asarray(inverted), 255 - plain)
    on_white = np.asarray(decode(saved(Image.fromarray(GREY), "PNG", transparency=5 * 257), 1)).ravel()
    assert on_white[5] == 255 and np.array_equal(np.delete(on_white, 5), np.delete(plain.ravel(), 5))


@pytest.mark.parametrize("pixels", [GREY.astype(np.int32), GREY.astype(np.int32) * 2**15, -GREY.astype(np.int32)])
def test_whole_numbers_of_32_bits_have_no_range(pixels):
    with pytest.raises(DamagedImage, match="whole-number pixels of 32 bits have no known range"):
        decode(saved(Image.fromarray(pixels), "TIFF"))
