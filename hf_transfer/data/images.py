"""Reads any image file as an upright, opaque, 8-bit RGB image, as an image viewer shows the file.

Pillow decodes the file. Decisions that Pillow leaves to its caller are made here, once for training, evaluation and prediction:

- EXIF orientation is applied, so that portrait photos from a phone are upright.
- Transparency (RGBA, LA, PA, palettes and color keys) is composited on white, as on a web page.
- 16-bit and 32-bit gray values are divided by 256, but stay as they are if none of the image is above 255: such a file stores
  8-bit values. Pillow's own conversion clips at 255, which turns 16-bit images white. Values of 10 to 14 bits are not
  stretched, because each image would then have a scale of its own: they are dark, and `notes.notes_on_depth` says so.
- Floats in 0..1 are scaled by 255, floats in 0..255 stay as they are, and other ranges are an error.
- Animations and multi-page files give their first frame.
- Color profiles are not applied, because the pipelines that pretrained the checkpoints did not apply color profiles.

A truncated file is an error, not an image with a gray lower half.

Pillow decodes on every path, except that `--decoder device` leaves plain JPEGs to torchvision (see `jpegs`). On a CPU,
torchvision and TorchCodec save about 0.2 ms per image, and neither decodes a JPEG at a fraction of its size, which saves 30 ms
and more for a photo of 12 megapixels (`read_reduced`).
"""

import errno
import logging
import os
import stat
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

logger = logging.getLogger(__name__)

READER_VERSION = 3  # part of every data fingerprint; increase it when the same bytes decode to other pixels

# Suffixes of files that are read as images. Pillow cannot read .heic: such a file is an error with a remedy, not left out.
# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif", ".jp2", ".tga",
})
# fmt: on

_ORIENTATION_TAG = 0x0112
_BITS_TAG = 0x0102  # of TIFF: the bits of each channel
_PNG_BITS = 24  # position of the byte with the bits of a channel
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPING = {_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}  # these exchange width and height

# Errors that concern only this one file, not the whole disk or process.
_FILE_ERRORS = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)

# Errors that Pillow's decoders raise on damaged data. A MemoryError says nothing about the file and is not among them.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BadImageError(ValueError):
    """The error for an unreadable image. Its message starts with the image's name and gives the reason."""


def read_image(source: bytes | str | Path | Image.Image, name: str) -> Image.Image:
    """Returns the image in `source` (a file's bytes or path, or a PIL image) in mode RGB, fully loaded, with no file left open.

    Error messages call the image `name`. A PIL image is never modified. An upright RGB PIL image is returned as it is.

    Raises:
        BadImageError: the file is missing, empty, truncated or not an image, or pixel values are in an ambiguous range.
    """
    return read_reduced(source, name)[0]


