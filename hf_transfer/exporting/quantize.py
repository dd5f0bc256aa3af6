"""Exported networks with 8-bit or 16-bit numbers.

| int8 | by | weights | activations |
| --- | --- | --- | --- |
| convolutions | onnxruntime; OpenVINO reads its graph | a scale for each channel | fixed ranges from training images |
| attention, ONNX | onnxruntime | a scale for each channel | ranges of each batch, found as it runs |
| attention, OpenVINO | NNCF | a scale for each channel | ranges of groups of values, found as it runs |

Fixed ranges (arXiv 1712.05877) cost attention accuracy: a few channels are far larger than the others (arXiv 2211.10438).
Float16 rounds the weights, and ONNX keeps float32 inputs and outputs.
"""

import io
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_transfer.exporting.formats import INPUT
from hf_transfer.exporting.graph import read_openvino, save_openvino, write_openvino

ATTENTION = frozenset({"Softmax", "LayerNormalization"})  # operators of networks with attention
GROUP_SIZE = 64  # activations that share a range. OpenVINO's own 32 was slower (1.43 instead of 1.62 times float32).


def quantize(
    onnx_file: Path,
    file: Path,
    calibration: Iterator[NDArray[np.float32]],
    metadata: Mapping[str, str],
    *,
    quantize_bias: bool = True,
) -> None:
    """Writes an exported float32 network as the ONNX `file` with 8-bit weights and activations.

    `calibration`: inputs (1, C, H, W) that the network gets in use. A network with attention does not need them.
    `quantize_bias`: as onnxruntime needs them, biases of convolutions are integers of 32 bits with a scale.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="hf_transfer-") as folder:
        fused, quantized = Path(folder, "fused.onnx"), Path(folder, "quantized.onnx")
        # BatchNorm is folded into convolutions: the runtime computes it in float32 otherwise.
        quant_pre_process(str(onnx_file), str(fused), skip_symbolic_shape=True)
        if _has_attention(onnx_file):
            quantize_dynamic(str(fused), str(quantized), per_channel=True, weight_type=QuantType.QInt8)
        else:
            quantize_static(
                str(fused),
                str(quantized),
                _make_reader(calibration),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options={"QuantizeBias": quantize_bias},
            )
        model = onnx.load(quantized)
    for node in model.graph.node:
        del node.metadata_props[:]  # the tracer's notes: with small weights, a noticeable share of the file
    del model.metadata_props[:], model.graph.value_info[:]
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, file)


def quantize_openvino(
    onnx_file: Path, file: Path, calibration: Iterator[NDArray[np.float32]], metadata: Mapping[str, str]
) -> None:
    """Writes an exported float32 network as OpenVINO's `file` (.xml) with 8-bit weights and activations (see `quantize`)."""
    if not _has_attention(onnx_file):
        with tempfile.TemporaryDirectory(prefix="hf_transfer-") as folder:
            small = Path(folder, "model.onnx")
            # OpenVINO adds biases as floats. Each integer bias would be five more operators in the .xml.
            quantize(onnx_file, small, calibration, metadata, quantize_bias=False)
            write_openvino(small, file, metadata, is_fp16=True)
        return
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)  # nncf.set_log_level would change the handlers of others too
    with redirect_stdout(io.StringIO()):  # a progress bar, which would mix with --json
        model = nncf.compress_weights(read_openvino(onnx_file), mode=nncf.CompressWeightsMode.INT8_SYM)
    model.set_rt_info(str(GROUP_SIZE), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    save_openvino(model, file, metadata, is_fp16=True)


def write_half(onnx_file: Path, file: Path) -> None:
    """Writes an exported float32 network as `file` with float16 weights and float32 inputs and outputs."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(onnx_file), keep_io_types=True), file)


def _has_attention(onnx_file: Path) -> bool:
    import onnx

    return any(node.op_type in ATTENTION for node in onnx.load(onnx_file, load_external_data=False).graph.node)


def _make_reader(calibration: Iterator[NDArray[np.float32]]) -> Any:
    """Returns the reader of calibration images that onnxruntime expects."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            images = next(calibration, None)
            return None if images is None else {INPUT: images}

    return Reader()
