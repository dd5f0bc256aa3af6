"""The cases of docs/errors.md: command lines with a mistake. A case builds the files that its command line names.

`tests/test_error_cases.py` runs each case, and `scripts/write_errors.py` writes the table of all lines.
"""

import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import timm
from PIL import Image
from timm.models import save_for_hf

from hf_transfer.cli import main
from hf_transfer.config import RunConfig
from hf_transfer.reporting.results import write_config
from hf_transfer.settings import Setting, list_settings
from hf_transfer.strategy import default_config, strategy_names

EMBEDDED = Path(__file__).parents[1] / "hf_transfer" / "assets" / "embedded"
PLACE = "path/to"  # stands for the folder with the files of a case

Build = Callable[[Path], object]


@dataclass(frozen=True, kw_only=True)
class ErrorCase:
    """A mistake (`trigger`, in words) and a command line that contains it. `{}` in a word is the folder that `build` fills."""

    trigger: str
    command: str
    build: Build = lambda _: None

    def run(self, folder: Path) -> tuple[int, str]:
        """Runs the command in this process, with files in `folder`/to. Returns the exit status and the error line."""
        folder = folder / Path(PLACE).name
        folder.mkdir()
        self.build(folder)
        words = [word.replace("{}", str(folder)).replace("\\n", "\n") for word in self.command.split()]
        output, errors = io.StringIO(), io.StringIO()
        try:
            with redirect_stdout(output), redirect_stderr(errors):
                main(words)
        except SystemExit as stop:
            status = stop.code
        else:
            raise AssertionError(f"{self.command}: no error; the command printed {output.getvalue()[:200]}")
        lines = [line for line in errors.getvalue().splitlines() if line.startswith("hf-transfer")]
        assert len(lines) == 1, errors.getvalue()
        assert isinstance(status, int)
        line = lines[0].replace(str(folder), PLACE).replace(str(Path.cwd()), "path/to/current")
        return status, re.sub(r"^hf-transfer[\w -]*: ", "", line)


def images(folder: Path, *classes: str, count: int = 4) -> Path:
    """Writes an image folder with `count` images of each class."""
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (40 * i, 90 * c, 0)).save(folder / name / f"{i}.png")
    return folder


def damage(name: str, change: Callable[[Path], object]) -> Build:
    """Returns a builder that copies the embedded checkpoint to `model/`, and applies `change` to its file `name`."""

    def build(folder: Path) -> None:
        shutil.copytree(EMBEDDED, folder / "model")
        change(folder / "model" / name)

    return build


def config_with(**values: object) -> Callable[[Path], object]:
    """Returns a change that replaces values of a JSON file."""
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | values))


