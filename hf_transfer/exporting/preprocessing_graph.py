"""The published preprocessing as an ONNX graph: an RGB image of any size in, the network's normalized input out.

Pillow resizes in two passes and rounds to 8 bits after each. Each pass is a product with a matrix of filter weights
(`_add_filter`), which the graph computes from the size of the image in float64, as Pillow does (Resample.c). ONNX's own Resize
does not round between the passes, where bicubic values beyond 0..255 are clipped: single pixels would differ by many levels.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_transfer.exporting.geometry import Filter, Geometry, find_geometry
from hf_transfer.network.preprocessing import Preprocessing

if TYPE_CHECKING:
    import onnx

OPSET = 18
IR_VERSION = 10
SUPPORTS: dict[Filter, float] = {"box": 0.5, "bilinear": 1.0, "hamming": 1.0, "bicubic": 2.0, "lanczos": 3.0}
CUBIC_A = -0.5  # of Pillow; OpenCV and torch without antialiasing have -0.75
LUMINANCE = (19595, 38470, 7471)  # of Pillow's convert("L"), in units of 1 / 65536


def build_preprocessing(preprocessing: Preprocessing) -> "onnx.ModelProto":
    """Returns the graph from `image` (H, W, 3) uint8 RGB to `pixel_values` (1, C, h, w) float32.

    Raises ValueError if the preprocessing resizes in another way than by a known rule (see `geometry`).
    """
    geometry = find_geometry(preprocessing, lambda rule, image: run_pixels(rule, preprocessing.channels, image))
    graph = _GraphBuilder()
    pixels = _add_resize(graph, geometry, preprocessing.channels)
    normalized = _add_colors(graph, preprocessing, pixels)
    return graph.finish(normalized, "pixel_values", [1, *preprocessing.image_shape], "float32")


def run_pixels(geometry: Geometry, channels: int, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns the pixels (h, w, C) that a graph by the rule computes for one image (H, W, 3), with onnxruntime."""
    from onnxruntime import InferenceSession

    graph = _GraphBuilder()
    pixels = _add_resize(graph, geometry, channels)
    model = graph.finish(pixels, "pixels", [geometry.height_px, geometry.width_px, channels], "float32")
    (result,) = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"image": image}
    )
    return np.asarray(result).astype(np.uint8)


def _add_resize(graph: "_GraphBuilder", geometry: Geometry, channels: int) -> str:
    """Adds the resize and the crop. Returns the name of the pixels (h, w, C): whole numbers 0..255 as float32."""
    shape = graph.add("Shape", "image")
    height, width = (graph.add("Gather", shape, graph.constant(axis), axis=0) for axis in (0, 1))
    rows, columns = _add_resized_sizes(graph, geometry, height, width)
    first_row = _add_crop_start(graph, rows, geometry.height_px, rounds=geometry.rounds)
    first_column = _add_crop_start(graph, columns, geometry.width_px, rounds=geometry.rounds)
    across = _add_filter(graph, geometry.filter, width, columns, first_column, geometry.width_px)  # (w, W)
    down = _add_filter(graph, geometry.filter, height, rows, first_row, geometry.height_px)  # (h, H)
    source = _add_luminance(graph) if channels == 1 else "image"

    def resize_columns_first() -> str:
        narrow = _add_pass(graph, across, _swap(graph, source), channels)
        return _add_pass(graph, down, _swap(graph, narrow), channels)

    def resize_rows_first() -> str:
        low = _add_pass(graph, down, source, channels)
        return _swap(graph, _add_pass(graph, across, _swap(graph, low), channels))

    if not geometry.tall_first:
        return resize_columns_first()
    rows_less, columns_less = graph.add("Sub", height, rows), graph.add("Sub", width, columns)
    is_more = graph.add("Greater", rows_less, graph.add("Mul", columns_less, graph.constant(2)))
    is_tall = graph.add("And", is_more, graph.add("Greater", rows_less, graph.constant(0)))
    return graph.add_if(is_tall, resize_rows_first, resize_columns_first)


def _add_pass(graph: "_GraphBuilder", weights: str, image: str, channels: int) -> str:
    """Adds one pass over the first axis, and its rounding: weights (n, N), image (N, M, C) -> (n, M, C) float32.

    The pass is one large product with (N, M * C): a batch of small ones is several times as slow.
    """
    lines = graph.add("Gather", graph.add("Shape", image), graph.constant([0]), axis=0)
    flat = graph.add("Reshape", image, graph.add("Concat", lines, graph.constant([-1]), axis=0))
    summed = graph.add("MatMul", weights, graph.add("Cast", flat, to="float32"))
    rounded = graph.add("Floor", graph.add("Add", summed, graph.constant(np.float32(0.5))))  # half up, as Pillow
    clipped = graph.add("Clip", rounded, graph.constant(np.float32(0.0)), graph.constant(np.float32(255.0)))
    count = graph.add("Gather", graph.add("Shape", weights), graph.constant([0]), axis=0)
    return graph.add("Reshape", clipped, graph.add("Concat", count, graph.constant([-1, channels]), axis=0))


