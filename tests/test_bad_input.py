"""Bad input of every kind ends in one line that names it, through every door: no traceback, no hang, no changed result.

The suite is generated from a seed. CI runs a sample, `make soak` runs more than 500 bad files and 500 bad settings, and both
print their counts. The last tests draw input with hypothesis.
"""

import io
import json
import os
import random
import sys
import tarfile
import time
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import hf_transfer as ht
import hf_transfer.task  # here, so that its seconds count for no case
from hf_transfer.cli import main
from hf_transfer.config import DataConfig
from hf_transfer.data.dataset import load_data
from hf_transfer.data.images import BadImageError, read_image
from hf_transfer.errors import join_lines
from hf_transfer.flags import parse
from hf_transfer.launch import run_recipe
from hf_transfer.settings import Setting, list_settings, replace_settings, to_settings
from hf_transfer.strategy import default_config, strategy_names

LIMIT_S = 30  # a hang is longer; a case takes milliseconds
SAMPLE = 60  # cases of each kind in CI
MAX_LINE = 1000  # letters


def is_one_line(text: str) -> bool:
    return bool(text.strip()) and len(text) <= MAX_LINE and len(text.strip().splitlines()) == 1


def refusal(action: Callable[[], object]) -> str | None:
    """The message of the ValueError that the action raises; None if the action succeeds."""
    started = time.perf_counter()
    try:
        action()
    except ValueError as error:
        return str(error)
    finally:
        assert time.perf_counter() - started < LIMIT_S
    return None


def enter_door(door: str, strategy: str, words: list[str]) -> object:
    if door == "command":
        return main(["train", strategy, *words])
    return run_recipe(strategy, prog="hf-transfer", arguments=words)


# --- settings ---------------------------------------------------------------------------------------------------------

HUGE = 10**12
WRONG_NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "",
    " ",
    "x",
    "1,5",
    "0x10",
    "1\n2",
    "--",
    "\u0661x",
    "1e999",
    "None",
    str(-HUGE),
    "-1",
)
WRONG_VALUES: tuple[Any, ...] = ([], [1], {}, {"a": 1}, {1: {2: [3]}}, object(), b"1", 1j, ("a",), ValueError)


def wrong_texts(setting: Setting) -> list[str]:
    """Texts that no flag and no YAML file may give for the setting."""
    if setting.kind is bool:
        return []
    if setting.choices:
        return ["", " ", "nonsense", setting.choices[0].upper(), f"{setting.choices[0]}\n", "\x1b[31m", "1"]
    if setting.kind is str:
        return ["", " ", "\n", "\0", "a\0b", "x" * 5000]
    bounds = setting.allowed
    assert bounds is not None, f"{setting.name} needs a range"
    texts = [*WRONG_NUMBERS, *(["1.5", "1e3", "9" * 5000] if setting.kind is int else [])]
    low, high = max(bounds.lowest, bounds.above), min(bounds.highest, bounds.below)
    texts += [str(high * 10 + 1), str(HUGE)] if high < HUGE else []
    texts += [str(low - 1), str(low)] if low == bounds.above else [str(low - 1)]
    return texts


@dataclass(frozen=True, kw_only=True)
class BadSetting:
    """A value that is not allowed, and the door that it comes through."""

    strategy: str
    name: str
    value: Any
    door: str  # recipe, command, yaml, python

    def enter(self, folder: Path) -> str:
        """Returns the error line."""
        if self.door == "python":
            return refusal(self._call) or ""
        if self.door == "yaml":
            file = folder / "config.yaml"
            file.write_text(json.dumps({self.name: self.value}, default=str))
            words = ["--config", str(file)]
        else:
            words = [f"--{self.name}={self.value}"]
        errors = io.StringIO()
        with redirect_stderr(errors), pytest.raises(SystemExit) as stop:
            enter_door(self.door, self.strategy, words)
        assert stop.value.code == 2, self
        return errors.getvalue()

    def _call(self) -> object:
        default = default_config(self.strategy)
        if list_settings(default)[self.name].group in ("data", "model", "compute"):
            images = self.value if self.name == "dataset" else "sklearn/digits"
            if self.name == "dataset":
                return replace_settings(default, {"dataset": images})
            return ht.Task(images, **{self.name: self.value})
        if self.name in list_settings(default.strategy):
            return getattr(ht, self.strategy)(**{self.name: self.value})
        return replace_settings(default, {self.name: self.value})


