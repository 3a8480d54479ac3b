"""A network as an ONNX model: dynamic batch, batch normalisation folded, named inputs and outputs."""

from __future__ import annotations

import ast
import json
from typing import Any

from edgepress.compress.fold import folded
from edgepress.compress.network import Network, export_program

from .artifact import METADATA_KEY
from .names import port_names
from .projections import plain_lstms
from .silence import silence

__all__ = ["OPSET", "annotate_onnx", "onnx_model"]

OPSET = 18
"""The opset that torch's exporter is written for, without a conversion; ONNX Runtime runs it since 1.14. On the networks
that were timed, 20 and 21 were no faster."""

_SCOPES = "pkg.torch.onnx.name_scopes"


def onnx_model(network: Network) -> Any:
    """Convert a network to an fp32 ``onnx.ModelProto`` with a dynamic batch.

    Raises:
        FileError: an operator that ONNX lacks, and that cannot be written with others.
        Exception: whatever torch's exporter raises; `edgepress.targets.export.export` turns it into a sentence.
    """
    import torch

    plain = Network(plain_lstms(folded(network).module), network.example_inputs)  # a layer keeps its name if we fold
    program = export_program(_written_out(plain))
    inputs, outputs = port_names(program)
    with silence():
        converted = torch.onnx.export(
            program, dynamo=True, optimize=True, opset_version=OPSET, input_names=inputs, output_names=outputs
        )
    assert converted is not None
    model = converted.model_proto
    _name_batch(model)
    _name_modules(model)
    _strip(model)
    return model


def _written_out(network: Network) -> Network:
    """Put differences and norms in the place of `aten.cdist`, which the exporter does not know, in place."""
    import torch

    for node in network.module.graph.find_nodes(op="call_function", target=torch.ops.aten.cdist.default):
        node.target = _distances
    network.module.recompile()
    return network


def _distances(x: Any, y: Any, p: float = 2.0, compute_mode: int | None = None) -> Any:
    """`torch.cdist`: the p-norms of the differences between the rows of ``[..., M, K]`` and of ``[..., N, K]``: ``[..., M, N]``.

    Example:
        >>> import torch
        >>> _distances(torch.zeros(1, 2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([[5., 1.]])
    """
    import torch

    return torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, -1)


def _name_batch(model: Any) -> None:
    """Call the open dimension 'batch' instead of by torch's symbol."""
    symbol = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param and dim.dim_param == symbol:
                dim.dim_param = "batch"


def _name_modules(model: Any) -> None:
    """Put the user's module in front of an operator's name, ``layer1.0/node_relu_2``: profilers and viewers show it."""
    for node in model.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
        modules = [scope for scope in ast.literal_eval(scopes)[:-1] if scope]  # the last one is the operator
        node.name = "/".join([*modules[-1:], node.name])


def _strip(model: Any) -> None:
    """Drop what only a debugger reads: it names the classes and paths of the machine that made the file, and is a third of
    a small one."""
    del model.metadata_props[:]
    model.graph.doc_string = ""
    graphs = [model.graph, *model.functions]
    while graphs:
        graph = graphs.pop()
        del graph.value_info[:]
        del graph.metadata_props[:]
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
            graphs.extend(a.g for a in node.attribute if a.HasField("g"))
        for tensor in getattr(graph, "initializer", ()):
            del tensor.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]


def annotate_onnx(model: Any, notes: dict[str, Any]) -> None:
    """Write edgepress's metadata into ``metadata_props``, in place.

    Example:
        >>> import onnx
        >>> model = onnx.ModelProto()
        >>> annotate_onnx(model, {"version": "0.1.0"})
        >>> model.metadata_props[0].key, model.metadata_props[0].value
        ('edgepress', '{"version": "0.1.0"}')
    """
    _strip(model)
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(notes, default=str))
    model.producer_name, model.producer_version = "edgepress", str(notes.get("version", ""))
