"""What notebooks show: tables and pictures, in which names from strangers do nothing."""

from pathlib import Path

from PIL import Image

import hf_transfer as ht
from hf_transfer.displays import show_code, show_paragraph, show_pictures, show_table, show_title

NAME = "<img src=x onerror=alert(1)> & 'co'"


def test_names_are_escaped_everywhere() -> None:
    image = Image.new("RGBA", (200, 100))
    shown = [
        show_title(NAME), show_paragraph(NAME), show_code(NAME), show_table([(NAME,), (NAME,)]), show_pictures([(image, NAME)])
    ]  # fmt: skip
    assert not any("<img src=x" in each for each in shown)
    assert all("&lt;img src=x onerror=alert(1)&gt; &amp;" in each for each in shown)


def test_data_shows_its_splits_and_an_image_of_each_label(tmp_path: Path) -> None:
    for label, color in (("<b>ant", 0), ("bee", 255)):
        (tmp_path / "train" / label).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (90, 60), (color, i, 0)).save(tmp_path / "train" / label / f"{i}.png")
    shown = ht.Task(str(tmp_path)).data._repr_html_()
    assert shown.count("data:image/jpeg;base64,") == 2
    assert shown.index("<figcaption>&lt;b&gt;ant</figcaption>") < shown.index("<figcaption>bee</figcaption>")
    assert "<tr><td>train</td><td>8</td></tr><tr><td>validation</td><td>2</td></tr>" in shown
    assert "<b>" not in shown