def bad_settings() -> Iterator[BadSetting]:
    """Yields every setting of every strategy with every wrong value, through one door after the other."""
    doors = ("recipe", "command", "yaml", "python")
    count = 0
    for strategy in strategy_names():
        for name, setting in list_settings(default_config(strategy)).items():
            for text in wrong_texts(setting):
                count += 1
                yield BadSetting(strategy=strategy, name=name, value=text, door=doors[count % 4])
            for value in WRONG_VALUES:
                if setting.is_list and value == ("a",):
                    continue  # a list of one text
                yield BadSetting(strategy=strategy, name=name, value=value, door="python")


def check_settings(cases: list[BadSetting], folder: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    for case in cases:
        started = time.perf_counter()
        line = case.enter(folder)
        assert is_one_line(line), (case, line)
        assert case.name in line or "expected one argument" in line, (case, line)
        assert time.perf_counter() - started < LIMIT_S, case
        counts[case.door] += 1
    return counts


def test_a_sample_of_bad_settings_is_refused(tmp_path: Path) -> None:
    cases = random.Random(0).sample(list(bad_settings()), SAMPLE)
    assert check_settings(cases, tmp_path).total() == SAMPLE


@pytest.mark.soak
def test_every_bad_setting_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = check_settings(list(bad_settings()), tmp_path)
    assert counts.total() >= 500
    with capsys.disabled():
        sys.stdout.write(
            f"\n{counts.total():,} bad settings: all refused in one line, 0 tracebacks, 0 hangs ({dict(counts)})\n"
        )


# --- images -----------------------------------------------------------------------------------------------------------

FORMATS = (
    ("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("LA", "PNG"), ("I;16", "PNG"), ("RGB", "JPEG"), ("L", "JPEG"),
    ("CMYK", "JPEG"), ("P", "GIF"), ("RGBA", "WEBP"), ("RGB", "BMP"), ("CMYK", "TIFF"), ("I;16", "TIFF"), ("F", "TIFF"),
    ("LAB", "TIFF"), ("RGB", "PPM"), ("RGB", "TGA"), ("RGB", "JPEG2000"),
)  # fmt: skip
SIZES = ((9, 7), (1, 1), (1, 300), (400, 1))


def encode(mode: str, kind: str, size: tuple[int, int], generator: random.Random) -> bytes:
    """An image file with random pixels."""
    noise = np.frombuffer(generator.randbytes(size[0] * size[1] * 4), np.uint8).reshape(size[1], size[0], 4)
    image = Image.fromarray(noise[..., 0].astype(np.uint16) * 200) if mode == "I;16" else Image.fromarray(noise)
    stream = io.BytesIO()
    (image if mode == "I;16" else image.convert(mode)).save(stream, kind)
    return stream.getvalue()


def spoil(content: bytes, generator: random.Random) -> bytes:
    """Truncates, flips bits of, or overwrites part of a file."""
    data = bytearray(content)
    way = generator.randrange(4)
    position = generator.randrange(len(data))
    if way == 0:
        del data[position:]
    elif way == 1:
        for _ in range(generator.randrange(1, 8)):
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    elif way == 2:
        data[position : position + 20] = generator.randbytes(generator.randrange(20))
    else:  # the header, with extreme numbers: huge sizes, wrong offsets
        for _ in range(generator.randrange(1, 4)):
            data[generator.randrange(min(len(data), 40))] = generator.choice([0, 127, 128, 255])
    return bytes(data)


def read_or_refuse(content: bytes) -> Image.Image | None:
    """The image, or None if one line says why the file cannot be read."""
    images: list[Image.Image] = []
    message = refusal(lambda: images.append(read_image(content, "photo.jpg")))
    if message is None:
        return images[0]
    assert message.startswith("photo.jpg: ")
    assert is_one_line(message)
    return None


def check_images(number: int) -> Counter[str]:
    generator = random.Random(1)
    counts: Counter[str] = Counter()
    for index in range(number):
        mode, kind = FORMATS[index % len(FORMATS)]
        size = SIZES[index // len(FORMATS) % len(SIZES)]
        clean = encode(mode, kind, size, generator)
        reference = read_or_refuse(clean)
        assert reference is not None
        bad = spoil(clean, generator)
        image = read_or_refuse(bad)
        is_truncated = clean.startswith(bad)
        if image is not None:
            assert image.mode == "RGB"
            assert not is_truncated or image.tobytes() == reference.tobytes()
        counts["refused" if image is None else "loaded"] += 1
    return counts


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_a_sample_of_bad_images_is_refused_or_read() -> None:
    assert check_images(SAMPLE)["refused"] > SAMPLE // 3


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_it_fills_the_memory() -> None:
    clean = bytearray(encode("L", "PPM", (1, 1), random.Random(0)))
    for header in (b"P5 1000000 1000000 255\n", b"P5 30000 30000 255\n"):
        with pytest.raises(BadImageError, match="too large to decode safely"):
            read_image(header + bytes(clean), "photo.jpg")


# --- tables and folders -----------------------------------------------------------------------------------------------


def small_png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 255 - value)).save(stream, "PNG")
    return stream.getvalue()


PIXELS = [small_png(9 * i) for i in range(8)]
IMAGES = [{"bytes": pixels, "path": None} for pixels in PIXELS]
LABELS = [0, 1] * 4
CLEAN = {"image": IMAGES, "label": LABELS}
FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}