def read_reduced(
    source: bytes | str | Path | Image.Image, name: str, least_px: int | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """Returns the image as `read_image` does, but possibly reduced, together with the original width and height in pixels.

    With `least_px`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if both of its sides keep at least `least_px` pixels. The
    decoder then computes fewer pixels, each a mean of the original ones. Raises the errors of `read_image`.
    """
    if isinstance(source, (str, Path)):
        source = read_bytes(source, name)
    if isinstance(source, bytes) and not source:
        raise BadImageError(f"{name}: the file is empty (0 bytes)")
    try:
        image = Image.open(BytesIO(source)) if isinstance(source, bytes) else source
        size, reduced = image.size, None
        if least_px is not None and isinstance(source, bytes):
            reduced = image.draft(None, (least_px, least_px))  # None for all formats but JPEG
        image.load()  # may also correct the size of some other formats
        width_px, height_px = image.size if reduced is None else size
    except _DECODER_ERRORS as error:
        raise BadImageError(f"{name}: {_diagnosis(source, error)}") from error
    if 0 in image.size:
        raise BadImageError(f"{name}: the image has no pixels ({image.width} x {image.height})")
    rgb, is_turned = _upright(_drop_partial(_rgb(image, name), reduced), image, name)
    return rgb, (height_px, width_px) if is_turned else (width_px, height_px)


def is_upright(content: bytes) -> bool:
    """Whether the encoded image is upright as stored. False also if its EXIF block cannot be read."""
    try:
        with Image.open(BytesIO(content)) as image:
            return image.getexif().get(_ORIENTATION_TAG, 1) not in _UPRIGHT
    except _DECODER_ERRORS:
        return False


def has_16_bits(content: bytes) -> bool:
    """Whether the header of an encoded PNG or TIFF says more than 8 bits per channel. False if it cannot be read."""
    try:
        with Image.open(BytesIO(content)) as image:
            if image.format == "PNG":
                return content[_PNG_BITS] > 8
            return isinstance(image, TiffImageFile) and max(image.tag_v2.get(_BITS_TAG, (1,))) > 8
    except _DECODER_ERRORS:
        return False


def read_longer_side(content: bytes, name: str) -> int:
    """Returns the longer side in pixels of the encoded image, from its header. Raises BadImageError if it has none."""
    try:
        with Image.open(BytesIO(content)) as image:
            return max(image.size)
    except _DECODER_ERRORS as error:
        raise BadImageError(f"{name}: {_diagnosis(content, error)}") from error


def read_bytes(path: str | Path, name: str) -> bytes:
    """Returns the bytes of one image file.

    Raises:
        BadImageError: the file is missing, not a regular file, or not readable by this user.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # opening a FIFO or a device may block forever
            raise BadImageError(f"{name}: not a regular file (a folder, FIFO, socket or device)")
        return Path(path).read_bytes()
    except OSError as error:
        if error.errno not in _FILE_ERRORS:  # a failing disk or too many open files must not pass for a bad image
            raise
        raise BadImageError(f"{name}: the file cannot be opened ({os.strerror(error.errno)})") from error


def _drop_partial(rgb: Image.Image, reduced: tuple[str, tuple[int, int, float, float]] | None) -> Image.Image:
    """Returns a reduced image without a last column or row of which less than half is in the original image.

    At 1/8, an image 401 pixels wide gets 51 columns, and would be stretched by 51 / 50.125.
    """
    if reduced is None:
        return rgb
    width, height = (round(side) for side in reduced[1][2:])
    return rgb if rgb.size == (width, height) else rgb.crop((0, 0, width, height))


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_integers(image, name).convert("RGB")
    if image.mode == "F":
        return _from_floats(image, name).convert("RGB")
    if image.mode == "La":  # premultiplied gray, which Pillow converts only to LA
        image = image.convert("LA")
    if image.has_transparency_data:
        foreground = image.convert("RGBA")
        background = Image.new("RGBA", foreground.size, "white")
        return Image.alpha_composite(background, foreground).convert("RGB")
    return image.convert("RGB")


def _from_integers(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise BadImageError(
            f"{name}: the pixels are integers from {low} to {high}, outside the 16-bit range 0 to 65535, so the scale is"
            " unknown: save the image with 8 or 16 bits"
        )
    gray = (values if high <= 0xFF else values >> 8).astype(np.uint8)
    color_key = image.info.get("transparency")
    if isinstance(color_key, int):  # the tRNS chunk of a 16-bit gray PNG makes this value transparent
        gray[values == color_key] = 255
    return Image.fromarray(gray)


def _from_floats(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= 255.0):  # this test also refuses NaN
        raise BadImageError(
            f"{name}: float pixels from {low:g} to {high:g}, outside the ranges 0 to 1 and 0 to 255: save the image with 8 bits"
        )
    scale = 255.0 if high <= 1.0 else 1.0
    return Image.fromarray(np.rint(values * scale).astype(np.uint8))


def _upright(rgb: Image.Image, image: Image.Image, name: str) -> tuple[Image.Image, bool]:
    """Returns `rgb`, rotated or mirrored as the EXIF orientation of `image` says, and whether width and height are swapped."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODER_ERRORS as error:
        # The pixels are sound, and viewers show such a file as it is stored.
        logger.warning("%s: the EXIF block cannot be read (%s); the image is assumed to be upright", name, error)
        return rgb, False
    method = _UPRIGHT.get(orientation)
    if method is None:
        return rgb, False
    upright = rgb.transpose(method)
    upright.info = {}  # with the EXIF block, the next reader would rotate the image again
    return upright, method in _SWAPPING


def _diagnosis(source: bytes | Image.Image, error: Exception) -> str:
    """Returns the reason why `source` cannot be decoded, with a remedy if one is known."""
    if isinstance(error, Image.DecompressionBombError):
        return f"too large to decode safely ({error}); downscale the image"
    head = source[:512] if isinstance(source, bytes) else b""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the image itself; fetch the images with `git lfs pull`"
    if text.startswith((b"<svg", b"<?xml")) and b"svg" in text:
        return "a vector drawing (SVG); render it to PNG first"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page saved under an image name; download the image again"
    if head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif", b"msf"):
        return "an HEIC photo, which Pillow cannot read on its own; convert it to JPEG"
    if not isinstance(error, UnidentifiedImageError):
        return f"the image is damaged or truncated ({error})"
    return f"not an image that Pillow can read (it starts with {head[:12]!r})"
