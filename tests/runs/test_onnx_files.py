"""An ONNX file is a stranger's too: one that is no export of a run is one message, when it is loaded or when it is
run."""

import numpy as np
import pytest
import torch

from tracknet.errors import UserError
from tracknet.runs.onnx import OnnxModel

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
FLOAT, UINT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
FRAMES = torch.zeros(2, 3, 3, 72, 128, dtype=torch.uint8)
WINDOW = ("batch", 3, 3, 72, 128)


def write(path, nodes, inputs=(("frames", UINT8, WINDOW),), outputs=(("logits", FLOAT, None),), initializers=()):
    """Write a graph; nodes are ``(operator, inputs, outputs, attributes)``."""
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node(kind, list(a), list(b), **attributes) for kind, a, b, attributes in nodes],
        "graph",
        *([helper.make_tensor_value_info(*value) for value in values] for values in (inputs, outputs)),
        initializer=list(initializers),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, str(path))
    return path


CAST = ("Cast", ["frames"], ["logits"], {"to": FLOAT})
MEAN = [("Cast", ["frames"], ["x"], {"to": FLOAT}), ("ReduceMean", ["x"], ["logits"], {"axes": [2], "keepdims": 0})]


def test_what_makes_a_heatmap_of_each_frame_runs(tmp_path):
    model = OnnxModel(write(tmp_path / "m.onnx", MEAN), torch.device("cpu"))
    assert model(FRAMES).shape == (2, 3, 72, 128) and model.input_shape == WINDOW[1:]


@pytest.mark.parametrize(
    "options",
    [
        {"nodes": [("Identity", ["frames"], ["logits"], {})], "inputs": [("frames", FLOAT, WINDOW)]},
        {"nodes": [("Cast", ["x"], ["logits"], {"to": FLOAT})], "inputs": [("x", UINT8, WINDOW)]},
        {"nodes": [("Cast", ["frames"], ["y"], {"to": FLOAT})], "outputs": [("y", FLOAT, None)]},
        {"nodes": [CAST], "inputs": [("frames", UINT8, WINDOW), ("more", FLOAT, [1])]},
        {"nodes": [CAST], "inputs": [("frames", UINT8, [3, 72, 128])]},
        {"nodes": [("Identity", ["frames"], ["logits"], {})], "outputs": [("logits", UINT8, None)]},
    ],
    ids=["float frames", "another input", "another output", "two inputs", "one frame", "no floats"],
)
def test_another_model_is_refused_when_it_is_loaded(tmp_path, options):
    path = write(tmp_path / "m.onnx", **options)
    with pytest.raises(UserError, match=r"m\.onnx: is not a model exported by TrackNet.*Export the run again"):
        OnnxModel(path, torch.device("cpu"))


def test_no_inputs_are_another_model(tmp_path):
    value = onnx.numpy_helper.from_array(np.ones(1, np.float32))
    path = write(tmp_path / "m.onnx", [("Constant", [], ["logits"], {"value": value})], inputs=())
    with pytest.raises(UserError, match="is not a model exported by TrackNet"):
        OnnxModel(path, torch.device("cpu"))


@pytest.mark.parametrize("axes", [[], [0], [2, 3], [1, 2]], ids=str)
def test_what_makes_no_heatmaps_is_refused_when_it_is_run(tmp_path, axes):
    nodes = [CAST] if not axes else [MEAN[0], ("ReduceMean", ["x"], ["logits"], {"axes": axes, "keepdims": 0})]
    model = OnnxModel(write(tmp_path / "m.onnx", nodes), torch.device("cpu"))
    with pytest.raises(UserError, match="not a heatmap of each"):
        model(FRAMES)


def test_a_heatmap_whose_cells_are_no_pixels_is_refused(tmp_path):
    pads = onnx.numpy_helper.from_array(np.array([0, 0, 0, 0, 0, 0, 0, 1]), "pads")
    nodes = [*MEAN[:1], (*MEAN[1][:2], ["y"], MEAN[1][3]), ("Pad", ["y", "pads"], ["logits"], {})]
    model = OnnxModel(write(tmp_path / "m.onnx", nodes, initializers=[pads]), torch.device("cpu"))
    with pytest.raises(UserError, match=r"returns shape \[2, 3, 72, 129\]"):
        model(FRAMES)


def test_a_graph_that_cannot_be_run_is_one_message(tmp_path):
    shape = onnx.numpy_helper.from_array(np.array([7, -1]), "shape")
    nodes = [MEAN[0], ("Reshape", ["x", "shape"], ["logits"], {})]
    model = OnnxModel(write(tmp_path / "m.onnx", nodes, initializers=[shape]), torch.device("cpu"))
    with pytest.raises(UserError, match=r"m\.onnx: onnxruntime cannot run it"):
        model(FRAMES)


def test_weights_outside_of_the_folder_are_not_read(tmp_path):
    (tmp_path / "private").write_bytes(b"12345678")
    (tmp_path / "run").mkdir()
    weights = onnx.numpy_helper.from_array(np.ones(2, np.float32), "w")
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "../private"), ("offset", "0"), ("length", "8")):
        entry = weights.external_data.add()
        entry.key, entry.value = key, value
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Cast", ["frames"], ["logits"], to=FLOAT),
            onnx.helper.make_node("Add", ["w", "w"], ["z"]),
        ],
        "graph",
        [onnx.helper.make_tensor_value_info("frames", UINT8, WINDOW)],
        [onnx.helper.make_tensor_value_info("logits", FLOAT, None)],
        [weights],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    (tmp_path / "run/m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"onnxruntime cannot load it.*escapes"):
        OnnxModel(tmp_path / "run/m.onnx", torch.device("cpu"))
