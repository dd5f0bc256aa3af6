"""Loads a saved model for an engine: its weights in torch, or an exported file in the file's own runtime."""

from pathlib import Path
from typing import Literal

from hf_transfer.config import EngineChoice, ExportFormat, ExportPrecision
from hf_transfer.exporting.formats import find_file, find_format
from hf_transfer.exporting.runtime import load_exported
from hf_transfer.inference.predict import load_saved
from hf_transfer.locations import resolve_model
from hf_transfer.network.adapters import is_adapter_folder
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.damage import WEIGHTS

InferenceEngine = Literal["auto", "measure", "eager", "folded", "compiled", "openvino", "onnx"]


def load_for_engine(
    model: str,
    engine: InferenceEngine = "auto",
    *,
    precision: ExportPrecision | None = None,
    trust_remote_code: bool = False,
) -> tuple[Backbone, EngineChoice]:
    """Returns the model in a folder or Hub repository, and the engine with which torch runs it.

    `onnx` runs the exported file of the folder, and so does `openvino` if there is one. With `auto`, a folder without weights
    runs its exported file. To torch, an exported file is a network with the engine `eager`. `precision`: that of the exported
    file; None: the most precise one. Raises ValueError if there is no such file, or its runtime is not installed.
    """
    model = resolve_model(model)
    folder = Path(model).expanduser()
    exported = _choose_format(folder, engine, precision)
    if exported is None:
        assert engine != "onnx"
        return load_saved(model, trust_remote_code=trust_remote_code), engine
    return load_exported(folder, exported, precision), "eager"


def _choose_format(folder: Path, engine: InferenceEngine, precision: ExportPrecision | None) -> ExportFormat | None:
    """Returns the format of the exported file to run, or None to run the weights."""
    found = find_format(folder) if folder.is_dir() else None
    if engine == "onnx" or (engine == "openvino" and (precision is not None or _has_file(folder, "openvino"))):
        if not folder.is_dir():
            raise ValueError(
                f"engine={engine!r}: {folder} is no folder here; fetch the repository with hf download first"
            )
        find_file(folder, engine, precision)
        return engine
    if precision is not None:
        raise ValueError(
            f"export_precision={precision!r}: engine {engine} runs the weights; choose --engine onnx or --engine openvino"
        )
    has_weights = any((folder / name).is_file() for name in WEIGHTS) or is_adapter_folder(str(folder))
    if found is None or has_weights:
        return None
    if engine not in ("auto", "measure"):
        raise ValueError(
            f"engine={engine!r}: {folder.name!r} has an exported file but no weights; choose --engine {found}"
        )
    return found


def _has_file(folder: Path, format: ExportFormat) -> bool:  # noqa: A002 - the name of the flag
    """Whether `folder` has an exported file of this format, in any precision."""
    try:
        find_file(folder, format, None)
    except ValueError:
        return False
    return True
