"""Exports a network to ONNX or OpenVINO, and keeps the files only if their own runtime computes what the network computes.

export(backbone, folder, ExportOptions(format="onnx"), reference=read_reference(run / "reference.safetensors"))

folder/
  onnx/model.onnx                      pixel_values (N, C, H, W) float32 -> logits (N, K)
  onnx/model_fp16.onnx, model_int8.onnx
  onnx/model_with_preprocessing.onnx   image (H, W, 3) uint8 RGB of any size -> probabilities (1, K), pixel_values
  openvino/model.xml, model.bin        and model_fp16, model_int8
  config.json, preprocessor_config.json, export.json
  confidence.safetensors               if the model has a record of its confidence
"""

import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hf_transfer.capability import count_cores
from hf_transfer.confidence.record import CONFIDENCE
from hf_transfer.exporting.formats import WITH_PREPROCESSING, ExportOptions, check_installed, name_file
from hf_transfer.exporting.graph import describe, write_onnx, write_openvino
from hf_transfer.exporting.images import ExportImages
from hf_transfer.exporting.layout import write_layout
from hf_transfer.exporting.quantize import quantize, quantize_openvino, write_half
from hf_transfer.exporting.records import ExportRecord, add_records
from hf_transfer.exporting.verify import Reference, make_reference, verify_export
from hf_transfer.exporting.whole_graph import write_whole_graph
from hf_transfer.network.backbone import Backbone

log = logging.getLogger(__name__)

STAGING = ".exporting"


def export(
    backbone: Backbone,
    folder: Path,
    options: ExportOptions,
    *,
    reference: Reference | None = None,
    images: ExportImages | None = None,
) -> tuple[ExportRecord, ...]:
    """Writes the files that `options` name to `folder`, and returns a record of each.

    `reference`: what the trained network computed for a few images; None: noise images, and the network as it is. `images`:
    images for calibration and scoring, which int8 needs. Every file is first run by its own runtime in a fresh process. Raises
    ExportError if its outputs differ, and ValueError if packages are missing or the network cannot be exported; older files in
    `folder` then stay.
    """
    check_installed(options)
    if options.precision == "int8" and images is None:
        raise ValueError("export_precision='int8': calibration needs training images; give them with --dataset")
    reference = reference or make_reference(backbone)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=STAGING, dir=folder) as name:
        staging = Path(name)
        main = name_file(options.format, options.precision)
        _write(backbone, staging, options, images)
        files = [main, *([WITH_PREPROCESSING] if options.with_preprocessing else [])]
        records = [_verify(backbone, staging, file, options, reference) for file in files]
        if images is not None and options.precision != "fp32":
            accuracy = images.compare(backbone, staging / main, options.format)
            log.info("%s: %s", main, accuracy.format())
            records[0] = replace(records[0], accuracy=accuracy)
        _keep(staging, folder)
    write_layout(backbone, folder)
    _write_confidence(backbone, folder)
    add_records(folder, records)
    return tuple(records)


def _write(backbone: Backbone, staging: Path, options: ExportOptions, images: ExportImages | None) -> None:
    """Writes the files of `options` to `staging`."""
    file = staging / name_file(options.format, options.precision)
    file.parent.mkdir()
    with tempfile.TemporaryDirectory(prefix="hf_transfer-") as scratch:
        is_plain = (options.format, options.precision) == ("onnx", "fp32")
        plain = file if is_plain else Path(scratch, "model.onnx")
        write_onnx(backbone, plain)
        if options.with_preprocessing:
            write_whole_graph(backbone, plain, staging / WITH_PREPROCESSING)
        if options.precision == "int8":
            assert images is not None
            write = quantize if options.format == "onnx" else quantize_openvino
            write(plain, file, images.list_calibration(backbone), describe(backbone))
        elif options.format == "openvino":
            write_openvino(plain, file, describe(backbone), is_fp16=options.precision == "fp16")
        elif options.precision == "fp16":
            write_half(plain, file)


def _verify(backbone: Backbone, staging: Path, file: str, options: ExportOptions, reference: Reference) -> ExportRecord:
    num_threads = count_cores()
    precision = "fp32" if file == WITH_PREPROCESSING else options.precision
    result = verify_export(staging / file, backbone, reference, precision, num_threads)
    log.info(
        "%s: outputs differ by %.1g (relative) in a fresh process with %s", file, result["logits"], result["runtime"]
    )
    return ExportRecord(
        file=file,
        format=options.format,
        precision=precision,
        size_bytes=sum(path.stat().st_size for path in list_parts(staging / file)),
        runtime=result["runtime"],
        num_images=len(reference.logits),
        logits=result["logits"],
        agreement=result["agreement"],
        latency_ms=result["latency_ms"],
        images_per_second=result["images_per_second"],
        num_threads=num_threads,
        pixels=result.get("pixels"),
    )


def _write_confidence(backbone: Backbone, folder: Path) -> None:
    """Writes the record of confidence, or removes the record of another model that was exported to `folder` before."""
    if backbone.confidence is not None:
        backbone.confidence.save(folder / CONFIDENCE)
    elif folder.resolve() != backbone.source.folder.resolve():
        (folder / CONFIDENCE).unlink(missing_ok=True)


def list_parts(file: Path) -> Sequence[Path]:
    """Returns the exported file and the files that belong to it: OpenVINO's weights, or ONNX weights beyond 2 GB."""
    return [file, *(path for path in (file.with_suffix(".bin"), file.with_name(f"{file.name}.data")) if path.is_file())]


def _keep(staging: Path, folder: Path) -> None:
    """Moves the files from `staging` to the same places in `folder`."""
    for path in sorted(staging.rglob("*")):
        if path.is_file():
            target = folder / path.relative_to(staging)
            target.parent.mkdir(exist_ok=True)
            shutil.move(path, target)
