"""What every tensor of an fp32 TFLite file holds while it runs, and the ranges that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from edgepress.compress.quantization import Calibrator

from .artifact import inline
from .ranges import Statistics
from .silence import silence

__all__ = [
    "BODY",
    "activation_ranges",
    "activations",
    "float_tensors",
    "port_names",
    "read_model",
    "real_tensors",
    "tensor_name",
    "tflite_tensors",
    "weight_integers",
]

BODY = "##"
"""How names of tensors begin that are not of the main graph."""

_NO_HISTOGRAM = ("minmax", "average")


def tflite_tensors(content: bytes) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """Make a function that runs a file once and gives what its operators computed in floats.

    Args:
        content: a TFLite flatbuffer with one signature.

    Returns:
        a function from the inputs, by the signature's names and in the file's layout and types, to the float inputs and the
        results of all operators by the names of their tensors; weights are left out. The arrays are copies.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> from edgepress.targets.tflite_file import annotate_tflite, tflite_model
        >>> network = trace(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh()), torch.zeros(1, 3))
        >>> tensors = tflite_tensors(annotate_tflite(*tflite_model(network)))
        >>> [value.shape for value in tensors({"input": np.ones((1, 3), np.float32)}).values()]
        [(1, 3), (1, 2), (1, 2)]
    """
    return _tensors(content, activations(read_model(content)))


def real_tensors(content: bytes) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """The same of a quantized file: what is stored in integers with one scale comes as real numbers.

    Args:
        content: a TFLite flatbuffer with one signature.
    """
    graph = read_model(content).subgraphs[0]
    floats = activations(read_model(content))
    made = [int(i) for i in graph.inputs] + [int(i) for operator in graph.operators for i in operator.outputs if i >= 0]
    numbers = {i: graph.tensors[i].quantization for i in made}
    scaled = {i: q for i, q in numbers.items() if q is not None and q.scale is not None and len(q.scale) == 1}
    run = _tensors(content, {**floats, **{tensor_name(graph.tensors[i]): i for i in scaled}})
    real = {tensor_name(graph.tensors[i]): (np.float32(q.scale[0]), int(q.zeroPoint[0])) for i, q in scaled.items()}

    def values(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = run(feeds)
        return found | {n: (found[n].astype(np.float32) - zero) * scale for n, (scale, zero) in real.items()}

    return values


def _tensors(content: bytes, indices: Mapping[str, int]) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    with silence():
        from ai_edge_litert import interpreter as litert

        # with all tensors preserved XNNPACK writes each of them, too, and fuses nothing
        interpreter = litert.Interpreter(
            model_content=content,
            num_threads=1,
            experimental_preserve_all_tensors=True,
        )
        interpreter.allocate_tensors()
    runner = interpreter.get_signature_runner()

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        runner(**feeds)
        return {name: interpreter.get_tensor(index) for name, index in indices.items()}

    return run


def activation_ranges(
    content: bytes, feeds: Iterable[Mapping[str, np.ndarray]], calibrator: Calibrator, levels: int = 255
) -> dict[str, tuple[float, float]]:
    """The range of every float tensor that a file's operators give, over examples that are seen one at a time.

    Args:
        content: an fp32 TFLite flatbuffer that takes one example.
        feeds: examples by the signature's names, in the file's layout; memory does not grow with how many there are.
        calibrator: how a range is taken, see `Statistics.range`.
        levels: steps of the integer grid.

    Returns:
        (lowest, highest) by the tensor's name; infinite where a value was, as in attention's masks.
    """
    run, histogram = tflite_tensors(content), calibrator not in _NO_HISTOGRAM
    seen: dict[str, Statistics] = {}
    lowest: dict[str, float] = {}
    highest: dict[str, float] = {}
    for example in feeds:
        for name, values in run(example).items():
            seen.setdefault(name, Statistics(histogram=histogram)).update(values)
            if not np.isfinite(values).all():
                lowest[name] = min(lowest.get(name, 0.0), float(np.nanmin(values)))
                highest[name] = max(highest.get(name, 0.0), float(np.nanmax(values)))
    found = {name: statistics.range(calibrator, levels) for name, statistics in seen.items()}
    return found | {name: (lowest[name], highest[name]) for name in lowest}


def read_model(content: bytes) -> Any:
    """A flatbuffer's tables as Python objects (``ModelT``)."""
    with silence():
        from ai_edge_litert import schema_py_generated as schema

    return schema.ModelT.InitFromPackedBuf(content, 0)


def tensor_name(tensor: Any) -> str:
    """Of a tensor of `read_model`."""
    return tensor.name.decode() if isinstance(tensor.name, bytes) else str(tensor.name)


def activations(model: Any) -> dict[str, int]:
    """The tensors of a model's main graph that it takes or computes in floats: their indices by name."""
    from ai_edge_litert import schema_py_generated as schema

    graph = model.subgraphs[0]
    made = [int(i) for i in graph.inputs] + [int(i) for operator in graph.operators for i in operator.outputs if i >= 0]
    return {tensor_name(graph.tensors[i]): i for i in made if graph.tensors[i].type == schema.TensorType.FLOAT32}


def port_names(model: Any) -> tuple[list[str], list[str]]:
    """The float inputs and outputs of a model's main graph, by the names of their tensors."""
    graph, floats = model.subgraphs[0], activations(model)
    names = [[tensor_name(graph.tensors[int(i)]) for i in ports] for ports in (graph.inputs, graph.outputs)]
    inputs, outputs = ([name for name in port if name in floats] for port in names)
    return inputs, outputs


def float_tensors(content: bytes) -> dict[str, np.ndarray]:
    """The float constants of a file's main graph, weights above all, by the names of their tensors."""
    from ai_edge_litert import schema_py_generated as schema

    model = read_model(content)
    found = {}
    for tensor in model.subgraphs[0].tensors:
        buffer = model.buffers[tensor.buffer]
        inline(buffer, content)
        if tensor.type == schema.TensorType.FLOAT32 and buffer.data is not None and tensor.shape is not None:
            found[tensor_name(tensor)] = np.frombuffer(bytes(buffer.data), np.float32).reshape(tensor.shape)
    return found


def weight_integers(tensor: Any, data: np.ndarray) -> np.ndarray:
    """The integers that a weight is stored in, in its shape; of 4 bits, two lie in a byte, the first in its lower half.

    Args:
        tensor: of `read_model`, int8 or int4.
        data: its buffer's bytes.
    """
    from ai_edge_litert import schema_py_generated as schema

    stored = np.frombuffer(bytes(data), np.int8)
    if tensor.type == schema.TensorType.INT4:
        stored = np.stack([stored << 4 >> 4, stored >> 4], 1).reshape(-1)[: int(np.prod(tensor.shape))]
    return stored.reshape(tensor.shape)
