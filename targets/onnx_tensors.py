"""The values of an ONNX model's own tensors: given for each run, or as ranges over any number of examples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from edgepress.compress.quantization import Calibrator

from .ranges import Statistics

__all__ = ["activation_ranges", "onnx_tensors", "open_session", "stream"]

_BYTES = 2**26  # of activations at a time
_NO_HISTOGRAM = ("minmax", "average")


def onnx_tensors(model: Any, names: Collection[str] | None = None) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """A function that runs a model and gives its float32 activations by the names that they have in the file.

    The graph runs as it stands, without ONNX Runtime's fusions, in one session and one thread. Tensors inside the bodies of
    loops and branches have no values outside and are left out.

    Args:
        model: an fp32 ``onnx.ModelProto``; it is left as it was.
        names: the tensors wanted; all where None. Names that are no float activation are passed over.

    Example:
        >>> import onnx
        >>> from onnx import helper
        >>> ports = [helper.make_tensor_value_info(name, 1, [None, 2]) for name in "xz"]
        >>> nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Relu", ["y"], ["z"])]
        >>> graph = helper.make_graph(nodes, "g", ports[:1], ports[1:])
        >>> run = onnx_tensors(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))
        >>> {name: value.tolist() for name, value in run({"x": np.float32([[1, -2]])}).items()}
        {'x': [[1.0, -2.0]], 'y': [[-1.0, 2.0]], 'z': [[0.0, 2.0]]}
    """
    import onnx

    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    made = [name for node in model.graph.node for name in node.output if name and (names is None or name in names)]
    given = {value.name for value in shown.graph.output}
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in given)
    session = open_session(shown, fused=False)
    floats = {value.name for value in session.get_outputs() if value.type == "tensor(float)"}
    wanted = [name for name in made if name in floats]

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        fed = {name: value for name, value in feeds.items() if value.dtype == np.float32 and (names is None or name in names)}
        return {**fed, **dict(zip(wanted, session.run(wanted, dict(feeds)) if wanted else [], strict=True))}

    return run


def open_session(model: Any, fused: bool = True) -> Any:
    """A quiet ``onnxruntime.InferenceSession`` on one thread; not ``fused``, operators run one by one as they are written."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def stream(
    model: Any, pieces: Callable[[], Iterator[tuple[np.ndarray, ...]]], names: Collection[str] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """What `onnx_tensors` gives for the calibration data, some examples at a time: as many as need little memory.

    Args:
        model: an fp32 ``onnx.ModelProto``.
        pieces: a function that gives the examples, as tuples of arrays ``[n, ...]`` in the order of the model's inputs.
        names: the tensors wanted; all where None.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> from edgepress.targets.onnx_file import onnx_model
        >>> model = onnx_model(trace(torch.nn.ReLU(), torch.zeros(1, 2)))
        >>> [values["output"].shape for values in stream(model, lambda: iter([(np.zeros((4, 2), np.float32),)]))]
        [(1, 2), (3, 2)]
    """
    run = onnx_tensors(model, names)
    inputs = [value.name for value in model.graph.input]
    rows = 1
    for arrays in pieces():
        start = 0
        while start < len(arrays[0]):
            part = [array[start : start + rows] for array in arrays]
            values = run(dict(zip(inputs, part, strict=True)))
            yield values
            start += rows
            held = sum(value.nbytes for value in values.values())
            rows = max(1, _BYTES * len(part[0]) // max(held, 1))


def activation_ranges(
    model: Any,
    pieces: Callable[[], Iterator[tuple[np.ndarray, ...]]],
    calibrator: Calibrator,
    levels: int = 255,
    names: Collection[str] | None = None,
) -> dict[str, tuple[float, float]]:
    """The range of every float activation over the calibration data, which stream by: memory does not grow with their number.

    Args:
        model: an fp32 ``onnx.ModelProto``.
        pieces: a function that gives the examples, as tuples of arrays ``[n, ...]`` in the order of the model's inputs.
        calibrator: how a range is taken from what was seen.
        levels: steps of the integer grid.
        names: the tensors wanted; all where None.

    Returns:
        (lowest, highest) by the tensor's name, in the tensor's unit.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> from edgepress.targets.onnx_file import onnx_model
        >>> model = onnx_model(trace(torch.nn.ReLU(), torch.zeros(1, 2)))
        >>> activation_ranges(model, lambda: iter([(np.float32([[-3, 5]]),)]), "minmax")
        {'input': (-3.0, 5.0), 'output': (0.0, 5.0)}
    """
    seen: dict[str, Statistics] = {}
    for values in stream(model, pieces, names):
        for name, value in values.items():
            if name not in seen:
                seen[name] = Statistics(histogram=calibrator not in _NO_HISTOGRAM)
            seen[name].update(value)
    return {name: statistics.range(calibrator, levels) for name, statistics in seen.items()}