def paths(path: Any) -> list[dict[str, Any]]:
    return [{"bytes": None, "path": path}] * 8


BAD_COLUMNS: tuple[dict[str, Any], ...] = (
    {"label": pa.nulls(8)}, {"label": [None, 1] * 4}, {"label": [[0], [1]] * 4}, {"label": [{"a": 0}] * 8},
    {"label": [0.5, 1.0] * 4}, {"label": [float("nan"), 1.0] * 4}, {"label": [float("inf"), 1.0] * 4}, {"label": [-5, 1] * 4},
    {"label": [b"a", b"b"] * 4}, {"label": ["", "b"] * 4}, {"label": [1] * 8}, {"label": pa.array([0] * 8, pa.duration("s"))},
    {"label": None}, {"image": None}, {"image": pa.nulls(8)}, {"image": [*IMAGES[:7], None]}, {"image": list(range(8))},
    {"image": ["a.png"] * 8}, {"image": [b"xx"] * 8}, {"image": [[p] for p in PIXELS]}, {"image": paths("/etc/passwd")},
    {"image": paths("../../x.png")}, {"image": paths("/dev/zero")}, {"image": paths("a\0b")}, {"image": paths("x" * 5000)},
    {"image": paths("")}, {"image": paths(3)}, {"image": [{"bytes": "text", "path": None}] * 8}, {"target": LABELS},
    {"image": [{"bytes": [1, 2], "path": None}] * 8}, {"image": [], "label": []}, {"image": IMAGES[:1], "label": [0]},
)  # fmt: skip
BAD_FEATURES: tuple[Any, ...] = (
    "{", {**FEATURES, "label": {"_type": "Nothing"}}, {**FEATURES, "label": {"_type": "ClassLabel", "names": ["a"]}},
    {**FEATURES, "label": {"_type": "ClassLabel", "names": ["a", "a"]}},
    {**FEATURES, "label": {"_type": "ClassLabel", "names": [1, 2]}},
)  # fmt: skip


def make_tables() -> Iterator[pa.Table]:
    """Yields tables that are no data set of images with one label each."""
    for columns in BAD_COLUMNS:
        cells = {name: cell for name, cell in (CLEAN | columns).items() if cell is not None}
        yield pa.table(cells)
    for features in BAD_FEATURES:
        described = features if isinstance(features, str) else json.dumps({"info": {"features": features}})
        yield pa.table(CLEAN).replace_schema_metadata({"huggingface": described})


