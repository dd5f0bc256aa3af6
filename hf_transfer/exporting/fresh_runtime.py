"""The script that `verify` runs: the real runtime, in a process of its own, computes an exported file's outputs.

python fresh_runtime.py FILE REFERENCE.npz NUM_THREADS   # prints one line of JSON

It needs NumPy and onnxruntime or OpenVINO, and nothing else. REFERENCE.npz has `inputs` (B, C, H, W), `logits` (B, K), `labels`
(K,) and, for a graph with preprocessing inside, the images `image_0`, `image_1`, ... (H, W, 3) uint8.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH = 8  # images of the measured rate
MEASURED_S = 1.0  # shortest time of each measurement

Run = Callable[[str, Any], list[Any]]
"""Takes the name of an input and its array, and returns the outputs."""


def open_onnx(file: str, num_threads: int) -> tuple[Run, dict[str, str], str]:
    """Returns the function that runs an ONNX file, the file's metadata, and the runtime's name and version."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    metadata = dict(session.get_modelmeta().custom_metadata_map)
    return lambda name, array: session.run(None, {name: array}), metadata, f"onnxruntime {onnxruntime.__version__}"


def open_openvino(file: str, num_threads: int) -> tuple[Run, dict[str, str], str]:
    """Returns the function that runs an OpenVINO file, the file's metadata, and the runtime's name and version."""
    import openvino

    core = openvino.Core()
    model = core.read_model(file)
    names = ("labels", "preprocessing")
    metadata = {name: str(model.get_rt_info(["model_info", name]).value) for name in names}
    settings = {"INFERENCE_NUM_THREADS": num_threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", settings)
    version = openvino.__version__.partition("-")[0]
    return lambda name, array: list(compiled({name: array}).values()), metadata, f"openvino {version}"


def measure(run: Run, name: str, array: Any) -> float:
    """Returns the median seconds of a call."""
    run(name, array)
    times: list[float] = []
    while len(times) < 5 or sum(times) < MEASURED_S:
        started = time.perf_counter()
        run(name, array)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def compare_network(run: Run, reference: Any) -> dict[str, Any]:
    """Returns the largest difference of the logits, relative to the largest logit or 1, and how many first places agree."""
    import numpy as np

    inputs, expected = reference["inputs"], reference["logits"]
    logits = np.concatenate(
        [run("pixel_values", inputs[:1])[0], run("pixel_values", inputs[1:])[0]]
    )  # two sizes of batch
    scale = max(1.0, float(np.abs(expected).max()))
    difference = float(np.abs(logits - expected).max()) / scale if logits.shape == expected.shape else 1e9
    batch = np.resize(inputs, (BATCH, *inputs.shape[1:])).astype(np.float32)
    return {
        "logits": difference if np.isfinite(difference) else 1e9,
        "agreement": float((logits.argmax(1) == expected.argmax(1)).mean()) if logits.shape == expected.shape else 0.0,
        "latency_ms": 1e3 * measure(run, "pixel_values", inputs[:1]),
        "images_per_second": BATCH / measure(run, "pixel_values", batch),
    }


def compare_images(run: Run, reference: Any) -> dict[str, Any]:
    """Returns the largest differences of the pixels (normalized units) and of the first output's rows on whole images."""
    import numpy as np

    images = [reference[f"image_{i}"] for i in range(len(reference["inputs"]))]
    outputs = [run("image", image) for image in images]
    pixels = np.abs(np.concatenate([values[1] for values in outputs]) - reference["inputs"])
    shown, expected = np.concatenate([values[0] for values in outputs]), reference["activated"]
    return {
        "pixels": float(pixels.max()),
        "logits": float(np.abs(shown - expected).max()) / max(1.0, float(np.abs(expected).max())),
        "agreement": float((shown.argmax(1) == expected.argmax(1)).mean()),
        "latency_ms": 1e3 * measure(run, "image", images[0]),
        "images_per_second": None,
    }


def main() -> None:
    """Compares the outputs of an exported file with the reference, and prints the differences as JSON."""
    for name in ("torch", "hf_transfer"):
        sys.modules[name] = None  # type: ignore[assignment]  # an exported file must need neither
    import numpy as np

    file, reference_file, num_threads = sys.argv[1:]
    with np.load(reference_file) as reference:
        opened = open_onnx if Path(file).suffix == ".onnx" else open_openvino
        run, metadata, runtime = opened(file, int(num_threads))
        compare = compare_images if "activated" in reference else compare_network
        result = compare(run, reference)
        result["labels_agree"] = json.loads(metadata["labels"]) == reference["labels"].tolist()
    print(json.dumps({**result, "runtime": runtime}), flush=True)  # noqa: T201 - the parent process reads it


if __name__ == "__main__":
    main()