def truncate(file: Path) -> None:
    """Keeps the first half of a file."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    """Flips one bit in the header of a safetensors file."""
    content = bytearray(file.read_bytes())
    content[20] ^= 1
    file.write_bytes(content)


def replace_by_folder(file: Path) -> None:
    """Puts a folder in the place of a file."""
    file.unlink(missing_ok=True)
    file.mkdir()


def yaml(text: str | bytes) -> Build:
    """Returns a builder that writes config.yaml."""
    content = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / "config.yaml").write_bytes(content)


def image_folder(change: Callable[[Path], object] = lambda _: None, classes: tuple[str, ...] = ("a", "b")) -> Build:
    """Returns a builder that writes the image folder `data`, and applies `change` to it."""
    return lambda folder: change(images(folder / "data", *classes))


def table(**columns: object) -> Build:
    """Returns a builder that writes data.parquet: 8 images with labels 0 and 1, with `columns` in place of others."""

    def build(folder: Path) -> None:
        stream = io.BytesIO()
        Image.new("RGB", (4, 4)).save(stream, "PNG")
        cells = {"image": [{"bytes": stream.getvalue(), "path": None}] * 8, "label": [0, 1] * 4}
        chosen = {name: cell for name, cell in (cells | columns).items() if cell is not None}
        pq.write_table(pa.table(chosen), folder / "data.parquet")

    return build


def csv(text: str) -> Build:
    """Returns a builder that writes the images a/0.png to b/3.png and the table labels.csv beside them."""
    return lambda folder: (images(folder / "data", "a", "b") / "labels.csv").write_text(text)


def zipped(name: str) -> Build:
    """Returns a builder that writes data.zip with one file."""

    def build(folder: Path) -> None:
        with zipfile.ZipFile(folder / "data.zip", "w") as archive:
            archive.writestr(name, b"")

    return build


def truncated_tar(folder: Path) -> None:
    """Writes half of a tar of an image folder."""
    shutil.make_archive(str(folder / "data"), "tar", images(folder / "x", "a", "b"))
    truncate(folder / "data.tar")


def configurations(folder: Path) -> None:
    """Writes a folder of tables with the configurations a and b."""
    (folder / "data").mkdir()
    table()(folder / "data")
    lines = "".join(f"- config_name: {name}\n  data_files: data.parquet\n" for name in "ab")
    (folder / "data" / "README.md").write_text(f"---\nconfigs:\n{lines}---\n")


PATHS = [f"{name}/{i}.png" for name in "ab" for i in range(4)]
CLEAN_CSV = "image,label,site,day\n" + "".join(f"{path},{path[0]},north,{i}\n" for i, path in enumerate(PATHS))
CSV: tuple[tuple[str, str, str], ...] = (  # mistake, flags, table
    ("a table that is no table", "", "x,y\na\n"),
    ("a table without rows", "", "image,label\n"),
    ("a table without a column of paths", "", CLEAN_CSV.replace("image", "picture of")),
    ("a path outside the table's folder", "", CLEAN_CSV.replace("a/0", "../0")),
    ("a row without a path", "", CLEAN_CSV.replace("a/0.png", "")),
    ("a path that occurs twice", "", CLEAN_CSV.replace("a/0", "a/1")),
    ("an image file that does not exist", "", CLEAN_CSV.replace("a/0", "a/9")),
    ("paths that start elsewhere", "--image_root {}", CLEAN_CSV),
    ("an `--image_root` that does not exist", "--image_root {}/nothing", CLEAN_CSV),
    ("a `--where` that is no condition", "--where site=north", CLEAN_CSV),
    ("a `--where` that runs code", "--where __import__('os').getcwd()", CLEAN_CSV),
    ("a `--where` on an unknown column", "--where sites==north", CLEAN_CSV),
    ("a `--where` that no row meets", "--where site==south", CLEAN_CSV),
    ("a `--where` that compares numbers with text", "--where day>monday", CLEAN_CSV),
    ("an unknown `--split_column`", "--split_column x", CLEAN_CSV),
    ("a `--split_column` without a training split", "--split_column site", CLEAN_CSV),
    ("a row without a group", "--group_column site", CLEAN_CSV.replace("north", "", 1)),
    ("a group that is a fraction", "--group_column day", CLEAN_CSV.replace(",0\n", ",0.5\n")),
    ("several label columns", "--label_columns label site", CLEAN_CSV),
    ("`--label_column` beside `--label_columns`", "--label_column label --label_columns label site", CLEAN_CSV),
    ("text for `--problem_type regression`", "--problem_type regression --label_column label", CLEAN_CSV),
    (
        "an empty cell among several labels",
        "--problem_type multi_label_classification --label_column site",
        CLEAN_CSV.replace("north", "", 1),
    ),
    (
        "balanced classes of numbers",
        "--problem_type regression --label_column day --class_balance loss",
        CLEAN_CSV.replace(",0\n", ",0.5\n"),
    ),
)
COLUMN_FLAGS = (
    ("image_root", "{}"), ("label_columns", "a b"), ("group_column", "x"), ("split_column", "x"), ("where", "x==1"),
)  # fmt: skip


def _value_cases() -> Iterator[ErrorCase]:
    """Yields one case for each setting with a range or a choice, and for one setting of each type."""
    known: dict[str, tuple[str, Setting]] = {}
    for strategy in ("full", *strategy_names()):
        for setting in list_settings(default_config(strategy)).values():
            known.setdefault(setting.name, (strategy, setting))
    for strategy, setting in known.values():
        command = f"train {strategy} --{setting.name}"
        if setting.allowed is not None:
            wrong = "-1" if setting.kind is int else "nan"
            yield ErrorCase(trigger=f"`--{setting.name}` out of range", command=f"{command} {wrong}")
        elif setting.choices:
            yield ErrorCase(trigger=f"`--{setting.name}` with an unknown word", command=f"{command} nonsense")


VALUES = tuple(_value_cases())

SETTINGS = (
    ErrorCase(trigger="text for a whole number", command="train full --seed one"),
    ErrorCase(trigger="a fraction for a whole number", command="train full --epochs 1.5"),
    ErrorCase(trigger="text for a number", command="train full --lr fast"),
    ErrorCase(trigger="an unknown flag", command="train full --learning_rate 1"),
    ErrorCase(trigger="a value for a switch", command="train full --freeze_batchnorm false"),
    ErrorCase(trigger="a value without a flag", command="train full path/to/images"),
    ErrorCase(trigger="an unknown strategy", command="train lroa"),
    ErrorCase(trigger="an unknown command", command="trian"),
    ErrorCase(trigger="an unknown flag of a command", command="predict runs/mine photos --topk 3"),
    ErrorCase(trigger="a push to no repository", command="train full --push_to_hub me"),
    ErrorCase(trigger="`--private` without a push", command="train full --private"),
    ErrorCase(
        trigger="`--wise_ft` with trained BatchNorm statistics", command="train full --wise_ft --no-freeze_batchnorm"
    ),
    ErrorCase(trigger="one split for two purposes", command="train full --train_split all --test_split all"),
    ErrorCase(trigger="no split to train on", command="train full --train_split none"),
    ErrorCase(trigger="both ways to choose parameters", command="train full --pattern x --trains norms"),
    ErrorCase(trigger="a broken regular expression", command="train full --pattern ("),
    ErrorCase(trigger="a rank for adapters without rank", command="train lora --adapter ia3 --rank 4"),
    ErrorCase(trigger="a wrong list of layers for adapters", command="train lora --adapter_layers first:1"),
    ErrorCase(trigger="pretraining from a checkpoint", command="train pretrain --checkpoint embedded"),
    ErrorCase(trigger="an unknown architecture", command="train pretrain --architecture resnet81"),
    ErrorCase(trigger="`--model_args` that is no JSON", command="train pretrain --model_args {"),
    ErrorCase(
        trigger="`--model_args` that loads a file", command='train pretrain --model_args {"checkpoint_path":"x"}'
    ),
    ErrorCase(trigger="a repeated block in `--downsample`", command="train greedy_stack --downsample 1,1,1"),
    ErrorCase(
        trigger="`--downsample` for an architecture", command="train greedy_stack --architecture resnet18 --width 8"
    ),
    ErrorCase(trigger="transformer blocks without a checkpoint", command="train greedy_stack --block transformer"),
    ErrorCase(trigger="more layers than the network has", command="train last_layers --k 1000 --output_dir {}/run"),
    ErrorCase(trigger="a layer that does not exist", command="train last_layers --from_layer x --output_dir {}/run"),
    ErrorCase(
        trigger="more images per class than there are", command="train full --images_per_class 9999 --output_dir {}/run"
    ),
    ErrorCase(trigger="timm's name of a checkpoint", command="train full --checkpoint resnet18 --output_dir {}/run"),
    ErrorCase(trigger="a checkpoint twice", command="rank embedded embedded"),
    ErrorCase(trigger="a negative sample", command="rank embedded --sample -1"),
    ErrorCase(trigger="no label to print", command="predict embedded x.png --top_k 0"),
    ErrorCase(trigger="an unknown cache", command="cache --clear nothing"),
)

YAML: tuple[tuple[str, str | bytes], ...] = (
    ("a list", "- lr\n- 1\n"),
    ("an unknown name", "bach_size: 8\n"),
    ("a wrong type", "seed: [1, 2]\n"),
    ("nested settings", "lr:\n  head: 1\n"),
    ("a name given twice", "lr: 1\nlr: 2\n"),
    ("a tab", "lr:\n\t1\n"),
    ("an alias", "lr: &x 1\nseed: *x\n"),
    ("a binary file", b"\xff\xfe\x00\x01"),
    ("a Python object", "lr: !!python/name:os.system\n"),
    ("a huge file", "#" * 10**6 + "\n"),
    ("an empty text", "output_dir: ''\n"),
)

CONFIGS = (
    ErrorCase(trigger="a missing file", command="train full --config {}/nothing.yaml"),
    *(ErrorCase(trigger=t, command="train full --config {}/config.yaml", build=yaml(text)) for t, text in YAML),
)


def listing(text: str) -> Build:
    """Returns a builder that writes the image folder `data` and the file list.csv."""

    def build(folder: Path) -> None:
        images(folder / "data", "a", "b")
        (folder / "list.csv").write_text(text)

    return build


EXCLUDE = "train full --dataset {}/data --exclude {}/list.csv"
RELABEL = "train full --dataset {}/data --relabel {}/list.csv"
PAIRS = "a,b,split_a,split_b,kind,score\n"
EDITS = (
    ErrorCase(trigger="a missing file", command=EXCLUDE, build=image_folder()),
    ErrorCase(trigger="an image that the data does not have", command=EXCLUDE, build=listing("a/9.png\n")),
    ErrorCase(
        trigger="every image of a class",
        command=EXCLUDE,
        build=listing("".join(f"a/{i}.png\n" for i in range(4))),
    ),
    ErrorCase(trigger="a class that the data does not have", command=RELABEL, build=listing("path,label\na/0.png,c\n")),
    ErrorCase(trigger="two labels for an image", command=RELABEL, build=listing("path,label\na/0.png,b\na/0.png,a\n")),
    ErrorCase(trigger="a line without a label", command=RELABEL, build=listing("path,label\na/0.png\n")),
    ErrorCase(trigger="no column with labels", command=RELABEL, build=listing("path\na/0.png\n")),
    ErrorCase(trigger="labels without a header", command=RELABEL, build=listing("a/0.png\n")),
    ErrorCase(trigger="labels from a list of copies", command=RELABEL, build=listing(PAIRS)),
    ErrorCase(
        trigger="an audit into the folder of another",
        command="audit --output_dir {}",
        build=lambda folder: (folder / "audit.json").write_text("{}"),
    ),
)

DATA = (
    ErrorCase(
        trigger="an output folder among the images",
        command="train full --dataset {}/data --output_dir {}/data/a",
        build=image_folder(),
    ),
    ErrorCase(
        trigger="an output folder in a folder of tables",
        command="train full --dataset {}/ --output_dir {}/run",
        build=table(),
    ),
    ErrorCase(trigger="a missing folder", command="train full --dataset {}/nothing"),
    ErrorCase(
        trigger="a misspelt folder",
        command="train full --dataset {}/my_fotos",
        build=lambda folder: images(folder / "my_photos", "a", "b"),
    ),
    ErrorCase(
        trigger="a misspelt folder without a slash, which may be a Hub id", command="train full --dataset my_fotos"
    ),
    ErrorCase(trigger="neither folder nor Hub id", command="train full --dataset http://x/y"),
    ErrorCase(trigger="a format of `datasets`", command="train full --dataset imagefolder"),
    ErrorCase(
        trigger="a file of another kind",
        command="train full --dataset {}/data.7z",
        build=lambda folder: (folder / "data.7z").write_bytes(b"7z"),
    ),
    ErrorCase(
        trigger="a damaged archive",
        command="train full --dataset {}/data.zip",
        build=lambda folder: (folder / "data.zip").write_bytes(b"PK"),
    ),
    ErrorCase(
        trigger="a path that leads out of an archive",
        command="train full --dataset {}/data.zip",
        build=zipped("../a/1.png"),
    ),
    ErrorCase(trigger="a truncated tar", command="train full --dataset {}/data.tar", build=truncated_tar),
    ErrorCase(trigger="an archive in a folder", command="train full --dataset {}", build=zipped("a/1.png")),
    ErrorCase(trigger="several configurations", command="train full --dataset {}/data", build=configurations),
    ErrorCase(trigger="an unknown configuration", command="train full --dataset {}/data:c", build=configurations),
    ErrorCase(trigger="an empty folder", command="train full --dataset {}"),
    ErrorCase(trigger="one class", command="train full --dataset {}/data", build=image_folder(classes=("a",))),
    ErrorCase(
        trigger="an empty class",
        command="train full --dataset {}/data",
        build=image_folder(lambda d: (d / "c").mkdir()),
    ),
    ErrorCase(
        trigger="images without labels",
        command="train full --dataset {}/data",
        build=lambda folder: images(folder, "data"),
    ),
    ErrorCase(
        trigger="one image per class", command="train full --dataset {}/data --images_per_class 1", build=image_folder()
    ),
    ErrorCase(
        trigger="names that are equal up to Unicode form",
        command="train full --dataset {}/data",
        build=image_folder(classes=("\u00e9", "e\u0301")),
    ),
    ErrorCase(
        trigger="a class of the test split only",
        command="train full --dataset {}",
        build=lambda folder: (images(folder / "train", "a", "b"), images(folder / "test", "a", "c")),
    ),
    ErrorCase(
        trigger="a link to itself",
        command="train full --dataset {}/data",
        build=image_folder(lambda d: (d / "x").symlink_to(d / "x")),
    ),
    ErrorCase(
        trigger="an empty image",
        command="train full --dataset {}/data --output_dir {}/run",
        build=image_folder(lambda d: (d / "a" / "x.png").write_bytes(b"")),
    ),
    ErrorCase(
        trigger="a truncated image",
        command="predict embedded {}/data",
        build=image_folder(lambda d: truncate(d / "a" / "1.png")),
    ),
    ErrorCase(
        trigger="a web page in place of an image",
        command="predict embedded {}/data",
        build=image_folder(lambda d: (d / "a" / "1.png").write_text("<html>")),
    ),
    ErrorCase(
        trigger="a FIFO in place of an image",
        command="predict embedded {}/data",
        build=image_folder(lambda d: os.mkfifo(d / "a" / "x.png")),
    ),
    ErrorCase(trigger="a missing image", command="predict embedded {}/nothing.png"),
    ErrorCase(
        trigger="a column that does not exist",
        command="train full --dataset {}/data.parquet --label_column x",
        build=table(),
    ),
    ErrorCase(
        trigger="several columns that may be the label",
        command="train full --dataset {}/data.parquet",
        build=table(target=[0, 1] * 4),
    ),
    ErrorCase(trigger="no label column", command="train full --dataset {}/data.parquet", build=table(label=None)),
    ErrorCase(
        trigger="fractions as classes",
        command="train full --dataset {}/data.parquet --problem_type single_label_classification",
        build=table(label=[0.5, 1.0] * 4),
    ),
    ErrorCase(
        trigger="missing labels", command="train full --dataset {}/data.parquet", build=table(label=[None, 1] * 4)
    ),
    ErrorCase(
        trigger="one negative label", command="train full --dataset {}/data.parquet", build=table(label=[-5, 1] * 4)
    ),
    ErrorCase(
        trigger="a label that every image has",
        command="train full --dataset {}/data.parquet",
        build=table(label=[[0]] * 8),
    ),
    ErrorCase(
        trigger="a path outside the data set",
        command="train full --dataset {}/data.parquet --output_dir {}/run",
        build=table(image=[{"bytes": None, "path": "/etc/passwd"}] * 8),
    ),
    ErrorCase(
        trigger="a damaged parquet file",
        command="train full --dataset {}/data.parquet",
        build=lambda folder: (folder / "data.parquet").write_bytes(b"PAR1"),
    ),
    ErrorCase(
        trigger="a parquet file without rows",
        command="train full --dataset {}/data.parquet",
        build=table(image=pa.array([], pa.binary()), label=pa.array([], pa.int64())),
    ),
    *(
        ErrorCase(trigger=t, command=f"train full --dataset {{}}/data/labels.csv {flags}", build=csv(text))
        for t, flags, text in CSV
    ),
    *(
        ErrorCase(
            trigger=f"`--{name}` for an image folder",
            command=f"train full --dataset {{}}/data --{name} {value}",
            build=image_folder(),
        )
        for name, value in COLUMN_FLAGS
    ),
    ErrorCase(
        trigger="`--streaming` for an image folder",
        command="train full --dataset {}/data --streaming",
        build=image_folder(),
    ),
    ErrorCase(
        trigger="`--streaming` with a column of splits",
        command="train full --dataset {}/data.parquet --streaming --split_column label",
        build=table(),
    ),
    ErrorCase(
        trigger="`--image_root` for a table of images",
        command="train full --dataset {}/data.parquet --image_root {}",
        build=table(),
    ),
    ErrorCase(
        trigger="an array that is no image",
        command="train full --dataset {}/data.parquet --output_dir {}/run",
        build=table(image=pa.array([[[1, 2], [3]]] * 8, pa.list_(pa.list_(pa.uint8())))),
    ),
    ErrorCase(
        trigger="a class that the model does not know",
        command="evaluate embedded --dataset {}/data",
        build=image_folder(),
    ),
    ErrorCase(
        trigger="a split that is not stored", command="evaluate embedded --dataset sklearn/digits --split validation"
    ),
)


def write_tiny_vit(folder: Path) -> None:
    """Writes a network with patches of 16 pixels for images of 32 pixels to `folder`/vit."""
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=2, num_classes=2)
    save_for_hf(vit, str(folder / "vit"), safe_serialization=True, data_config={"input_size": (3, 32, 32)})


def unfinished_run(folder: Path) -> None:
    """Writes what a run leaves that was interrupted."""
    write_config(folder / "checkpoints", RunConfig())


WEIGHTS, CONFIG, PREPROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
DAMAGES: tuple[tuple[str, str, Callable[[Path], object]], ...] = (
    ("pickled weights", WEIGHTS, lambda file: file.rename(file.with_name("pytorch_model.bin"))),
    ("truncated weights", WEIGHTS, truncate),
    ("empty weights", WEIGHTS, lambda file: file.write_bytes(b"")),
    ("a flipped bit in the header of the weights", WEIGHTS, flip),
    ("a folder in place of the weights", WEIGHTS, replace_by_folder),
    ("a truncated config.json", CONFIG, truncate),
    ("a list in config.json", CONFIG, lambda file: file.write_text("[]")),
    ("a config.json that names no model", CONFIG, lambda file: file.write_text("{}")),
    ("a wrong type in config.json", CONFIG, config_with(model_args=[1])),
    ("a config.json that loads another file", CONFIG, config_with(model_args={"checkpoint_path": "x.pth"})),
    ("10**12 classes in config.json", CONFIG, config_with(num_classes=10**12)),
    ("an unknown architecture in config.json", CONFIG, config_with(architecture="nothing")),
    ("weights of another architecture", CONFIG, config_with(architecture="resnet50")),
    ("a truncated preprocessor_config.json", PREPROCESSOR, lambda file: file.write_text("{")),
    ("a folder in place of preprocessor_config.json", PREPROCESSOR, replace_by_folder),
)

CHECKPOINTS = (
    ErrorCase(trigger="neither folder nor Hub id", command="inspect ./nowhere"),
    ErrorCase(trigger="a folder without checkpoint", command="inspect {}"),
    ErrorCase(trigger="a report of a folder without a run", command="report {}"),
    ErrorCase(trigger="a comparison with a map", command="report {}/a {}/b --map pca"),
    ErrorCase(trigger="a report in a folder that is missing", command="report {} --output {}/missing/page.html"),
    *(ErrorCase(trigger=t, command="inspect {}/model", build=damage(name, change)) for t, name, change in DAMAGES),
    ErrorCase(
        trigger="an adapter that is none", command="predict embedded {}/data --adapter {}/data", build=image_folder()
    ),
    ErrorCase(trigger="a coverage in percent", command="predict embedded {}/data --coverage 95", build=image_folder()),
    ErrorCase(
        trigger="sets of labels from a model without held-out results",
        command="predict embedded {}/data --coverage 0.95",
        build=image_folder(),
    ),
    ErrorCase(
        trigger="`--image_size_px` that the patches do not divide",
        command="inspect {}/vit --image_size_px 40",
        build=write_tiny_vit,
    ),
    ErrorCase(trigger="a run that is not finished", command="publish {}/run --repo_id me/model"),
    ErrorCase(trigger="the folder of an unfinished run", command="inspect {}", build=unfinished_run),
    ErrorCase(
        trigger="an evaluation on images without labels",
        command="evaluate embedded --dataset {}/data",
        build=lambda folder: images(folder / "data", "."),
    ),
    ErrorCase(
        trigger="a cut that the network lacks",
        command="embed embedded {}/data --at x --output {}/x.npy",
        build=image_folder(),
    ),
    ErrorCase(trigger="embeddings without a use", command="embed embedded {}/data", build=image_folder()),
    ErrorCase(
        trigger="`--explain_at` without `--explain`",
        command="predict embedded {}/data --explain_at stem",
        build=image_folder(),
    ),
    ErrorCase(
        trigger="two formats",
        command="predict embedded {}/data --json --format csv",
        build=image_folder(),
    ),
    ErrorCase(
        trigger="a cut without a map",
        command="predict embedded {}/data --explain {}/x --explain_at features",
        build=image_folder(),
    ),
    ErrorCase(trigger="a flag before the strategy", command="train --quiet full"),
    ErrorCase(
        trigger="classes for a run that is none", command="add-classes {}/run --dataset {}/data", build=image_folder()
    ),
)

SECTIONS = {
    "Settings": SETTINGS,
    "YAML files": CONFIGS,
    "Data sets and images": DATA,
    "Lists of images, and audits": EDITS,
    "Checkpoints, models and runs": CHECKPOINTS,
    "Values that are not allowed": VALUES,
}
ALL = tuple(case for cases in SECTIONS.values() for case in cases)


def format_row(case: ErrorCase, status: int, line: str) -> str:
    """Returns the row of docs/errors.md for a case."""
    shown = line if len(line) <= 600 else f"{line[:600]} ..."
    shown = shown.replace("|", "\\|").replace("`", "'")
    return f"| {case.trigger} | `{shown}` | {status} |"
