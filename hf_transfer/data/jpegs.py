"""Decodes several JPEGs together on a device, by torchvision: nvJPEG on an NVIDIA GPU, libjpeg-turbo on a CPU.

`inspect_jpeg` reads the header of a file, and names the obstacle if only `data.images` can read the file by its rules. So what
a decoder does with CMYK, with the EXIF orientation or with a truncated file never matters: it does not get such a file.

torchvision's decoder is deprecated since 0.29. Its successor TorchCodec cannot be imported without CUDA's libraries (0.17,
Linux), so a machine without a GPU could not test it.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from io import BytesIO

import torch
from PIL import Image

from hf_transfer.data.images import is_upright

MAX_PX = 2**24  # pixels of an image; a larger one is decoded alone, by Pillow

_START_OF_IMAGE, _END_OF_IMAGE = b"\xff\xd8", b"\xff\xd9"
_START_OF_SCAN = 0xDA
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_APP1, _APP14 = 0xE1, 0xEE  # EXIF or XMP; Adobe's color transform
_ADOBE_LENGTH, _FRAME_LENGTH = 12, 6
_DEPRECATION = r"The image decoding and encoding capabilities of torchvision are deprecated"  # of 0.29 and later


class Obstacle(StrEnum):
    """Why Pillow decodes a file."""

    NO_JPEG = "not a JPEG"
    COLORS = "CMYK or RGB inside the JPEG"
    CODING = "12 bits, arithmetic or lossless coding"
    TURNED = "EXIF orientation"
    LARGE = "very large"
    DAMAGED = "damaged or truncated"


@dataclass(frozen=True, kw_only=True)
class JpegSize:
    """The size that the header of a JPEG states, in pixels."""

    height_px: int
    width_px: int


@dataclass(frozen=True, kw_only=True)
class _Header:
    """The segments before the pixels: payloads by marker, the last of each, and where the pixels start."""

    segments: dict[int, bytes]
    scan_start: int


def inspect_jpeg(content: bytes) -> JpegSize | Obstacle:
    """Returns the size of an upright, whole, gray or YCbCr JPEG of 8 bits, or else the first obstacle.

    >>> inspect_jpeg(b"GIF89a")
    <Obstacle.NO_JPEG: 'not a JPEG'>
    """
    if not content.startswith(_START_OF_IMAGE + b"\xff"):
        return Obstacle.NO_JPEG
    header = _read_header(content)
    frames = [] if header is None else sorted(header.segments.keys() & _FRAMES)
    if header is None or len(frames) != 1 or len(frame := header.segments[frames[0]]) < _FRAME_LENGTH:
        return Obstacle.DAMAGED
    size = JpegSize(height_px=int.from_bytes(frame[1:3], "big"), width_px=int.from_bytes(frame[3:5], "big"))
    if frames[0] not in _HUFFMAN_FRAMES or frame[0] != 8 or not size.height_px * size.width_px:
        return Obstacle.CODING  # a height of 0 is stated after the pixels
    if not _is_gray_or_ycc(frame, header.segments):
        return Obstacle.COLORS
    if size.height_px * size.width_px > MAX_PX:
        return Obstacle.LARGE
    # Within the pixels, 0xFF is followed by 0 or the number of a restart, so these two bytes are only at the end.
    if content.rfind(_END_OF_IMAGE) < header.scan_start:
        return Obstacle.DAMAGED
    return Obstacle.TURNED if _APP1 in header.segments and not is_upright(content) else size


def decode_jpegs(contents: Sequence[bytes], device: torch.device) -> list[torch.Tensor | None]:
    """Returns each JPEG as an RGB image (H, W, 3) uint8 on `device`, or None for one that the decoder refuses."""
    from torchvision.io import ImageReadMode, decode_jpeg

    # `frombuffer` warns about bytes, which cannot be written to.
    encoded = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
    try:
        decoded = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # torchvision does not say which file it refuses
        if len(contents) == 1:
            return [None]
        return [image for content in contents for image in decode_jpegs([content], device)]
    return [image.permute(1, 2, 0) for image in decoded]


def check_jpeg_decoder(device: torch.device) -> None:
    """Raises ValueError, for the setting `decoder`, if torchvision cannot decode a JPEG on `device`.

    Also hides torchvision's warning that its decoder is deprecated, for the rest of the process.
    """
    warnings.filterwarnings("ignore", message=_DEPRECATION)
    sample = BytesIO()
    Image.new("RGB", (16, 16)).save(sample, "JPEG")
    try:
        is_able = decode_jpegs([sample.getvalue()], device)[0] is not None
    except (ImportError, AttributeError):  # a later torchvision without the function
        is_able = False
    if not is_able:
        raise ValueError(
            f"decoder=device: this torchvision cannot decode a JPEG on the device {device.type}; choose exact or fast, or "
            "install torchvision from the same index as torch"
        )


def _read_header(content: bytes) -> _Header | None:
    """Returns the segments up to the first scan; None if they do not follow each other as the standard says."""
    position, segments = len(_START_OF_IMAGE), dict[int, bytes]()
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xFF:  # filling
            position += 1
            continue
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        segments[marker] = content[position + 4 : end]
        if marker == _START_OF_SCAN:
            return _Header(segments=segments, scan_start=end)
        position = end
    return None


def _is_gray_or_ycc(frame: bytes, segments: dict[int, bytes]) -> bool:
    """Whether the components are gray, or luminance and colors. libjpeg decides by Adobe's segment and by the names."""
    num_components, names = frame[5], bytes(frame[6::3])
    if num_components != 3:
        return num_components == 1
    adobe = segments.get(_APP14, b"")
    is_adobes_rgb = adobe.startswith(b"Adobe") and len(adobe) >= _ADOBE_LENGTH and adobe[11] == 0
    return not is_adobes_rgb and names != b"RGB"