def write_arrow(table: pa.Table, file: Path) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def classes(folder: Path, *names: str) -> Path:
    for c, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            (folder / name / f"{i}.png").write_bytes(PIXELS[4 * (c % 2) + i])
    return folder


def nest(folder: Path, depth: int) -> None:
    inner = classes(folder, "a", "b") / "a" / "/".join("d" * depth)
    inner.mkdir(parents=True)


def mesh(folder: Path, count: int) -> None:
    names = [f"c{i}" for i in range(count)]
    classes(folder, *names)
    for name in names:
        for other in set(names) - {name}:
            (folder / name / other).symlink_to(folder / other)


def add(name: str, make: Callable[[Path], object], folder: Path) -> None:
    make(classes(folder, "a", "b") / name)


# Each is a folder that cannot be a data set.
FOLDERS: tuple[Callable[[Path], object], ...] = (
    lambda folder: None,
    partial(nest, depth=150),
    partial(mesh, count=7),
    partial(add, "c", Path.mkdir),
    partial(add, "a/x.png", lambda path: path.write_bytes(b"")),
    partial(add, "a/x.png", lambda path: path.symlink_to("/nowhere")),
    partial(add, "a/x.png", lambda path: path.symlink_to("/dev/zero")),
    partial(add, "a/x.png", os.mkfifo),
    partial(add, "metadata.csv", os.mkfifo),
    partial(add, "x.parquet", lambda path: path.write_bytes(b"x")),
    partial(add, "loop", lambda path: path.symlink_to(path)),
    partial(add, "\u200b \n", Path.mkdir),
    lambda folder: classes(folder, "a"),
    lambda folder: classes(folder, "e\u0301", "\u00e9"),
    lambda folder: classes(folder, " ", "b"),
    lambda folder: classes(folder, ".a", "b"),
    lambda folder: (classes(folder / "train", "a", "b"), classes(folder / "test", "a", "c")),
    lambda folder: (classes(folder / "train", "a", "b"), classes(folder / "training", "a", "b")),
    lambda folder: (folder / "dataset_dict.json").write_text("{"),
    lambda folder: ((folder / "state.json").write_text("{}"), (folder / "x.arrow").write_bytes(b"")),
    lambda folder: (folder / "x.parquet").write_bytes(b"PAR1"),
)


def load_or_refuse(dataset: Path) -> bool:
    """Whether the data loads, with the pixels of the clean images. Otherwise, one line says why not."""
    images: list[Image.Image] = []

    def load() -> None:
        data = load_data(DataConfig(dataset=str(dataset)))
        images.extend(split.image(i) for split in (data.train, data.validation) for i in range(len(split)))

    message = refusal(load)
    if message is not None:
        assert is_one_line(join_lines(message)), message
        return False
    known = {read_image(pixels, "x").tobytes() for pixels in PIXELS}
    assert {image.tobytes() for image in images} <= known, "a damaged image was read as another image"
    return True


CSV = "image,label\n" + "".join(f"pixels/{i}.png,{label}\n" for i, label in enumerate(LABELS))
# Each is a table of paths that cannot be a data set, beside the folder pixels/.
BAD_CSV: tuple[str | bytes, ...] = (
    "", "\n\n", "image,label\n", "image\npixels/0.png\n", CSV.replace("image", "x"), CSV.replace("label", "x"), f"image,{CSV}",
    CSV.replace("pixels/0", "../0"), CSV.replace("pixels/0", "/etc/passwd"), CSV.replace("pixels/0.png", ""),
    CSV.replace("pixels/0", "pixels/1"), CSV.replace("pixels", "pictures"), CSV.replace("pixels/0", "pixels/9"),
    CSV.replace("pixels/0", "x" * 5000), CSV.replace("pixels/0.png", "pixels"), CSV.replace(",0", ",0.5"),
    CSV.replace(",1", ","),
    CSV.replace(",1", ",0"), CSV.replace("pixels/0", "a\0b"), CSV.encode("utf-16-le"),
    CSV.replace("pixels/0", "\u00e9").encode("latin-1"),
    CSV.replace("pixels/0.png,0", '"pixels/0.png,0'), PIXELS[0],
)  # fmt: skip


