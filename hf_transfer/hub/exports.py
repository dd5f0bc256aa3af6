"""Exports the model of a run, or of a model folder, and shows the exported files in the model card."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_transfer.config import DataConfig
from hf_transfer.data.dataset import Data, load_run_data, load_splits
from hf_transfer.errors import count_noun
from hf_transfer.exporting.export import export
from hf_transfer.exporting.formats import ExportOptions, check_installed
from hf_transfer.exporting.images import ExportImages
from hf_transfer.exporting.records import ExportRecord, read_records
from hf_transfer.exporting.verify import Reference, read_reference, verify_export
from hf_transfer.flags import read_saved_config
from hf_transfer.hub.verify import REFERENCE, has_own_code
from hf_transfer.inference.predict import load_saved
from hf_transfer.locations import RESULTS
from hf_transfer.network.adapters import is_adapter_folder
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.damage import find_weights, read_json

log = logging.getLogger(__name__)

CARD = "README.md"
_BLOCK = re.compile(r"^<!-- exported -->$.*?^<!-- /exported -->$\n*", re.DOTALL | re.MULTILINE)
_BEFORE = "## Limits"  # the section of the card before which the exported files are shown


def export_saved(
    run_or_model: str | Path,
    options: ExportOptions | None = None,
    *,
    output_dir: str | Path | None = None,
    data: DataConfig | None = None,
    images: ExportImages | None = None,
    trust_remote_code: bool = False,
) -> tuple[ExportRecord, ...]:
    """Exports the model of a run folder or a model folder, and returns a record of each file.

    `output_dir`: where to write; None: the model folder. `data`: labeled images for lower precisions, or `images`, if they
    are loaded already; None: those of the run. Raises ValueError if there is no model, packages are missing or the network
    cannot be exported, and ExportError if an exported file computes other outputs than the trained network.

        export_saved("runs/x", ExportOptions(format="onnx", precision="int8"))
    """
    options = options or ExportOptions()
    check_installed(options)
    model, run = find_model(Path(run_or_model))
    if output_dir is None and is_adapter_folder(str(model)):
        raise ValueError(
            f"{run_or_model} is an adapter, which is exported merged: name a folder for the merged model with --output_dir"
        )
    folder = model if output_dir is None else Path(output_dir)
    has_weights = bool(find_weights(folder)) or is_adapter_folder(str(folder))
    if folder.resolve() != model.resolve() and has_weights:
        raise ValueError(f"output_dir={folder} contains the weights of another model: choose another folder")
    backbone = load_saved(str(model), trust_remote_code=trust_remote_code)
    if options.precision == "fp32":
        images = None
    elif images is None:
        images = _find_images(backbone, run, data, options)
    records = export(backbone, folder, options, reference=_find_reference(model), images=images)
    if (folder / CARD).is_file():
        show_exports(folder)
    return records


def find_model(folder: Path) -> tuple[Path, Path | None]:
    """Returns the model folder, and the run's folder if `folder` is a run or the model of a run.

    Raises ValueError if `folder` contains neither a run nor a model.
    """
    if (folder / RESULTS).is_file() and (folder / "model").is_dir():
        return folder / "model", folder
    if not (folder / "config.json").is_file() and not is_adapter_folder(str(folder)):
        raise ValueError(
            f"{folder}: neither a run (results.json, model/) nor a model (config.json); give one of these folders"
        )
    run = folder.resolve().parent
    return folder, run if (run / RESULTS).is_file() else None


def verify_exports(model: Path, reference: Path) -> None:
    """Runs all exported files in `model` again, in fresh processes, on the images of a run's `reference` file.

    Raises ExportError if one of them differs from the trained network.
    """
    records = read_records(model)
    if not records:
        return
    backbone, expected = load_saved(str(model), trust_remote_code=has_own_code(model)), read_reference(reference)
    for record in records:
        verify_export(model / record.file, backbone, expected, record.precision, record.num_threads)


def show_exports(folder: Path) -> None:
    """Writes the table of exported files to the card in `folder`, in place of an older table."""
    card = folder / CARD
    text = _BLOCK.sub("", card.read_text(encoding="utf-8"))
    block = format_exports(read_records(folder))
    place = text.find(f"\n{_BEFORE}\n")
    text = f"{text.rstrip()}\n\n{block}\n" if place < 0 else f"{text[: place + 1]}{block}\n\n{text[place + 1 :]}"
    card.write_text(text, encoding="utf-8")


def format_exports(records: tuple[ExportRecord, ...]) -> str:
    """Returns the exported files as a section of a card."""
    has_scores = any(record.accuracy is not None for record in records)
    lines = [
        "<!-- exported -->",
        "## Exported files",
        "",
        "Each file was run by its own runtime in a fresh process on real images, and compared with the trained network.",
        "",
        f"| file | MB | runtime | outputs differ by | one image | images/s |{' trained and exported |' if has_scores else ''}",
        f"| --- | --- | --- | --- | --- | --- |{' --- |' if has_scores else ''}",
    ]
    for record in records:
        rate = "" if record.images_per_second is None else f"{record.images_per_second:,.0f}"
        scored = "" if record.accuracy is None else record.accuracy.format()
        lines.append(
            f"| `{record.file}` | {record.size_bytes / 1e6:.1f} | {record.runtime} | {record.logits:.1g} | "
            f"{record.latency_ms:.1f} ms | {rate} |{f' {scored} |' if has_scores else ''}"
        )
    threads = max((record.num_threads for record in records), default=0)
    lines += [
        "",
        f"Times are of the machine that exported, with up to {count_noun(threads, 'thread')}; batches have 8 images.",
    ]
    return "\n".join([*lines, "<!-- /exported -->"])


def format_record(record: ExportRecord, folder: Path) -> str:
    """Returns what is known about an exported file in the model folder `folder` as one line."""
    scored = "" if record.accuracy is None else f", {record.accuracy.format()}"
    return (
        f"{folder / record.file}: {record.size_bytes / 1e6:.1f} MB, differs from the trained network by {record.logits:.1g} in "
        f"{record.runtime}, {record.latency_ms:.1f} ms an image{scored}"
    )


def _find_reference(model: Path) -> Reference | None:
    """Returns what the trained network computed for a few images, if `model` is the model of a run."""
    file = model.resolve().parent / REFERENCE
    return read_reference(file) if file.is_file() else None


def choose_images(data: Data, results: Mapping[str, Any]) -> ExportImages:
    """Returns the images of a run, whose results.json is `results`, for calibration and scoring."""
    is_trained_on = data.test is None and "estimated_by" in results["metrics"]["validation"]
    return ExportImages(
        train=data.train,
        scored=data.test or data.validation,
        may_be_trained_on=is_trained_on,
        seed=results["config"]["seed"],
    )


def _find_images(
    backbone: Backbone, run: Path | None, data: DataConfig | None, options: ExportOptions
) -> ExportImages | None:
    """Returns the images for calibration and scoring: of `data`, or else of the run.

    Raises ValueError if int8 needs images and there are none.
    """
    if data is None and run is not None:
        try:
            return choose_images(load_run_data(read_saved_config(run)), read_json(run / RESULTS))
        except (ValueError, OSError) as error:
            if options.precision == "int8":
                raise
            log.warning("%s: no accuracy is given, because the images of the run cannot be loaded: %s", run, error)
            return None
    if data is None:
        if options.precision == "int8":
            raise ValueError(
                "export_precision='int8': calibration needs training images, and this folder is not of a run; give --dataset"
            )
        return None
    roles = load_splits(data, backbone.target)
    names = ("test", "validation", "train")
    scored = next(split for name in names if (split := roles.get(name)) is not None)  # type: ignore[call-overload]
    may_be_trained_on = scored.name != "test"  # what the network trained on is not known
    return ExportImages(
        train=roles.get("train", scored), scored=scored, may_be_trained_on=may_be_trained_on, seed=data.seed
    )
