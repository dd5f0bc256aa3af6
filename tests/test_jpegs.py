"""Only whole, upright, gray or YCbCr JPEGs of 8 bits are decoded together, and their pixels are Pillow's."""

import warnings

import numpy as np
import pytest
import torch
import torchvision.io

from hf_transfer.data import jpegs
from hf_transfer.data.images import read_image
from hf_transfer.data.jpegs import JpegSize, Obstacle, check_jpeg_decoder, decode_jpegs, inspect_jpeg
from tests.odd_images import encode, make_odd_images, make_photo, turned

CPU = torch.device("cpu")
PHOTO = make_photo(70, 50, seed=0)
PLAIN = encode(PHOTO)


def test_plain_jpegs_are_decoded_to_pillows_pixels() -> None:
    plain = [(name, content) for name, content, is_plain in make_odd_images() if is_plain]
    decoded = decode_jpegs([content for _, content in plain], CPU)
    assert len(plain) == 20
    for (name, content), image in zip(plain, decoded, strict=True):
        expected = np.asarray(read_image(content, name))
        assert inspect_jpeg(content) == JpegSize(height_px=expected.shape[0], width_px=expected.shape[1])
        assert image is not None
        np.testing.assert_array_equal(image.numpy(), expected)


def with_frame(content: bytes, offset: int, value: int) -> bytes:
    """The JPEG with another byte in its frame header: 1 is the marker, 4 the bits, 5 and 6 the height."""
    changed = bytearray(content)
    changed[content.index(b"\xff\xc0\x00\x11") + offset] = value
    return bytes(changed)


XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize(
    ("content", "obstacle"),
    [
        (encode(PHOTO, "PNG"), Obstacle.NO_JPEG),
        (b"", Obstacle.NO_JPEG),
        (encode(PHOTO.convert("CMYK")), Obstacle.COLORS),
        (encode(PHOTO, keep_rgb=True), Obstacle.COLORS),
        (encode(PHOTO, exif=turned(6)), Obstacle.TURNED),
        (PLAIN[:2] + b"\xff\xe1" + (len(XMP) + 2).to_bytes(2, "big") + XMP + PLAIN[2:], Obstacle.TURNED),
        (with_frame(PLAIN, 4, 12), Obstacle.CODING),
        (with_frame(PLAIN, 1, 0xC9), Obstacle.CODING),
        (with_frame(with_frame(PLAIN, 5, 0), 6, 0), Obstacle.CODING),
        (with_frame(PLAIN, 5, 0xFF)[:-2], Obstacle.DAMAGED),
        (PLAIN[:3], Obstacle.DAMAGED),
    ],
)
def test_an_obstacle_is_named(content: bytes, obstacle: Obstacle) -> None:
    assert inspect_jpeg(content) is obstacle


def test_a_very_large_image_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpegs, "MAX_PX", 70 * 50)
    assert inspect_jpeg(PLAIN) == JpegSize(height_px=50, width_px=70)
    monkeypatch.setattr(jpegs, "MAX_PX", 70 * 50 - 1)
    assert inspect_jpeg(PLAIN) is Obstacle.LARGE


def test_every_truncation_is_noticed() -> None:
    """Also of a photo whose EXIF block has a whole thumbnail, which ends as an image does."""
    exif = turned(1)
    exif[0x010E] = PLAIN
    content = encode(PHOTO, exif=exif)
    assert content.count(b"\xff\xd9") == 2
    assert isinstance(inspect_jpeg(content), JpegSize)
    assert {inspect_jpeg(content[:end]) for end in range(3, len(content) - 1)} == {Obstacle.DAMAGED}


def test_a_file_that_the_decoder_refuses_does_not_harm_the_others() -> None:
    refused = PLAIN.replace(b"\xff\xdb", b"\xff\xfe")  # comments in place of quantization tables
    assert isinstance(inspect_jpeg(refused), JpegSize)
    first, none, last = decode_jpegs([PLAIN, refused, PLAIN], CPU)
    assert none is None
    assert first is not None
    assert last is not None
    assert torch.equal(first, last)


def test_a_torchvision_without_a_decoder_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    check_jpeg_decoder(CPU)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Couldn't load the image extension. If you built torchvision from source, ...")

    monkeypatch.setattr(torchvision.io, "decode_jpeg", fail)
    with pytest.raises(ValueError, match=r"^decoder=device: .* cpu; choose exact or fast, "):
        check_jpeg_decoder(CPU)
    monkeypatch.delattr(torchvision.io, "decode_jpeg")
    with pytest.raises(ValueError, match=r"^decoder=device: "):
        check_jpeg_decoder(CPU)


def test_memory_that_is_short_is_not_a_bad_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torchvision.io, "decode_jpeg", fail)
    with pytest.raises(torch.OutOfMemoryError):
        decode_jpegs([PLAIN, PLAIN], CPU)


def test_only_the_warning_about_the_decoder_is_hidden() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_jpeg_decoder(CPU)
        warnings.warn(
            "The image decoding and encoding capabilities of TorchVision are deprecated since torchvision 0.29",
            stacklevel=1,
        )
        warnings.warn("another", stacklevel=1)
    assert [str(each.message) for each in caught] == ["another"]
