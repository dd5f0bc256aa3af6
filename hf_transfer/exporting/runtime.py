"""Runs an exported file in place of the saved network, for predictions and metrics, without loading torch weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_transfer.capability import count_cores
from hf_transfer.confidence.record import read_confidence
from hf_transfer.config import ExportFormat, ExportPrecision
from hf_transfer.exporting.formats import INPUT, check_runtime, find_file
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.damage import read_json
from hf_transfer.network.preprocessing import load_preprocessing
from hf_transfer.network.source import Source
from hf_transfer.prefix.openvino_core import openvino_core
from hf_transfer.targets.target import read_target


class ExportedNetwork(nn.Module):
    """An exported file as a network without parameters, which is always in eval mode.

    Copies share the compiled file. Each thread of a pass has a copy and runs its own batches, each on one core.
    """

    def __init__(self, file: Path, format: ExportFormat, *, compiled: Any = None) -> None:  # noqa: A002
        super().__init__()
        check_runtime(format)
        self.file, self.format = file, format
        self.compiled = compiled or (_open_onnx(file) if format == "onnx" else _open_openvino(file))
        self.request = None if format == "onnx" else self.compiled.create_infer_request()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExportedNetwork":
        """Returns a copy for another thread."""
        return ExportedNetwork(self.file, self.format, compiled=self.compiled)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns the logits (B, K) float32 of normalized images (B, C, H, W), on the device of the images."""
        images = pixel_values.detach().to("cpu", torch.float32).contiguous().numpy()
        if self.request is None:
            (logits,) = self.compiled.run(None, {INPUT: images})
        else:
            self.request.infer({0: images})
            logits = np.array(self.request.get_output_tensor(0).data)
        return torch.from_numpy(logits).to(pixel_values.device)


def load_exported(folder: Path, format: ExportFormat, precision: ExportPrecision | None = None) -> Backbone:  # noqa: A002
    """Returns the exported model in `folder`, with the labels and the preprocessing of config.json beside it.

    The record of confidence comes without the distance to the training images, because the file computes no features.
    `precision`: None for the most precise file. Raises ValueError if there is no such file or its runtime is not installed.
    """
    check_runtime(format)
    file = find_file(folder, format, precision)
    config, confidence = read_json(folder / "config.json"), read_confidence(folder)
    names = config.get("label_names") or [config["id2label"][str(i)] for i in range(len(config["id2label"]))]
    return Backbone(
        model=ExportedNetwork(file, format),
        library="timm" if "architecture" in config else "transformers",
        preprocessing=load_preprocessing(folder),
        target=read_target(config, names),
        source=Source(folder=folder, id=None, revision=None, license=None),
        new_head=False,
        confidence=None if confidence is None else replace(confidence, distance=None, inputs=()),
    )


def _open_onnx(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _open_openvino(file: Path) -> Any:
    num_threads = count_cores()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",  # some CPUs would choose bfloat16
        "INFERENCE_NUM_THREADS": num_threads,
        "NUM_STREAMS": num_threads,
        "ENABLE_CPU_PINNING": False,
    }
    return openvino_core().compile_model(str(file), "CPU", settings)
