"""Photographs stay on the user's disk, unless `publish --publish_images` shows some of them in the card."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_transfer.cli import main
from hf_transfer.hub.card_images import COLUMNS, EXAMPLES, MAX_EXAMPLES, insert_examples
from hf_transfer.hub.publish import LOADED, _list_files
from tests.hub_server import HubServer
from tests.test_publish import CARD, hub, push, pytestmark, unverified

__all__ = ["hub", "pytestmark", "unverified"]  # fixtures

COLORS = {"red_*fox*": (200, 30, 30), "blue jay": (30, 30, 200)}


def write_photos(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 3)):
        for name, color in COLORS.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = (np.array(color) + rng.integers(-25, 25, (48, 64, 3))).clip(0, 255).astype(np.uint8)
                exif = Image.Exif()
                exif[0x010E] = "at home"
                Image.fromarray(pixels).save(folder / split / name / f"private_{i}.jpg", exif=exif)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    data = write_photos(folder / "data")
    words = ["--readouts", "none", "--cv_folds", "1", "--output_dir", str(folder / "run")]
    main(["train", "linear_probe", "--dataset", str(data), *words])
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def is_photograph(content: bytes) -> bool:
    """Whether bytes are an image file that is no drawing, or text that contains one."""
    return content[:3] == b"\xff\xd8\xff" or content[:4] == b"\x89PNG" or b"data:image/jpeg" in content


@pytest.mark.usefixtures("unverified")
def test_no_photograph_leaves_the_disk_unless_asked_for(
    run: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert is_photograph((run / "report.html").read_bytes())  # the page, which stays
    assert [p for p in (run / "model").rglob("*") if p.is_file() and is_photograph(p.read_bytes())] == []
    status, shown = push(hub, run, capsys)
    assert status == 0, shown
    sent = hub.files("alice/digits", "main")
    assert [name for name, content in sent.items() if is_photograph(content)] == []
    assert not any(b"private_" in content for content in sent.values()), "names of files"
    assert b"## Examples" not in sent[CARD]


@pytest.mark.usefixtures("unverified")
def test_the_card_shows_examples_if_asked_for_and_a_later_push_removes_them(
    run: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    card, files = (run / "model" / CARD).read_bytes(), sorted(p.name for p in (run / "model").iterdir())
    status, shown = push(hub, run, capsys, "--publish_images")
    assert status == 0, shown
    assert f"bytes  {EXAMPLES}" in shown
    sent = hub.files("alice/digits", "main")
    assert [name for name, content in sent.items() if is_photograph(content)] == [EXAMPLES]
    grid = Image.open(io.BytesIO(sent[EXAMPLES]))
    assert not grid.getexif()
    left, right = np.asarray(grid)[60:100, 60:100].mean((0, 1)), np.asarray(grid)[60:100, 230:260].mean((0, 1))
    assert left[2] > left[0], "the first cell is a blue jay, the first class"
    assert right[0] > right[2], "the second cell is a fox"
    text = sent[CARD].decode()
    section = text[text.index("## Examples") : text.index("## Training")]
    assert f"![Examples]({EXAMPLES})" in section
    assert section.count("blue jay") == 3
    assert r"red\_\*fox\*" in section
    assert "private_" not in text
    assert (run / "model" / CARD).read_bytes() == card, "the saved model stays as it was"
    assert sorted(p.name for p in (run / "model").iterdir()) == files
    status, shown = push(hub, run, capsys)
    assert status == 0, shown
    assert EXAMPLES not in hub.files("alice/digits", "main")
    assert EXAMPLES in LOADED


def test_missing_photographs_are_a_mistake(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = run / "config.yaml"
    data = json.dumps(str(tmp_path / "gone"))
    lines = [f"dataset: {data}" if line.startswith("dataset:") else line for line in config.read_text().splitlines()]
    config.write_text("\n".join(lines))
    with pytest.raises(SystemExit) as stop:
        main(["publish", str(run), "--repo_id", "alice/digits", "--dry_run", "--publish_images"])
    assert stop.value.code == 2
    assert "put them back, or omit --publish_images" in capsys.readouterr().err


def test_examples_come_before_training_or_at_the_end_of_an_edited_card() -> None:
    assert insert_examples("# Model\n\n## Training\n\ntext\n", "## Examples\n") == (
        "# Model\n\n\n## Examples\n\n## Training\n\ntext\n"
    )
    assert insert_examples("# Mine\n", "## Examples\n") == "# Mine\n\n## Examples\n\n"
    assert MAX_EXAMPLES % COLUMNS == 0


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize(
    "name", ["cat.jpg", "photos/dog.PNG", "onnx/cat.jpg", "notes.txt", "scan", "NOTICE.jpg", "onnx/NOTICE"]
)
def test_files_of_somebody_else_in_the_model_folder_are_refused(
    name: str, run: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "model" / name
    file.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(file, format="PNG")
    for flags in ((), ("--dry_run",), ("--publish_images",)):
        status, shown = push(hub, run, capsys, *flags)
        assert status == 2
        message = f"model/{name} was not written by hf_transfer: move it out of model/, then publish again"
        assert message in shown
    assert hub.requests == []


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "task.json",
        "modeling_greedy.py", "curve_2.svg", "processor_config.json", "confidence.safetensors", "export.json",
        "onnx/model_int8.onnx", "onnx/model.onnx.data", "onnx/model_with_preprocessing.onnx", "openvino/model_fp16.bin",
    ],
)  # fmt: skip
def test_files_that_a_run_or_an_export_writes_are_pushed(name: str, tmp_path: Path) -> None:
    file = tmp_path / "model" / name
    file.parent.mkdir(parents=True)
    file.touch()
    (tmp_path / "model" / ".cat.jpg").touch()  # hidden files stay
    assert list(_list_files(tmp_path / "model")) == [name]


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md"])
def test_the_terms_that_a_user_adds_are_pushed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert list(_list_files(tmp_path)) == [name]


def test_the_card_counts_images_but_does_not_name_them(tmp_path: Path) -> None:
    """The log and the report name them."""
    data = write_photos(tmp_path / "data")
    (data / "train" / "blue jay" / "private_0.jpg").write_bytes(b"broken")
    shutil.copy(data / "train" / "blue jay" / "private_1.jpg", data / "test" / "blue jay" / "private_copy.jpg")
    shutil.copy(data / "train" / "blue jay" / "private_2.jpg", data / "train" / "red_*fox*" / "private_twin.jpg")
    (data / "train" / "private_loose.jpg").write_bytes(b"broken")
    words = ["--readouts", "none", "--cv_folds", "1", "--on_bad_image", "skip", "--output_dir", str(tmp_path / "run")]
    main(["train", "linear_probe", "--dataset", str(data), *words])
    notes = json.loads((tmp_path / "run" / "results.json").read_text())["data"]["notes"]
    assert (
        sum("private_" in note for note in notes) == 5
    )  # a twin is a copy within train, and contradicts the other's label
    card = (tmp_path / "run" / "model" / CARD).read_text()
    assert "private_" not in card
    assert "images that cannot be read." in card
    assert "byte for byte (1 of 7). Metrics on test are optimistic; remove the copies" in card