def _swap(graph: "_GraphBuilder", image: str) -> str:
    return graph.add("Transpose", image, perm=[1, 0, 2])


def _add_luminance(graph: "_GraphBuilder") -> str:
    """Adds Pillow's conversion of the image to gray: (H, W, 3) -> (H, W, 1) uint8."""
    weights = graph.constant(np.array(LUMINANCE, np.float64).reshape(3, 1) / 65536)
    weighted = graph.add("MatMul", graph.add("Cast", "image", to="float64"), weights)
    rounded = graph.add("Floor", graph.add("Add", weighted, graph.constant(np.float64(0.5))))
    return graph.add("Cast", rounded, to="uint8")


def _add_resized_sizes(graph: "_GraphBuilder", geometry: Geometry, height: str, width: str) -> tuple[str, str]:
    """Adds the height and width after resizing, as int64 scalars. The longer side is rounded down."""
    if geometry.size_px is not None:
        rows, columns = (graph.constant(side) for side in geometry.size_px)
        return rows, columns
    edge, shorter = graph.constant(geometry.edge_px), graph.add("Min", height, width)
    rows, columns = (graph.add("Div", graph.add("Mul", edge, side), shorter) for side in (height, width))
    return rows, columns


def _add_crop_start(graph: "_GraphBuilder", side: str, crop_px: int, *, rounds: bool) -> str:
    """Adds the first row or column of a central crop, as a float64 scalar."""
    margin = graph.add("Cast", graph.add("Sub", side, graph.constant(crop_px)), to="float64")
    half = graph.add("Mul", margin, graph.constant(np.float64(0.5)))
    return graph.add("Round" if rounds else "Floor", half)


def _add_filter(graph: "_GraphBuilder", kernel: Filter, side: str, resized: str, start: str, count: int) -> str:
    """Adds the weights (count, side) float32 with which `count` output pixels from `start` on sum the `side` input pixels.

    Pillow, `precompute_coeffs`: the weights of an output pixel are the filter at the distances of its input pixels, in a window
    that starts and ends at whole pixels, divided by their sum.
    """
    size = graph.add("Cast", side, to="float64")
    scale = graph.add("Div", size, graph.add("Cast", resized, to="float64"))
    stretch = graph.add("Max", scale, graph.constant(np.float64(1.0)))
    support = graph.add("Mul", stretch, graph.constant(np.float64(SUPPORTS[kernel])))
    number = graph.add("Add", start, graph.constant(np.arange(count, dtype=np.float64)[:, None] + 0.5))
    center = graph.add("Mul", number, scale)  # (count, 1)
    zero, half = graph.constant(np.float64(0.0)), graph.constant(np.float64(0.5))
    low = graph.add("Max", graph.add("Floor", graph.add("Add", graph.add("Sub", center, support), half)), zero)
    high = graph.add("Min", graph.add("Floor", graph.add("Add", graph.add("Add", center, support), half)), size)
    inputs = graph.add("Cast", graph.add("Range", graph.constant(0), side, graph.constant(1)), to="float64")  # (side,)
    distance = graph.add("Div", graph.add("Add", graph.add("Sub", inputs, center), half), stretch)  # (count, side)
    is_inside = graph.add("And", graph.add("GreaterOrEqual", inputs, low), graph.add("Less", inputs, high))
    weights = graph.add("Where", is_inside, _add_kernel(graph, kernel, distance), zero)
    total = graph.add("ReduceSum", weights, graph.constant([1]), keepdims=1)
    return graph.add("Cast", graph.add("Div", weights, total), to="float32")


def _add_kernel(graph: "_GraphBuilder", kernel: Filter, distance: str) -> str:
    """Adds the value of the filter at each distance, in float64. Distances beyond the support give 0."""
    x, zero = graph.add("Abs", distance), graph.constant(np.float64(0.0))
    if kernel == "box":
        # Pillow: 1 for -0.5 < x <= 0.5.
        half = graph.constant(np.float64(0.5))
        inside = graph.add(
            "And",
            graph.add("Greater", distance, graph.constant(np.float64(-0.5))),
            graph.add("LessOrEqual", distance, half),
        )
        return graph.add("Where", inside, graph.constant(np.float64(1.0)), zero)
    if kernel == "bilinear":
        return graph.add("Max", _affine(graph, x, -1.0, 1.0, "float64"), zero)
    if kernel == "bicubic":
        near = _add_polynomial(graph, x, (CUBIC_A + 2, -(CUBIC_A + 3), 0.0, 1.0))
        far = _add_polynomial(graph, x, (CUBIC_A, -5 * CUBIC_A, 8 * CUBIC_A, -4 * CUBIC_A))
        return _select(graph, x, 1.0, near, _select(graph, x, 2.0, far, zero))
    angle = graph.add("Mul", x, graph.constant(np.float64(math.pi)))
    sinc = _add_sinc(graph, x, angle)
    if kernel == "hamming":
        cosine = graph.add("Cast", graph.add("Cos", graph.add("Cast", angle, to="float32")), to="float64")
        return _select(graph, x, 1.0, graph.add("Mul", sinc, _affine(graph, cosine, 0.46, 0.54, "float64")), zero)
    third = graph.constant(np.float64(1 / 3))
    window = _add_sinc(graph, graph.add("Mul", x, third), graph.add("Mul", angle, third))
    return _select(graph, x, 3.0, graph.add("Mul", sinc, window), zero)


