"""Pictures of colored squares with several labels and numbers each, and the table of them."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLORS = {"blue": (50, 70, 230), "green": (40, 200, 60), "red": (220, 40, 40), "yellow": (230, 210, 40)}


def write_shapes(folder: Path) -> Path:
    """Writes 64 pictures of up to four colored squares, and a table of the colors, brightness and angle. Returns the table."""
    generator = np.random.default_rng(0)
    rows = [f"image,shapes,{','.join(COLORS)},brightness,angle,split"]
    for i in range(64):
        names = [name for name in COLORS if generator.random() < 0.5]
        brightness, angle = generator.uniform(20, 120), generator.uniform(-45, 45)
        gray = (int(brightness),) * 3
        picture = Image.new("RGB", (32, 32), gray)
        for k, (name, color) in enumerate(COLORS.items()):
            if name in names:
                x, y = 4 + 16 * (k % 2), 4 + 16 * (k // 2)
                ImageDraw.Draw(picture).rectangle((x, y, x + 8, y + 8), fill=color)
        picture.rotate(angle, fillcolor=gray).save(folder / f"{i}.png")
        shapes = "|".join(names) or "|"  # a lone separator: none of the labels
        flags = ",".join(str(int(name in names)) for name in COLORS)
        rows.append(f"{i}.png,{shapes},{flags},{brightness:.2f},{angle:.2f},{'test' if i >= 48 else 'train'}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder / "labels.csv"
