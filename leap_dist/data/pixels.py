"""Images as 8-bit RGB: the one place that knows PIL's formats and modes.

Files come from strangers. So only FORMATS are opened: of PIL's others some start programs (EPS: Ghostscript), and
nobody means them by an image. What has too many pixels is refused by its header, before memory is taken for them.

Grey of more than 8 bits is scaled by its format's full range, which PIL's own conversion cuts off at 255. Where nothing
says what white is (floats, most 32-bit integers), the image is refused rather than guessed at.
"""

from __future__ import annotations

import functools
import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM")  # PIL's words
MOST_PIXELS = 2**26  # 8192 x 8192; the largest image of ImageNet-1K has 6 x 10^7. Decoded it takes 256 MiB
MOST_OF = {"WEBP": 2**25, "AVIF": 2**25, "JPEG2000": 2**24}  # whose decoders take two and four times as much a pixel
MOST_DEEP = 2**25  # 4 bytes a pixel, and as many again for what is read
STRIP_PIXELS = 2**20  # deep grey is scaled so many at a time

# Tags of TIFF.
BITS, COMPRESSION, PHOTOMETRIC, PLANES, SAMPLE_FORMAT, LOWEST, HIGHEST = 258, 259, 262, 284, 339, 340, 341
SIGNED, WHITE_IS_ZERO, UNCOMPRESSED, SEPARATE = 2, 0, 1, 2
STRAIGHT = {"La": "LA", "RGBa": "RGBA"}  # of what PIL multiplied by alpha


class TooManyPixels(ValueError):
    """An image that would take too much memory."""


class UnknownRange(ValueError):
    """An image of numbers, of which nothing says which are black and which are white, or PIL reads the wrong ones."""


def open_rgb(data: bytes) -> Image.Image:
    """The first picture in encoded `data`, decoded to 8-bit RGB, without its alpha and without EXIF rotation.

    Raises TooManyPixels, UnknownRange, or whatever PIL raises.
    """
    return rgb(open_image(data))


def open_image(data: bytes) -> Image.Image:
    """Encoded `data` as PIL opens it: its header is read, nothing is decoded.

    Raises TooManyPixels, or whatever PIL raises if it is of none of FORMATS.
    """
    _silence()
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise TooManyPixels(f"{error}".partition(",")[0]) from None
    except UnidentifiedImageError:  # PIL names the buffer, by an address
        raise UnidentifiedImageError("cannot identify image file") from None
    most = min(MOST_OF.get(image.format or "", MOST_PIXELS), MOST_DEEP if is_deep(image) else MOST_PIXELS)
    if image.width * image.height > most:
        raise TooManyPixels(f"{image.width} x {image.height} pixels, at most {most} are decoded; store it smaller")
    return image


@functools.cache
def _silence() -> None:
    """PIL warns where `open_image` may raise, which says it better."""
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def is_deep(image: Image.Image) -> bool:
    """Whether PIL alone would not make 8 bits of the pixels: `rgb` then must see the whole image, as PIL opened it."""
    return image.mode == "F" or image.mode.split(";")[0] == "I" or (image.format == "TIFF" and _misread(image) != "")


def _misread(image: Image.Image) -> str:
    """What PIL (13.0) takes for 8 bits without a sign though it is not, in an open TIFF; empty for any other."""
    tags = getattr(image, "tag_v2", {})
    if image.mode == "L" and tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED:
        return "8-bit pixels with a sign"
    in_planes = tags.get(PLANES, 1) == SEPARATE and tags.get(COMPRESSION, UNCOMPRESSED) == UNCOMPRESSED
    return "colours in planes of more than 8 bits" if in_planes and max(tags.get(BITS, (8,))) > 8 else ""


def rgb(image: Image.Image) -> Image.Image:
    """`image` of any of PIL's modes as RGB. UnknownRange if it is deep and its range is unknown."""
    if is_deep(image):
        return _eight_bits(image).convert("RGB")
    if image.mode in STRAIGHT:
        image = image.convert(STRAIGHT[image.mode])
    elif image.mode == "P" and "transparency" in image.info:  # straight to RGB it is the same, with a warning
        image = image.convert("RGBA")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep grey as 8-bit grey."""
    if misread := _misread(image):
        raise UnknownRange(f"{misread}, which PIL misreads; convert the image")
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode == "I" and tags and tags.get(SAMPLE_FORMAT, (1,))[0] != SIGNED:
        values = values.view(np.uint32)  # PIL has no unsigned 32 bits
    low, high = _range(image, tags, values)
    if not np.isfinite(values).all():
        raise UnknownRange("pixels that are no finite numbers")
    grey = np.empty(values.shape, np.uint8)
    rows = max(1, STRIP_PIXELS // max(1, image.width))
    for top in range(0, len(values), rows):  # in float64, eight times the memory, a strip at a time
        strip = values[top : top + rows].astype(np.float64)
        grey[top : top + rows] = ((strip - low) * (255 / (high - low))).round().clip(0, 255)
    inverted = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO  # PIL inverts 8 bits only
    return Image.fromarray(255 - grey if inverted else grey)


def _range(image: Image.Image, tags: dict, values: np.ndarray) -> tuple[float, float]:
    """The numbers that are black and white."""
    bits = tags.get(BITS, (16,))[0]
    signed = tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED
    if image.mode == "F" or bits > 16 or (image.mode == "I" and not tags and image.format not in ("PNG", "PPM")):
        return _wide_range(image, tags, values, signed)
    if signed and values.min() < 0:
        raise UnknownRange("negative pixels: nothing says which number is black")
    # Of PNM with any maximum, and of JPEG 2000, PIL makes 16 bits.
    return 0, 2 ** (bits - signed) - 1


def _wide_range(image: Image.Image, tags: dict, values: np.ndarray, signed: bool) -> tuple[float, float]:
    """The range of floats and 32-bit integers: what the file says, or all of 32 bits if some of the upper 16 are used.

    Most 32-bit files hold 8, 12 or 16 bits, which the full range would make black.
    """
    low, high = (np.ravel(tags.get(tag, np.nan))[0] for tag in (LOWEST, HIGHEST))
    if low < high:
        return float(low), float(high)
    if image.mode == "F":
        raise UnknownRange("floating-point pixels: nothing says which numbers are black and white")
    if values.min() < 0 or values.max() < 2**16:
        raise UnknownRange(
            f"32-bit pixels from {values.min():.0f} to {values.max():.0f}: nothing says which are black and white"
        )
    return 0, 2 ** (32 - signed) - 1