def _add_sinc(graph: "_GraphBuilder", x: str, angle: str) -> str:
    """Adds sin(angle) / angle, which is 1 at 0. The sine is of float32, since runtimes have no other."""
    sine = graph.add("Cast", graph.add("Sin", graph.add("Cast", angle, to="float32")), to="float64")
    one = graph.constant(np.float64(1.0))
    is_zero = graph.add("Equal", x, graph.constant(np.float64(0.0)))
    return graph.add("Where", is_zero, one, graph.add("Div", sine, graph.add("Where", is_zero, one, angle)))


def _add_polynomial(graph: "_GraphBuilder", x: str, coefficients: Sequence[float]) -> str:
    """Adds a polynomial of x with the highest power's coefficient first, by Horner's rule."""
    value = graph.constant(np.float64(coefficients[0]))
    for coefficient in coefficients[1:]:
        value = graph.add("Add", graph.add("Mul", value, x), graph.constant(np.float64(coefficient)))
    return value


def _select(graph: "_GraphBuilder", x: str, limit: float, below: str, others: str) -> str:
    return graph.add("Where", graph.add("Less", x, graph.constant(np.float64(limit))), below, others)


def _add_colors(graph: "_GraphBuilder", preprocessing: Preprocessing, pixels: str) -> str:
    """Adds the color steps: pixels (h, w, C) -> normalized images (1, C, h, w) float32."""
    colors = preprocessing.colors
    assert colors is not None
    if colors.is_bgr:
        pixels = graph.add("Gather", pixels, graph.constant([2, 1, 0]), axis=2)
    std = np.array(colors.std, np.float64) * np.array(colors.second_std or 1.0, np.float64)
    factor = np.broadcast_to(colors.rescale / std, preprocessing.channels).astype(np.float32)
    shift = np.broadcast_to((colors.offset - np.array(colors.mean)) / std, preprocessing.channels).astype(np.float32)
    normalized = graph.add("Add", graph.add("Mul", pixels, graph.constant(factor)), graph.constant(shift))
    return graph.add("Unsqueeze", graph.add("Transpose", normalized, perm=[2, 0, 1]), graph.constant([0]))


def _affine(graph: "_GraphBuilder", x: str, factor: float, shift: float, dtype: str) -> str:
    scaled = graph.add("Mul", x, graph.constant(np.dtype(dtype).type(factor)))
    return graph.add("Add", scaled, graph.constant(np.dtype(dtype).type(shift)))


class _GraphBuilder:
    """Collects the nodes of an ONNX graph with the input `image` (H, W, 3) uint8. Values are named by numbers."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.count = 0
        self.constants: dict[tuple[str, tuple[int, ...], bytes], tuple[str, Any]] = {}

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output, and returns the output's name. `to` is the name of a NumPy type."""
        from onnx import helper

        if "to" in attributes:
            attributes["to"] = helper.np_dtype_to_tensor_dtype(np.dtype(attributes["to"]))
        self.count += 1
        name = f"preprocessing_{self.count}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=f"{operator}_{name}", **attributes))
        return name

    def add_if(self, condition: str, if_true: Callable[[], str], if_false: Callable[[], str]) -> str:
        """Adds a choice between two functions, which add the nodes of their branch and return its result."""
        from onnx import helper

        branches = {}
        outer = self.nodes
        for key, add_branch in (("then_branch", if_true), ("else_branch", if_false)):
            self.nodes = []
            result = helper.make_tensor_value_info(add_branch(), 1, None)  # float32 of any shape
            branches[key] = helper.make_graph(self.nodes, key, [], [result])
        self.nodes = outer
        return self.add("If", condition, **branches)

    def constant(self, value: Any) -> str:
        """Returns the name of a constant. Python's whole numbers become int64. Equal constants are stored once."""
        from onnx import numpy_helper

        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            name = f"preprocessing_constant_{len(self.constants)}"
            self.constants[key] = name, numpy_helper.from_array(array, name)
        return self.constants[key][0]

    def finish(self, result: str, name: str, shape: Sequence[int], dtype: str) -> "onnx.ModelProto":
        """Returns the checked model whose only output is `result`, under the name `name`."""
        from onnx import TensorProto, checker, helper

        image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["height", "width", 3])
        output = helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
        nodes = [*self.nodes, helper.make_node("Identity", [result], [name], name=f"Identity_{name}")]
        constants = [tensor for _, tensor in self.constants.values()]
        graph = helper.make_graph(nodes, "preprocessing", [image], [output], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        checker.check_model(model)
        return model