def write_csv(file: Path, content: str | bytes = CSV) -> None:
    (file.parent / "pixels").mkdir(exist_ok=True)
    for i, pixels in enumerate(PIXELS):
        (file.parent / "pixels" / f"{i}.png").write_bytes(pixels)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_jsonl(file: Path) -> None:
    rows = [{"image": f"pixels/{i}.png", "label": label} for i, label in enumerate(LABELS)]
    write_csv(file, "".join(json.dumps(row) + "\n" for row in rows))


def write_zip(file: Path, prefix: str = "") -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for i, pixels in enumerate(PIXELS):
            archive.writestr(f"{prefix}{'ab'[LABELS[i]]}/{i}.png", pixels)


def write_tar(file: Path, mode: str = "w", *, is_webdataset: bool = False) -> None:
    with tarfile.open(file, mode) as archive:  # type: ignore[call-overload]
        for i, pixels in enumerate(PIXELS):
            files = {f"{i}.png": pixels, f"{i}.cls": str(LABELS[i]).encode()}
            for name, content in (files if is_webdataset else {f"{'ab'[LABELS[i]]}/{i}.png": pixels}).items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


# By suffix: a function that writes a clean data set.
WRITERS: tuple[tuple[str, Callable[[Path], object]], ...] = (
    (".parquet", lambda file: pq.write_table(pa.table(CLEAN), file)),
    (".arrow", lambda file: write_arrow(pa.table(CLEAN), file)),
    (".csv", write_csv),
    (".jsonl", write_jsonl),
    (".zip", write_zip),
    (".tar", write_tar),
    (".tar.gz", partial(write_tar, mode="w:gz")),
    (".tar", partial(write_tar, is_webdataset=True)),
)


def bad_files(generator: random.Random, folder: Path) -> Iterator[tuple[Path, bool]]:
    """Yields data sets, and whether each can only be refused. Damaged copies of a clean table may also be harmless."""
    for index, table in enumerate(make_tables()):
        for suffix, write in ((".parquet", pq.write_table), (".arrow", write_arrow)):
            file = folder / f"table{index}{suffix}"
            write(table, file)
            yield file, True
    for index, build in enumerate(FOLDERS):
        root = folder / f"folder{index}"
        root.mkdir()
        build(root)
        yield root, True
    for index, content in enumerate(BAD_CSV):
        write_csv(folder / f"table{index}.csv", content)
        yield folder / f"table{index}.csv", True
    for index, prefix in enumerate(("../", "/", "a/../../")):
        write_zip(folder / f"archive{index}.zip", prefix)
        yield folder / f"archive{index}.zip", True
    for index in range(10**6):
        suffix, write = WRITERS[index % len(WRITERS)]
        file = folder / f"spoiled{index}{suffix}"
        write(file)
        file.write_bytes(spoil(file.read_bytes(), generator))
        yield file, False


def check_files(number: int, folder: Path, *, every: int = 1) -> Counter[str]:
    counts: Counter[str] = Counter()
    for index, (path, is_bad) in zip(range(number), bad_files(random.Random(2), folder), strict=False):
        if index % every:
            continue
        loaded = load_or_refuse(path)
        assert not (is_bad and loaded), path
        counts["loaded" if loaded else "refused"] += 1
    return counts


def test_a_sample_of_bad_tables_and_folders_is_refused(tmp_path: Path) -> None:
    assert check_files(220, tmp_path, every=6)["refused"] >= 25


@pytest.mark.parametrize(("suffix", "write"), WRITERS)
def test_what_is_spoiled_here_loads_when_clean(suffix: str, write: Callable[[Path], object], tmp_path: Path) -> None:
    write(tmp_path / f"pets{suffix}")
    assert load_or_refuse(tmp_path / f"pets{suffix}")


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_all_bad_files_are_refused_or_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, files = check_images(1000), check_files(500, tmp_path)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{images.total():,} bad images, {files.total():,} bad tables and folders: 0 tracebacks, 0 hangs, 0 changed\n"
        )
        sys.stdout.write(f"images {dict(images)}, tables and folders {dict(files)}\n")


