"""Reading and changing an ONNX graph: whose a node is, what feeds it, and new constants and nodes in their places."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepress.compress.quantization import operator_kind

__all__ = ["Graph", "captured", "channel_axis", "fold_constants", "kind_of", "module_of", "weight_of"]

_FOLDED = {"Concat", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
_WEIGHTS = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "LSTM": 1, "GRU": 1, "RNN": 1}


def module_of(node: Any) -> str:
    """The user's module that a node belongs to: `edgepress.targets.onnx_file` put it in front of the node's name.

    Example:
        >>> from onnx import helper
        >>> module_of(helper.make_node("Relu", ["x"], ["y"], name="layer1.0/node_relu_2"))
        'layer1.0'
    """
    return str(node.name).rpartition("/")[0]


class Graph:
    """An ``onnx.ModelProto`` with its constants and connections at hand. It is changed in place; `finish` puts it in order.

    Attributes:
        constants: the values of initializers, by name, read when they are asked for.
        made_by: the node that makes a tensor.
        used_by: the nodes that read a tensor.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.nodes: list[Any] = list(model.graph.node)
        self.inputs = [value.name for value in model.graph.input]
        self.outputs = {value.name for value in model.graph.output}
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._constants: dict[str, NDArray[Any]] = {}
        self.connect()

    def connect(self) -> None:
        """Find out anew who makes and who reads what."""
        self.made_by = {name: node for node in self.nodes for name in node.output if name}
        self.used_by: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for name in {*node.input} | captured(node):
                if name:
                    self.used_by[name].append(node)

    def constant(self, name: str) -> NDArray[Any] | None:
        """The value of an initializer; None for anything else."""
        from onnx import numpy_helper

        if name not in self.tensors:
            return None
        if name not in self._constants:
            self._constants[name] = numpy_helper.to_array(self.tensors[name])
        return self._constants[name]

    def add_constant(self, name: str, value: NDArray[Any]) -> str:
        """A new initializer, under a name that no other has."""
        from onnx import numpy_helper

        return self.add_tensor(numpy_helper.from_array(np.asarray(value, order="C"), name))

    def add_tensor(self, tensor: Any) -> str:
        """The same, of a ``TensorProto``."""
        while tensor.name in self.tensors or tensor.name in self.made_by:
            tensor.name += "_"
        self.tensors[tensor.name] = tensor
        return str(tensor.name)

    def add_node(
        self, kind: str, inputs: list[str], outputs: list[str], name: str = "", domain: str = "", **attributes: Any
    ) -> Any:
        """A new node; `finish` finds its place."""
        from onnx import helper

        node = helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes)
        self.nodes.append(node)
        return node

    def finish(self) -> Any:
        """Put the nodes into an order in which each follows what it reads, and drop constants that nobody reads."""
        graph, nodes = self.model.graph, _ordered(self.nodes)
        used = self.outputs.union(*({*node.input} | captured(node) for node in nodes))
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(nodes)
        graph.initializer.extend(tensor for name, tensor in self.tensors.items() if name in used)
        return self.model

    def sweep(self) -> Any:
        """Drop nodes that nobody reads, and `finish`: ONNX Runtime does run a `DequantizeLinear` that nobody reads."""
        used, read = set(self.outputs), []
        for node in reversed(_ordered(self.nodes)):
            if not used.isdisjoint(node.output):
                used |= {*node.input} | captured(node)
                read.append(node)
        self.nodes = read
        return self.finish()


def fold_constants(graph: Graph) -> None:
    """Carry out what only rearranges constants: torch's exporter leaves the gates of an LSTM of more than a few units to be cut
    and joined when the file is loaded, and a weight that is made so is no constant to quantize.

    Args:
        graph: an ONNX graph; changed in place.
    """
    from onnx import ValueInfoProto, helper
    from onnx.reference import ReferenceEvaluator

    known, folding = set(graph.tensors), []
    for node in graph.nodes:
        if node.op_type in _FOLDED and all(not name or name in known for name in node.input):
            folding.append(node)
            known.update(node.output)
    if not folding:
        return
    inside = {id(node) for node in folding}
    names = [name for node in folding for name in node.output]
    wanted = [name for name in names if name in graph.outputs or any(id(node) not in inside for node in graph.used_by[name])]
    read = {name for node in folding for name in node.input} & graph.tensors.keys()
    outputs = [ValueInfoProto(name=name) for name in wanted]
    body = helper.make_graph(folding, "constants", [], outputs, [graph.tensors[name] for name in sorted(read)])
    values = ReferenceEvaluator(helper.make_model(body, opset_imports=graph.model.opset_import)).run(None, {})
    graph.nodes = [node for node in graph.nodes if id(node) not in inside]
    graph.connect()
    for name, value in zip(wanted, values, strict=True):
        graph.add_constant(name, np.asarray(value))


def weight_of(graph: Graph, node: Any) -> NDArray[Any] | None:
    """The float32 weight of a convolution, a linear or a recurrent layer; None where it has none that is constant."""
    slot = _WEIGHTS.get(node.op_type)
    value = None if slot is None or len(node.input) <= slot else graph.constant(node.input[slot])
    return value if value is not None and value.dtype == np.float32 and value.ndim >= 2 else None


def channel_axis(node: Any) -> int:
    """Where the output channels are in a layer's weight.

    Example:
        >>> from onnx import helper
        >>> channel_axis(helper.make_node("Conv", ["x", "w"], ["y"])), channel_axis(helper.make_node("MatMul", ["x", "w"], ["y"]))
        (0, 1)
    """
    if "Gemm" in node.op_type:
        return 0 if any(attribute.name == "transB" and attribute.i for attribute in node.attribute) else 1
    return 1 if "MatMul" in node.op_type else 0


def kind_of(graph: Graph, node: Any) -> str:
    """What an operator is called in ``op:`` patterns, see `operator_kind`.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> from edgepress.targets.onnx_file import onnx_model
        >>> graph = Graph(onnx_model(trace(torch.nn.Linear(4, 2), torch.zeros(1, 4))))
        >>> [kind_of(graph, node) for node in graph.nodes]
        ['linear']
    """
    if node.op_type == "MatMul":
        return "linear" if weight_of(graph, node) is not None else "matmul"
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    weight = graph.tensors.get(node.input[1]) if groups > 1 and node.op_type == "Conv" else None
    return operator_kind(str(node.op_type).lower(), depthwise=weight is not None and weight.dims[1] == 1)


def captured(node: Any) -> set[str]:
    """What the bodies of a loop or a branch read from outside (and their own names, which do no harm)."""
    bodies = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return {name for body in bodies for inner in body.node for name in {*inner.input} | captured(inner)} | {
        value.name for body in bodies for value in body.output
    }


def _ordered(nodes: list[Any]) -> list[Any]:
    """In the order of their dependencies; of those that are free, the first in the list comes first."""
    made_by = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    needs = [{made_by[name] for name in {*node.input} | captured(node) if name in made_by} for node in nodes]
    done: set[int] = set()
    order: list[Any] = []
    for start in range(len(nodes)):
        stack = [start]
        while stack:
            index = stack[-1]
            waiting = [] if index in done else sorted(needs[index] - done - {index}, reverse=True)
            if waiting:
                stack.extend(waiting)
                continue
            stack.pop()
            if index not in done:
                done.add(index)
                order.append(nodes[index])
    return order
