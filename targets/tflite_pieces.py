"""Running a TFLite file piece by piece, each operator once."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .artifact import inline
from .segments import Segment, segments
from .silence import silence
from .tflite_file import pack
from .tflite_tensors import read_model

__all__ = ["Pieces"]


class Pieces:
    """A file that is run between some of its tensors.

    Args:
        content: a flatbuffer with one signature, one main graph.
        cuts: indices of the tensors that are wanted, in the order in which they are made.
    """

    def __init__(self, content: bytes, cuts: Sequence[int]):
        self.model = read_model(content)
        for buffer in self.model.buffers:
            inline(buffer, content)
        graph = self.model.subgraphs[0]
        made = {int(i) for i in graph.inputs} | {int(i) for operator in graph.operators for i in operator.outputs}
        operators = [
            ({int(i) for i in (o.inputs if o.inputs is not None else ())} & made, {int(i) for i in o.outputs})
            for o in graph.operators
        ]
        self.segments: list[Segment] = segments(operators, [int(i) for i in graph.inputs], cuts)

    def inputs(self, feeds: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
        """An example by the signature's names, as the file's tensors hold it."""
        given = {}
        for port in self.model.signatureDefs[0].inputs:
            name = port.name.decode() if isinstance(port.name, bytes) else port.name
            given[int(port.tensorIndex)] = _on_grid(feeds[name], self.model.subgraphs[0].tensors[int(port.tensorIndex)])
        return given

    def run(self, piece: Segment, examples: Sequence[Mapping[int, np.ndarray]]) -> list[np.ndarray]:
        """What a piece makes of each example, whose known tensors are given by index."""
        with silence():
            from ai_edge_litert import interpreter as litert

            interpreter = litert.Interpreter(model_content=pack(self._only(piece)), num_threads=1)
            interpreter.allocate_tensors()
        found = []
        for example in examples:
            for index in piece.inputs:
                interpreter.set_tensor(index, example[index])
            interpreter.invoke()
            found.append(interpreter.get_tensor(piece.output))
        return found

    def _only(self, piece: Segment) -> Any:
        """The file with just these operators, and the constants that they read."""
        model, graph = copy.copy(self.model), copy.copy(self.model.subgraphs[0])
        graph.operators = [graph.operators[number] for number in piece.operators]
        graph.inputs, graph.outputs = list(piece.inputs), [piece.output]
        model.subgraphs, model.signatureDefs, model.metadata = [graph, *model.subgraphs[1:]], None, None
        read = {int(i) for operator in graph.operators for i in (operator.inputs if operator.inputs is not None else ())}
        kept = {graph.tensors[i].buffer for i in read if i >= 0}
        kept |= {tensor.buffer for other in model.subgraphs[1:] for tensor in other.tensors}
        model.buffers = [buffer if number in kept else type(buffer)() for number, buffer in enumerate(model.buffers)]
        return model


def _on_grid(value: np.ndarray, tensor: Any) -> np.ndarray:
    from ai_edge_litert import schema_py_generated as schema

    known: dict[int, type[np.signedinteger[Any]]] = {schema.TensorType.INT8: np.int8, schema.TensorType.INT16: np.int16}
    integers = known.get(tensor.type)
    if integers is None or value.dtype != np.float32:
        return value
    limits, numbers = np.iinfo(integers), tensor.quantization
    whole = np.rint(value / np.float32(numbers.scale[0])) + int(numbers.zeroPoint[0])
    return np.asarray(np.clip(whole, limits.min, limits.max), integers)
