"""The formats and precisions of an export, the names of the files, and the packages that write and run them."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hf_transfer.config import ExportFormat, ExportPrecision

INPUT, OUTPUT = "pixel_values", "logits"
IMAGE = "image"  # input of a graph that contains the preprocessing
SUFFIXES: Mapping[ExportPrecision, str] = {
    "fp32": "",
    "fp16": "_fp16",
    "int8": "_int8",
}  # as transformers.js names them
FILES: Mapping[ExportFormat, str] = {"onnx": "onnx/model{}.onnx", "openvino": "openvino/model{}.xml"}
WITH_PREPROCESSING = "onnx/model_with_preprocessing.onnx"
RUNTIMES: Mapping[ExportFormat, str] = {"onnx": "onnxruntime", "openvino": "openvino"}
# What an export imports, and the extra in pyproject.toml that installs it. Every graph is written as ONNX first.
_NEEDED: Mapping[str, str] = {
    "onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "openvino": "openvino", "nncf": "int8"
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What an export writes."""

    format: ExportFormat = "onnx"
    precision: ExportPrecision = "fp32"
    with_preprocessing: bool = False  # also a graph that takes images of any size

    def __post_init__(self) -> None:
        if self.with_preprocessing and self.format != "onnx":
            raise ValueError(
                f"with_preprocessing, format={self.format!r}: only ONNX contains the preprocessing; choose --format onnx"
            )


def name_file(format: ExportFormat, precision: ExportPrecision) -> str:  # noqa: A002 - the name of the flag
    """Returns the path of an exported file below the folder of the export.

    >>> name_file("onnx", "int8")
    'onnx/model_int8.onnx'
    """
    return FILES[format].format(SUFFIXES[precision])


def find_file(folder: Path, format: ExportFormat, precision: ExportPrecision | None) -> Path:  # noqa: A002
    """Returns the exported file in `folder`: of this precision or, for None, the most precise one.

    Raises ValueError if there is no such file.
    """
    wanted = list(SUFFIXES) if precision is None else [precision]
    files = [folder / name_file(format, each) for each in wanted]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        kind = "" if precision is None else f" --export_precision {precision}"
        raise ValueError(
            f"engine={format!r}: {folder.name!r} has no {name_file(format, wanted[0])}; write it with hf-transfer export "
            f"FOLDER --format {format}{kind}"
        )
    return found


def find_format(folder: Path) -> ExportFormat | None:
    """Returns the format of the exported files in `folder`, ONNX if there are both; None if there is no exported file."""
    for each, name in FILES.items():
        if any((folder / name.format(suffix)).is_file() for suffix in SUFFIXES.values()):
            return each
    return None


def check_installed(options: ExportOptions) -> None:
    """Raises ValueError, with the command that installs them, if packages are missing that this export needs."""
    packages = ["onnx", "onnxscript"]
    packages += ["openvino"] if options.format == "openvino" else []
    packages += ["onnxruntime"] if options.format == "onnx" or options.precision == "int8" else []  # its quantizer
    packages += ["nncf"] if (options.format, options.precision) == ("openvino", "int8") else []
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(sorted({_NEEDED[name] for name in missing}))
        raise ValueError(
            f"format={options.format!r}: {', '.join(missing)} not installed; pip install 'hf-transfer-learning[{extras}]'"
        )


def check_runtime(format: ExportFormat) -> None:  # noqa: A002
    """Raises ValueError, with the command that installs it, if the runtime of `format` is missing."""
    if importlib.util.find_spec(RUNTIMES[format]) is None:
        raise ValueError(
            f"engine={format!r}: {RUNTIMES[format]} is not installed; pip install 'hf-transfer-learning[{format}]'"
        )