@pytest.mark.parametrize("door", ["recipe", "command", "python", "evaluate", "predict"])
@pytest.mark.parametrize(
    "build", [FOLDERS[0], FOLDERS[4], FOLDERS[7], FOLDERS[-1]], ids=["empty", "zero", "fifo", "parquet"]
)
def test_bad_data_is_one_line_through_every_door(
    door: str, build: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    build(root)
    flags = ["--dataset", str(root), "--output_dir", str(tmp_path / "run"), "--tracker", "none"]
    if door == "python":
        lines = [refusal(lambda: ht.Task(root).fit(ht.full(epochs=1, tracker="none"))) or ""]
    else:
        with pytest.raises(SystemExit) as stop:
            {
                "evaluate": lambda: main(["evaluate", "embedded", "--dataset", str(root)]),
                "predict": lambda: main(["predict", "embedded", str(root)]),
            }.get(door, lambda: enter_door(door, "full", flags))()
        assert stop.value.code in (1, 2)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-transfer")]
    assert len(lines) == 1
    assert is_one_line(lines[0])
    assert not (tmp_path / "run" / "model").exists()


# --- hypothesis -------------------------------------------------------------------------------------------------------

EXAMPLES = settings(
    max_examples=25,
    deadline=LIMIT_S * 1000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@EXAMPLES
@given(st.sampled_from(FORMATS), st.sampled_from(SIZES), st.randoms(use_true_random=False), st.binary(max_size=30))
def test_any_bytes_are_an_image_or_one_line(
    form: tuple[str, str], size: tuple[int, int], generator: random.Random, tail: bytes
) -> None:
    clean = encode(*form, size, random.Random(0))
    for content in (tail, clean[: len(tail)] + tail, spoil(clean, generator)):
        image = read_or_refuse(content)
        assert image is None or image.mode == "RGB"


NAMES = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..")
)


@settings(EXAMPLES, max_examples=8)
@given(st.lists(NAMES, max_size=4, unique=True), st.integers(0, 5))
def test_any_folder_names_are_classes_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], count: int
) -> None:
    root = tmp_path_factory.mktemp("data")
    for name in names:
        (root / name).mkdir(exist_ok=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(PIXELS[i])
    if load_or_refuse(root):
        assert set(load_data(DataConfig(dataset=str(root))).label_names) <= {_normal(name) for name in names}


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip())


CELLS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
)


@EXAMPLES
@given(st.lists(CELLS, min_size=8, max_size=8))
def test_any_labels_in_memory_are_classes_or_one_line(labels: list[Any]) -> None:
    task = ht.Task(list(zip(PIXELS, labels, strict=True)))
    message = refusal(lambda: task.data)
    assert is_one_line(message) if message else len(task.data.train) + len(task.data.validation) == 8


NESTED = st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=2), st.integers(), max_size=2)
SCALARS = CELLS | NESTED | st.dates()
SETTING_NAMES = sorted(to_settings(default_config("lora")))


@EXAMPLES
@given(st.dictionaries(st.sampled_from(SETTING_NAMES) | st.text(max_size=5), SCALARS, min_size=1, max_size=3))
def test_any_values_are_settings_or_one_line(values: dict[str, Any]) -> None:
    message = refusal(lambda: replace_settings(default_config("lora"), values))
    if message is None:
        known = to_settings(replace_settings(default_config("lora"), values))
        assert {name: known[name] for name in values} == values
    else:
        assert is_one_line(join_lines(message))


@EXAMPLES
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_yaml_file_is_settings_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("yaml") / "config.yaml"
    file.write_bytes(content)
    errors = io.StringIO()
    with redirect_stderr(errors):
        try:
            config = parse("lora", prog="try", description="", arguments=["--config", str(file)]).config
        except SystemExit:
            assert is_one_line(errors.getvalue())
        else:
            assert config == default_config("lora")
