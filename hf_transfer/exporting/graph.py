"""Writes a network as an ONNX graph, and converts an ONNX graph to OpenVINO.

`torch.onnx`'s exporter traces the network with torch.export, so that the number of images stays free. OpenVINO converts the
ONNX file, so both formats compute the same graph.
"""

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_transfer.exporting.formats import INPUT, OUTPUT
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.forward import compute_logits, eval_mode
from hf_transfer.targets.target import Target

OPSET = 18
EXTERNAL_BYTES = 1_500_000_000  # weights beyond go to a file of their own, since a protobuf message ends at 2 GB
BATCH = 2  # torch.export takes a batch of one for a constant
_COLORS = re.compile(r"\x1b\[[0-9;]*m")
CHATTY = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch.fx", "torch.fx.experimental.symbolic_shapes")


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return compute_logits(self.model, pixel_values)


class _Activation(nn.Module):
    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        # An output that is the input would have no node, and ONNX does not allow that.
        return self.target.activate(logits) * 1.0


def write_onnx(backbone: Backbone, file: Path) -> None:
    """Writes the network as `file`: `pixel_values` (N, C, H, W) -> `logits` (N, K), both float32, for any N.

    The metadata have the label names, the target and the preprocessing as JSON. Raises ValueError if torch.export cannot trace
    the network.
    """
    model = backbone.model.cpu()
    images = torch.zeros(BATCH, *backbone.preprocessing.image_shape)
    with eval_mode(model):
        program = _trace(_Logits(model), images, INPUT, OUTPUT)
    nbytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    program.model.metadata_props.update(describe(backbone))
    program.save(str(file), external_data=nbytes > EXTERNAL_BYTES)


def build_activation(target: Target) -> Any:
    """Returns the ONNX model from `logits` (N, K) to the probabilities or numbers (N, K) that users read."""
    return _trace(_Activation(target), torch.zeros(BATCH, target.num_outputs), OUTPUT, target.outputs_name).model_proto


def describe(backbone: Backbone) -> dict[str, str]:
    """Returns the metadata of an exported file: JSON texts by name. They contain no local path."""
    preprocessing = backbone.preprocessing
    values = {
        "labels": list(backbone.label_names),
        "target": backbone.target.to_dict(),
        "preprocessing": {**preprocessing.spec, "steps": preprocessing.describe()},
    }
    texts = {name: json.dumps(value, ensure_ascii=False, default=str) for name, value in values.items()}
    return {**texts, "producer": "hf_transfer", "problem_type": backbone.target.problem_type}


def write_openvino(onnx_file: Path, file: Path, metadata: Mapping[str, str], *, is_fp16: bool = False) -> None:
    """Writes an ONNX file as OpenVINO's `file` (.xml) and its weights (.bin). With `is_fp16`, weights have 16 bits."""
    save_openvino(read_openvino(onnx_file), file, metadata, is_fp16=is_fp16)


def read_openvino(onnx_file: Path) -> Any:
    """Returns an ONNX file as an OpenVINO model, in which what depends on constants alone is computed.

    As the reader gives it, the model reshapes every bias by seven more operators: 2,676 in place of 1,009 for an int8
    MobileNetV2, whose .xml had a third of the bytes.
    """
    import openvino

    return openvino.convert_model(onnx_file)


def save_openvino(model: Any, file: Path, metadata: Mapping[str, str], *, is_fp16: bool) -> None:
    """Writes an OpenVINO model with metadata as `file` (.xml) and its weights (.bin). The .xml is not indented."""
    import openvino

    for name, text in metadata.items():
        model.set_rt_info(text, ["model_info", name])
    openvino.save_model(model, file, compress_to_fp16=is_fp16)
    file.write_text(re.sub(r">\s+<", "><", file.read_text(encoding="utf-8")), encoding="utf-8")


def _trace(module: nn.Module, samples: torch.Tensor, input_name: str, output_name: str) -> Any:
    """Returns the ONNX program of `module` for batches of any size."""
    batch = torch.export.Dim("batch")
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                module.eval(),
                (samples,),
                dynamo=True,
                input_names=[input_name],
                output_names=[output_name],
                dynamic_shapes=({0: batch},),
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        # The cause says what failed; the error around it has links and colors of a terminal.
        reason = " ".join(_COLORS.sub("", str(error.__cause__ or error)).split())[:200]
        raise ValueError(
            f"torch.onnx cannot export this network ({reason}); use the saved model with transformers or timm"
        ) from error
    assert program is not None
    _forget_sources(program.model)
    return program


def _forget_sources(model: Any) -> None:
    """Removes the exporter's notes from an ONNX model: which contain paths of this machine."""
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        for node in graph.all_nodes():  # also in subgraphs
            node.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides warnings and log lines of the exporter, which its users cannot act on."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
