"""read_image: every kind of file becomes what a viewer shows, or an error with the reason."""

import io
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from hf_transfer.data.images import BadImageError, has_16_bits, read_image, read_reduced

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(source: bytes | Path | Image.Image) -> np.ndarray:
    picture = read_image(source, "it")
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def photo(width: int = 24, height: int = 16) -> Image.Image:
    """A smooth color image: JPEG keeps it within a few levels."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 10, y * 15, (x + y) * 6], -1).astype(np.uint8))


def gray16_png(values: np.ndarray, transparent: int | None = None) -> bytes:
    """A 16-bit gray PNG written by hand, so that the test does not depend on Pillow's writer."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = values.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    key = b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + key + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_rgb_files_give_the_pixels_pillow_gives(tmp_path: Path) -> None:
    jpeg = encoded(photo(), "JPEG")
    (tmp_path / "a.jpg").write_bytes(jpeg)
    expected = np.asarray(Image.open(io.BytesIO(jpeg))).astype(int)
    assert (pixels(jpeg) == expected).all()
    assert (pixels(tmp_path / "a.jpg") == expected).all()
    assert (pixels(photo()) == np.asarray(photo())).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_exif_orientation_is_applied_once(orientation: int, file_format: str) -> None:
    """The eight orientations of the EXIF standard, by where a viewer shows the first row and column of the file."""
    stored = np.asarray(photo()).astype(int)
    seen = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: stored.swapaxes(0, 1)[:, ::-1],
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: stored.swapaxes(0, 1)[::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    once = read_image(encoded(photo(), file_format, exif=exif, quality=95), "it")
    assert once.size == (seen.shape[1], seen.shape[0])
    assert np.abs(np.asarray(once).astype(int) - seen).mean() < 3  # JPEG's loss
    assert (pixels(once) == np.asarray(once)).all(), "reading the result again rotated it once more"


def test_unreadable_exif_leaves_the_image_as_stored_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    png = encoded(photo(), exif=b"garbage-that-is-no-tiff")  # Pillow itself ignores it in JPEG files
    with caplog.at_level(logging.WARNING):
        picture = read_image(png, "cats/1.png")
    assert picture.size == photo().size
    assert "cats/1.png" in caplog.text
    assert "EXIF" in caplog.text


def test_transparency_is_seen_on_white() -> None:
    rgba = Image.new("RGBA", (2, 1))
    rgba.putpixel((0, 0), (0, 0, 0, 0))  # transparent black, which a plain conversion turns black
    rgba.putpixel((1, 0), (255, 0, 0, 255))
    assert pixels(encoded(rgba)).tolist() == [[list(WHITE), list(RED)]]
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert pixels(half).tolist() == [[[127, 127, 127]]]
    gray = Image.new("LA", (2, 1))
    gray.putpixel((0, 0), (0, 0))
    gray.putpixel((1, 0), (40, 255))
    assert pixels(encoded(gray)).tolist() == [[list(WHITE), [40, 40, 40]]]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])], ids=["one index", "alpha a color"])
def test_palette_transparency_is_seen_on_white(transparency: int | bytes) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    for x in range(3):
        image.putpixel((x, 0), x)
    assert pixels(encoded(image)).tolist() == [[list(RED), list(GREEN), list(BLUE)]]
    assert pixels(encoded(image, transparency=transparency)).tolist() == [[list(RED), list(WHITE), list(BLUE)]]
    gif = pixels(encoded(image, "GIF", transparency=1))
    assert gif.tolist() == [[list(RED), list(WHITE), list(BLUE)]]


@pytest.mark.parametrize(("mode", "color", "key"), [("RGB", RED, RED), ("L", 9, 9)])
def test_color_key_transparency_is_seen_on_white(mode: str, color: object, key: object) -> None:
    assert pixels(encoded(Image.new(mode, (1, 1), color), transparency=key)).tolist() == [[list(WHITE)]]


def test_sixteen_bit_grays_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)
    expected = [[[v >> 8] * 3 for v in values[0].tolist()]]
    assert pixels(gray16_png(values)).tolist() == expected
    assert pixels(encoded(Image.fromarray(values), "TIFF")).tolist() == expected
    assert pixels(Image.fromarray(values.astype(np.int32))).tolist() == expected
    assert pixels(gray16_png(values, transparent=256)).tolist()[0][2] == list(WHITE)


def test_sixteen_bit_grays_of_eight_bit_values_stay_as_they_are() -> None:
    values = np.array([[0, 100, 255]], np.uint16)
    expected = [[[v] * 3 for v in values[0].tolist()]]
    assert pixels(gray16_png(values)).tolist() == expected
    assert pixels(encoded(Image.fromarray(values), "TIFF")).tolist() == expected
    assert pixels(gray16_png(values, transparent=100)).tolist()[0][1] == list(WHITE)


def test_thirty_two_bit_integers_of_eight_bit_values_stay_as_they_are() -> None:
    values = np.array([[0, 100, 255]], np.int32)
    assert pixels(Image.fromarray(values)).tolist() == [[[v] * 3 for v in values[0].tolist()]]
    assert pixels(encoded(Image.fromarray(values), "TIFF")).tolist() == [[[v] * 3 for v in values[0].tolist()]]


def test_integers_beyond_sixteen_bits_are_refused() -> None:
    with pytest.raises(BadImageError, match=r"scan\.tif.*-1 to 70000.*8 or 16 bits"):
        read_image(Image.fromarray(np.array([[-1, 70000]], np.int32)), "scan.tif")


