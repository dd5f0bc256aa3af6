"""One ONNX graph from an image of any size to probabilities: the preprocessing, the network and the activation in a row."""

from pathlib import Path

from hf_transfer.exporting.formats import INPUT, OUTPUT
from hf_transfer.exporting.graph import build_activation, describe
from hf_transfer.exporting.preprocessing_graph import build_preprocessing
from hf_transfer.network.backbone import Backbone

_NETWORK, _ACTIVATION = "network/", "activation/"  # prefixes of names, which would collide otherwise


def write_whole_graph(backbone: Backbone, network: Path, file: Path) -> None:
    """Writes `file`: `image` (H, W, 3) uint8 RGB -> `probabilities` (1, K) and `pixel_values` (1, C, h, w).

    `network`: the exported network (see `graph.write_onnx`). The first output is called `values` for a regression. Raises
    ValueError if the graph cannot contain the preprocessing.
    """
    import onnx
    from onnx import compose

    preprocessing, activation = build_preprocessing(backbone.preprocessing), build_activation(backbone.target)
    body = compose.add_prefix(onnx.load(network), _NETWORK)
    end = compose.add_prefix(activation, _ACTIVATION)
    for each in (body, end):
        each.ir_version = preprocessing.ir_version
    result = backbone.target.outputs_name
    joined = compose.merge_models(body, end, io_map=[(f"{_NETWORK}{OUTPUT}", f"{_ACTIVATION}{OUTPUT}")])
    joined = compose.merge_models(preprocessing, joined, io_map=[(INPUT, f"{_NETWORK}{INPUT}")])
    rename = onnx.helper.make_node("Identity", [f"{_ACTIVATION}{result}"], [result], name=f"Identity_{result}")
    joined.graph.node.append(rename)
    del joined.graph.output[:], joined.metadata_props[:]
    shape = [1, backbone.target.num_outputs]
    joined.graph.output.append(onnx.helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, shape))
    joined.graph.output.append(preprocessing.graph.output[0])
    onnx.helper.set_model_props(joined, describe(backbone))
    onnx.checker.check_model(joined)
    onnx.save(joined, file)
