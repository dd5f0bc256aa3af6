"""Exported networks with 8-bit or 16-bit numbers.

| int8 | by | activations |
| --- | --- | --- |
| convolutions | NNCF | fixed ranges from training images; biases make up for the rounding (arXiv 1906.04721, 4.2) |
| attention, ONNX | onnxruntime, dynamic | ranges of each batch, found as it runs |
| attention, OpenVINO | NNCF | fixed ranges, after activations were smoothed (arXiv 2211.10438) |

Float16 rounds the weights, and ONNX keeps float32 inputs and outputs.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_transfer.exporting.formats import INPUT

ATTENTION = frozenset({"Softmax", "LayerNormalization"})  # operators of networks that NNCF quantizes as transformers


def quantize(
    onnx_file: Path, file: Path, calibration: Iterator[NDArray[np.float32]], metadata: Mapping[str, str]
) -> None:
    """Writes an exported float32 network as `file` (.onnx or .xml) with 8-bit weights and activations.

    `calibration`: inputs (1, C, H, W) that the network gets in use.
    """
    import nncf
    import onnx
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters

    nncf.set_log_level(logging.ERROR)
    inputs = [{INPUT: batch} for batch in calibration]
    operators = {node.op_type for node in onnx.load(onnx_file, load_external_data=False).graph.node}
    options: dict[str, Any] = {"subset_size": len(inputs), "preset": nncf.QuantizationPreset.MIXED}
    if operators & ATTENTION:
        options["model_type"] = nncf.ModelType.TRANSFORMER
    if file.suffix == ".xml":
        import openvino

        model = nncf.quantize(openvino.Core().read_model(onnx_file), nncf.Dataset(inputs), **options)
        for name, text in metadata.items():
            model.set_rt_info(text, ["model_info", name])
        openvino.save_model(model, file, compress_to_fp16=True)
        return
    if operators & ATTENTION:
        _save(_quantize_dynamically(onnx_file), file, metadata)
        return
    # One scale per tensor: onnxruntime computes in float32 where activations have a scale per channel, as after ReLU6.
    per_tensor = QuantizationParameters(per_channel=False)
    options["advanced_parameters"] = AdvancedQuantizationParameters(activations_quantization_params=per_tensor)
    with tempfile.TemporaryDirectory(prefix="hf_transfer-") as folder:
        fused = _fuse(onnx_file, Path(folder, "fused.onnx"))
        model = nncf.quantize(fused, nncf.Dataset(inputs), **options)
    _save(model, file, metadata)


def write_half(onnx_file: Path, file: Path) -> None:
    """Writes an exported float32 network as `file` with float16 weights and float32 inputs and outputs."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(onnx_file), keep_io_types=True), file)


def _quantize_dynamically(onnx_file: Path) -> Any:
    """Returns the network with 8-bit weights per channel, whose activations are quantized by the range of each batch."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(prefix="hf_transfer-") as folder:
        file = Path(folder, "dynamic.onnx")
        quantize_dynamic(str(onnx_file), str(file), per_channel=True, weight_type=QuantType.QInt8)
        return onnx.load(file)


def _save(model: Any, file: Path, metadata: Mapping[str, str]) -> None:
    import onnx

    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, file)


def _fuse(onnx_file: Path, file: Path) -> Any:
    """Returns the network with BatchNorm folded into convolutions, without which the runtime runs them in float32."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(onnx_file), str(file), skip_symbolic_shape=True)
    return onnx.load(file)