def test_floats_are_read_by_their_range_or_refused() -> None:
    assert pixels(encoded(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), "TIFF"))[0, :, 0].tolist() == [
        0,
        128,
        255,
    ]
    assert pixels(Image.fromarray(np.array([[0, 7.6, 255]], np.float32)))[0, :, 0].tolist() == [0, 8, 255]
    for bad in ([-1, 1], [0, 300], [np.nan, 1]):
        with pytest.raises(BadImageError, match=r"heat\.tif.*float pixels"):
            read_image(Image.fromarray(np.array([bad], np.float32)), "heat.tif")


def test_cmyk_jpeg_shows_its_colors() -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red
    red = pixels(encoded(cmyk, "JPEG", quality=95))
    assert np.abs(red - RED).max() <= 6


@pytest.mark.parametrize("mode", ["1", "L", "YCbCr", "HSV", "LAB", "RGBX", "RGBa", "La", "PA"])
def test_every_other_mode_becomes_rgb(mode: str) -> None:
    assert pixels(Image.new(mode, (3, 2))).shape == (2, 3, 3)


def test_one_bit_images_are_black_and_white() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image)).tolist() == [[[0, 0, 0], list(WHITE)]]


def test_first_frame_of_an_animation_is_read() -> None:
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)
    gif = encoded(first, "GIF", save_all=True, append_images=[second])
    assert (pixels(gif) == RED).all()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("kept", [0.3, 0.7, 0.95])
def test_truncated_files_are_errors_that_name_the_file(file_format: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), file_format)
    with pytest.raises(BadImageError, match=r"^train/ants/a\.jpg: "):
        read_image(whole[: int(len(whole) * kept)], "train/ants/a.jpg")


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b"", "empty"),
        (b"just some notes\n", "not an image"),
        (b"\0" * 1000, "not an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "convert it to JPEG"),
    ],
    ids=["empty", "text", "zeros", "lfs", "html", "svg", "heic"],
)
def test_files_that_are_no_images_say_what_they_are(content: bytes, remedy: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(BadImageError, match=rf"^cats/a\.jpg: .*{remedy}"):
        read_image(tmp_path / "a.jpg", "cats/a.jpg")


def test_missing_file_is_named_without_its_path_on_this_machine(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match=r"^cats/a\.jpg: .*No such file") as caught:
        read_image(tmp_path / "a.jpg", "cats/a.jpg")
    assert str(tmp_path) not in str(caught.value)


def test_a_huge_image_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImageError, match=r"^map\.png: too large"):
        read_image(encoded(Image.new("RGB", (40, 40))), "map.png")


def test_the_callers_image_is_left_as_it_was() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    mine = Image.open(io.BytesIO(encoded(photo(), "PNG", exif=exif)))
    turned = read_image(mine, "it")
    assert turned.size == mine.size[::-1]
    assert mine.getexif()[0x0112] == 6
    assert mine.size == photo().size


def test_text_chunks_do_not_disturb() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 1000)
    assert (pixels(encoded(photo(), pnginfo=info)) == np.asarray(photo())).all()


def detailed(width: int, height: int) -> Image.Image:
    """A smooth random image, which JPEG keeps almost unchanged."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("least_px", "size"), [(None, (401, 299)), (300, (401, 299)), (150, (401, 299)), (149, (200, 150)), (30, (50, 37))]
)
def test_a_jpeg_is_reduced_only_as_far_as_both_sides_allow(least_px: int | None, size: tuple[int, int]) -> None:
    jpeg = encoded(detailed(401, 299), "JPEG", quality=95)
    image, original = read_reduced(jpeg, "it", least_px)
    assert (image.size, original) == (size, (401, 299))
    expected = read_image(jpeg, "it").resize(size, Image.Resampling.BOX)
    # Less than half a pixel of stretching; 7 levels with the partial column 51 and row 38.
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).mean() < 3


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_reduced_jpeg_is_upright_and_states_its_upright_size(mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg = encoded(detailed(400, 200).convert(mode), "JPEG", exif=exif, quality=95)
    whole = read_image(jpeg, "it")
    image, original = read_reduced(jpeg, "it", 100)
    assert original == whole.size == ((200, 400) if orientation > 4 else (400, 200))
    assert image.size == (whole.width // 2, whole.height // 2)
    difference = np.asarray(image).astype(int) - np.asarray(whole.resize(image.size, Image.Resampling.BOX))
    assert np.abs(difference).mean() < 2


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_other_formats_are_never_reduced(file_format: str) -> None:
    content = encoded(detailed(200, 160), file_format)
    image, original = read_reduced(content, "it", 20)
    assert image.size == original == (200, 160)
    assert (np.asarray(image) == np.asarray(read_image(content, "it"))).all()


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7, 0.95])
def test_a_truncated_jpeg_is_the_same_error_when_it_is_reduced(kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), "JPEG")
    errors = []
    for least_px in (None, 32):
        with pytest.raises(BadImageError, match=r"^ants/a\.jpg: ") as caught:
            read_reduced(whole[: int(len(whole) * kept)], "ants/a.jpg", least_px)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_the_header_says_whether_a_channel_has_sixteen_bits() -> None:
    gray = Image.fromarray(np.array([[0, 4095]], np.uint16))
    assert has_16_bits(gray16_png(np.array([[0, 4095]])))
    assert has_16_bits(encoded(gray, "TIFF"))
    for image in (photo(), photo().convert("L"), photo().convert("1"), photo().convert("P")):
        assert not any(has_16_bits(encoded(image, file_format)) for file_format in ("PNG", "TIFF", "GIF"))
    assert not has_16_bits(encoded(photo(), "JPEG"))
    assert not has_16_bits(b"")
