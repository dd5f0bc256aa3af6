"""One picture from any image file: upright, opaque, 8 bits, RGB; what the eye sees in a viewer.

Decoding is Pillow's. What Pillow leaves to its caller is settled here, once, for training, evaluation and prediction:

- EXIF orientation is applied, so that a phone's portrait stands upright.
- Transparency (RGBA, LA, PA, palettes and colour keys) is composited on white, as a page would show it.
- 16-bit greys are scaled by 1/256; Pillow's own conversion clips them at 255, which turns them white.
- Floats in 0..1 are scaled by 255, floats in 0..255 are kept; others have no agreed meaning and are refused.
- Of an animation or a file of several pages, the first frame counts. Colour profiles are not applied, as in the
  pipelines that the checkpoints were pretrained with.

A file that is cut short is an error, not a picture with a grey lower half.
"""

import logging
import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

logger = logging.getLogger(__name__)

READER_VERSION = 1  # raise it when the same bytes give other pixels: it is part of every data fingerprint

# Of files in a folder, these are read as images; .heic so that it is an error with a remedy rather than left out.
# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif", ".jp2", ".tga",
})
# fmt: on

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow's decoders raise on damaged data. MemoryError is not among them: it says nothing about the file.
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
    """An image that cannot be read; the message begins with its name and says why."""


def read_image(source: bytes | str | Path | Image.Image, name: str) -> Image.Image:
    """The picture in `source` (a file's bytes, its path, or a PIL image) in mode RGB, fully loaded, no file open.

    `name` is what errors call it. A PIL image is never changed; one that is RGB and upright is returned as it is.

    Raises:
        BadImageError: empty, truncated, not an image, not there, or of pixel values without an agreed meaning.
    """
    if isinstance(source, (str, Path)):
        source = read_bytes(source, name)
    if isinstance(source, bytes) and not source:
        raise BadImageError(f"{name}: the file is empty (0 bytes)")
    try:
        image = Image.open(BytesIO(source)) if isinstance(source, bytes) else source
        image.load()
    except _DECODER_ERRORS as error:
        raise BadImageError(f"{name}: {_diagnosis(source, error)}") from error
    if 0 in image.size:
        raise BadImageError(f"{name}: the image has no pixels ({image.width} x {image.height})")
    return _upright(_rgb(image, name), image, name)


def read_bytes(path: str | Path, name: str) -> bytes:
    """The bytes of one image file.

    Raises:
        BadImageError: the file is missing, a folder, or not readable by this user.
    """
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        # Only what is wrong with this one file; a failing disk or too many open files must not pass for a bad image.
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        raise BadImageError(f"{name}: the file cannot be opened ({reason})") from error


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_integers(image, name).convert("RGB")
    if image.mode == "F":
        return _from_floats(image, name).convert("RGB")
    if image.mode == "La":  # premultiplied grey, which Pillow converts to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(paper, picture).convert("RGB")
    return image.convert("RGB")


def _from_integers(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise BadImageError(
            f"{name}: integer pixels from {low} to {high}; 16-bit images hold 0 to 65535, so the scale is unknown:"
            " save it with 8 or 16 bits"
        )
    grey = (values >> 8).astype(np.uint8)
    colour_key = image.info.get("transparency")
    if isinstance(colour_key, int):  # PNG's tRNS for 16-bit grey: this one value is transparent
        grey[values == colour_key] = 255
    return Image.fromarray(grey)


def _from_floats(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= 255.0):  # also true of NaN
        raise BadImageError(
            f"{name}: float pixels from {low:g} to {high:g}; 0 to 1 or 0 to 255 is understood: save it with 8 bits"
        )
    scale = 255.0 if high <= 1.0 else 1.0
    return Image.fromarray(np.rint(values * scale).astype(np.uint8))


def _upright(picture: Image.Image, image: Image.Image, name: str) -> Image.Image:
    """`picture` turned as the EXIF block of `image`, which it was made from, asks."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODER_ERRORS as error:
        # The pixels are sound, and viewers show such a file as it is stored; so do we, and say so.
        logger.warning("%s: its EXIF block cannot be read (%s); taken as upright", name, error)
        return picture
    method = _UPRIGHT.get(orientation)
    if method is None:
        return picture
    turned = picture.transpose(method)
    turned.info = {}  # it would still say "turn me" to whoever looks next
    return turned


def _diagnosis(source: bytes | Image.Image, error: Exception) -> str:
    """Why the bytes are no picture, in words that lead to the remedy."""
    if isinstance(error, Image.DecompressionBombError):
        return f"too large to be decoded safely ({error}); scale it down"
    head = source[:512] if isinstance(source, bytes) else b""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the image itself; fetch the images with `git lfs pull`"
    if text.startswith((b"<svg", b"<?xml")) and b"svg" in text:
        return "a vector drawing (SVG); render it to PNG first"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page saved under an image's name; download it again"
    if head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif", b"msf"):
        return "an HEIC photo, which Pillow does not read by itself; convert it to JPEG"
    if not isinstance(error, UnidentifiedImageError):
        return f"the image is damaged or cut short ({error})"
    return f"not an image that Pillow can read (it begins with {head[:12]!r})"
