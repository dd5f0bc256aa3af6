"""Image files of every kind that may stand in one folder: sizes, gray, CMYK, EXIF, progressive, other formats."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

NUM_ODD_IMAGES = 40


def encode(image: Image.Image, file_format: str = "JPEG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def make_photo(width_px: int, height_px: int, seed: int) -> Image.Image:
    """Colored blocks with noise and sharp edges, whose colors a decoder interpolates."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width_px, height_px), Image.Resampling.NEAREST)).astype(int)
    return Image.fromarray((pixels + rng.integers(-20, 21, pixels.shape)).clip(0, 255).astype(np.uint8))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def make_odd_images() -> list[tuple[str, bytes, bool]]:
    """File names, bytes, and whether the file is a plain JPEG, which the device decodes."""
    files = []
    for i in range(NUM_ODD_IMAGES):
        photo = make_photo(20 + 13 * (i * 7 % 11), 20 + 17 * (i * 5 % 13), seed=i)
        kinds = (
            ("jpg", encode(photo), True),
            ("jpg", encode(photo.convert("L")), True),
            ("jpg", encode(photo.convert("CMYK")), False),
            ("jpg", encode(photo, exif=turned(6)), False),
            ("jpg", encode(photo, exif=turned(1)), True),
            ("jpg", encode(photo, progressive=True, quality=60), True),
            ("jpg", encode(photo, subsampling=0, quality=95, restart_marker_blocks=2), True),
            ("png", encode(photo, "PNG"), False),
            ("png", encode(Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257), "PNG"), False),
            ("jpg", encode(photo, keep_rgb=True), False),
        )  # fmt: skip
        suffix, content, is_plain = kinds[i % len(kinds)]
        files.append((f"{i:02d}.{suffix}", content, is_plain))
    return files


def write_odd_images(root: Path) -> Path:
    """Writes the images below two class folders, in turn."""
    for i, (name, content, _) in enumerate(make_odd_images()):
        folder = root / "ab"[i // 2 % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return root
