"""Images of each kind become the square RGB image of the paper."""

import io
import struct

import cv2
import numpy as np
import pytest
from images import encode, photograph
from PIL import ExifTags, Image, ImageOps

from alexnet_jax.data.decode import UnknownRange, decode_square

SIDE = 32
PHOTO = photograph(3, SIDE, SIDE)
GRAY = np.asarray(Image.fromarray(PHOTO).convert("L"))
HALF_CLEAR = np.dstack([PHOTO, np.where(np.arange(SIDE) < SIDE // 2, 0, 255) + 0 * GRAY]).astype(
    np.uint8
)
ON_WHITE = np.where(np.arange(SIDE)[None, :, None] < SIDE // 2, 255, PHOTO)
SIXTEEN_BIT = GRAY.astype(np.uint16) * 256 + 3


def three(gray: np.ndarray) -> np.ndarray:
    return np.dstack([gray] * 3)


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("RGB", encode(PHOTO, "PNG"), PHOTO),
        ("gray", encode(GRAY, "PNG", "L"), three(GRAY)),
        ("black and white", encode(GRAY, "PNG", "1"), None),
        ("palette", encode(PHOTO, "PNG", "P"), None),
        ("transparent", encode(HALF_CLEAR, "PNG", "RGBA"), ON_WHITE),
        ("transparent gray", encode(HALF_CLEAR, "PNG", "LA"), None),
        ("transparent palette", encode(PHOTO, "PNG", "P", transparency=0), None),
        ("16-bit gray", encode(SIXTEEN_BIT, "PNG", "I;16"), three(GRAY)),
        ("16-bit gray TIFF", encode(SIXTEEN_BIT, "TIFF", "I;16"), three(GRAY)),
        ("BMP", encode(PHOTO, "BMP"), PHOTO),
        ("lossless WebP", encode(PHOTO, "WEBP", lossless=True), PHOTO),
        ("CMYK TIFF", encode(PHOTO, "TIFF", "CMYK"), PHOTO),
        ("GIF", encode(GRAY, "GIF", "L"), three(GRAY)),
        ("array RGB", PHOTO, PHOTO),
        ("array gray", GRAY, three(GRAY)),
        ("array gray with channel", GRAY[..., None], three(GRAY)),
        ("array with transparency", HALF_CLEAR, ON_WHITE),
    ],
)
def test_image_kinds(name, image, expected):
    found = decode_square(image, SIDE)
    assert found.shape == (SIDE, SIDE, 3)
    assert found.dtype == np.uint8
    if expected is None:
        rgba = Image.open(io.BytesIO(image)).convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        white.paste(rgba, mask=rgba)
        expected = np.asarray(white.convert("RGB"))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode", ["CMYK", "RGB", "L"])
def test_jpeg_resembles_the_saved_image(mode):
    smooth = np.asarray(Image.fromarray(photograph(1, 256, 256)).resize((SIDE, SIDE)))
    expected = three(np.asarray(Image.fromarray(smooth).convert("L"))) if mode == "L" else smooth
    found = decode_square(encode(smooth, "JPEG", mode, quality=95), SIDE)
    assert np.abs(found.astype(int) - expected).mean() < 4


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(96, 144, 64), (144, 96, 64), (192, 128, 64), (32, 48, 64), (48, 32, 64), (64, 64, 64)],
)
def test_scales_the_shorter_side_and_crops_the_center(height, width, size):
    """Like the two steps of the paper, for sizes where both end at whole pixels."""
    photo = photograph(5, height, width)
    scale = size / min(height, width)
    whole = Image.fromarray(photo).resize(
        (round(width * scale), round(height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (whole.width - size) // 2, (whole.height - size) // 2
    expected = np.asarray(whole.crop((left, top, left + size, top + size)))
    difference = np.abs(decode_square(encode(photo, "PNG"), size).astype(int) - expected)
    assert difference.max() <= 1


def test_crop_is_exact_if_its_border_lies_between_pixels():
    """The mirror image of a ramp with an odd number of surplus columns gives the mirrored crop."""
    ramp = np.broadcast_to(np.arange(0, 75 * 3, 3, dtype=np.uint8)[None, :, None], (50, 75, 3))
    found = decode_square(np.ascontiguousarray(ramp), 20)
    mirrored = decode_square(np.ascontiguousarray(ramp[:, ::-1]), 20)
    np.testing.assert_array_equal(found, mirrored[:, ::-1])
    assert found[:, 9:11].mean() == pytest.approx(37 * 3, abs=0.6)


def test_shrinking_averages_pixels():
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    inner = decode_square(encode(stripes, "PNG"), 16)[:, 2:-2]
    assert np.abs(inner.astype(int) - 127.5).max() < 3


def png_16(samples: np.ndarray) -> bytes:
    """Returns a PNG of uint16 samples, gray or RGB."""
    channels = samples[..., ::-1] if samples.ndim == 3 else samples
    return cv2.imencode(".png", np.ascontiguousarray(channels))[1].tobytes()


def tiff(samples: np.ndarray) -> bytes:
    return encode(samples, "TIFF", Image.fromarray(samples).mode)


# Black and white, so that the brightest sample tells the range.
RAMP = np.tile(np.linspace(0, 255, SIDE).round().astype(np.uint8), (SIDE, 1))


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("8 of 16 bits", png_16(RAMP.astype(np.uint16))),
        ("12 of 16 bits", png_16(RAMP.astype(np.uint16) * 16 + 15)),
        ("12 of 16 bits, TIFF", tiff(RAMP.astype(np.uint16) * 16 + 15)),
        ("12 of 16 bits, array", RAMP.astype(np.uint16) * 16 + 15),
        ("12 of 16 bits, RGB", png_16(np.dstack([RAMP] * 3).astype(np.uint16) * 16)),
        ("16 bits, RGB", png_16(np.dstack([RAMP] * 3).astype(np.uint16) * 257)),
        ("16 bits", png_16(RAMP.astype(np.uint16) * 257)),
        ("16 of 32 bits", tiff(RAMP.astype(np.int32) * 257)),
        ("31 bits", tiff(RAMP.astype(np.int32) << 23)),
        ("floats up to 1", tiff((RAMP / 255).astype(np.float32))),
        ("floats up to 255", tiff(RAMP.astype(np.float32))),
        (
            "16-bit PGM of a dark image",
            b"P5 32 32 65535\n" + (RAMP * np.uint16(1)).astype(">u2").tobytes(),
        ),
    ],
)
def test_samples_of_more_than_8_bits_are_scaled_by_their_range(name, image):
    expected = 0 * RAMP if "dark" in name else RAMP >> 1 if name == "31 bits" else RAMP
    np.testing.assert_array_equal(decode_square(image, SIDE), three(expected))


def test_unsigned_tiff_of_32_bits_has_no_negative_values():
    content = tiff(np.int32(RAMP.astype(np.uint32) << 24))
    signed = struct.pack("<HHII", 339, 3, 1, 2)  # the tag SampleFormat: 2 is signed, 1 unsigned
    assert signed in content
    unsigned = content.replace(signed, struct.pack("<HHII", 339, 3, 1, 1))
    np.testing.assert_array_equal(decode_square(unsigned, SIDE), three(RAMP))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (RAMP.astype(np.float32) - 1, "run from -1 to 254"),
        (RAMP.astype(np.float32) * 100, "run from 0 to 25500"),
        (RAMP.astype(np.float32) / 100, "run from 0 to 2.55"),
        (np.where(RAMP > 9, np.nan, 0).astype(np.float32), "run from nan to nan"),
        (RAMP.astype(np.int32) - 1, "run from -1 to 254"),
        (RAMP.astype(np.int32) * 1000, "run from 0 to 255000"),
    ],
)
def test_samples_of_an_unknown_range_are_rejected(samples, message):
    with pytest.raises(UnknownRange, match=f"{message}.*; save it with 8 bits"):
        decode_square(tiff(samples), SIDE)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "side", "options"),
    [
        ("PNG", SIDE, {}),
        ("TIFF", SIDE, {}),
        ("TIFF", SIDE, {"compression": "tiff_lzw"}),
        ("WEBP", SIDE, {"lossless": True}),
        ("JPEG", SIDE // 2, {}),
        ("JPEG", SIDE, {}),
    ],
)
def test_images_are_turned_upright_as_by_pillow(orientation, kind, side, options):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = encode(photograph(3, SIDE, SIDE + 8), kind, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
    lossless = io.BytesIO()
    upright.save(lossless, "PNG")
    expected = decode_square(lossless.getvalue(), side).astype(int)
    difference = np.abs(decode_square(stored, side) - expected)
    # Pillow scales the expected JPEG: see test_fast_jpeg_path_is_close_to_pillow.
    assert difference.mean() < 4 if side < SIDE else difference.max() == 0


def test_orientation_may_be_in_xmp():
    """As some editors write it. The JPEG has to shrink, so that Pillow does not decode it."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="3"/></x:xmpmeta>'
    stored = encode(PHOTO, "JPEG", xmp=xmp)
    plain = decode_square(encode(PHOTO, "JPEG"), SIDE // 2)
    np.testing.assert_array_equal(decode_square(stored, SIDE // 2), np.rot90(plain, 2))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*garbage", b"Exif\0\0garbage", b"Exif\0\0"])
def test_damaged_exif_is_ignored(exif):
    stored, plain = encode(PHOTO, "JPEG", exif=exif), encode(PHOTO, "JPEG")
    for side in (SIDE, SIDE // 2):
        np.testing.assert_array_equal(decode_square(stored, side), decode_square(plain, side))


@pytest.mark.parametrize(
    "broken", [b"", b"not an image", encode(PHOTO)[:300], encode(PHOTO, "PNG")[:-300]]
)
def test_incomplete_images_raise(broken):
    with pytest.raises(Exception, match="."):
        decode_square(broken, SIDE)


@pytest.mark.parametrize(
    ("height", "width", "size", "mode"),
    [
        (375, 500, 256, "RGB"),
        (400, 300, 256, "RGB"),
        (300, 400, 256, "L"),
        (257, 400, 256, "RGB"),
        (427, 640, 100, "RGB"),
        (427, 640, 32, "RGB"),
    ],
)
def test_fast_jpeg_path_is_close_to_pillow(height, width, size, mode):
    """It differs from Pillow's two smooth filters about as much as they differ from each other."""
    jpeg = encode(photograph(0, height, width), "JPEG", mode, quality=95)
    whole = Image.open(io.BytesIO(jpeg)).convert("RGB")
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    bilinear, bicubic = (
        np.asarray(
            whole.resize((size, size), method, box=(left, top, left + side, top + side))
        ).astype(int)
        for method in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    )
    found = decode_square(jpeg, size)
    nearest = min(np.abs(found - bilinear).mean(), np.abs(found - bicubic).mean())
    assert nearest < 1.5 + 2 * np.abs(bilinear - bicubic).mean()
    np.testing.assert_allclose(found.mean(axis=(0, 1)), bilinear.mean(axis=(0, 1)), atol=1.5)


def test_decoding_does_not_overwrite_earlier_images():
    """Decoders reuse memory, except that of images which are still referenced."""
    photos = [encode(photograph(n, 300, 400), "JPEG") for n in range(6)]
    kept = [decode_square(photo, 256) for photo in photos]
    alone = [decode_square(photo, 256).copy() for photo in photos]
    for first, second in zip(kept, alone, strict=True):
        np.testing.assert_array_equal(first, second)
