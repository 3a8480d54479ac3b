"""A network as a TFLite model: one example at a time, channels last, named inputs and outputs."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx import traceback
from torch.utils import _pytree as pytree

from edgepress.compress.network import Network, export_program

from .artifact import METADATA_KEY, Port, inline, tflite_ports
from .names import port_names
from .silence import silence
from .strides import pool_slices
from .tflite_tensors import BODY

__all__ = ["Layout", "annotate_tflite", "fed_ports", "pack", "tflite_model"]

_ALIGNMENT = 16  # of a buffer's first byte, as the format's schema demands; Python's generated packer does not
_REPEATED_RANK = 4  # up to which the converter writes a repetition soundly


@dataclass(frozen=True)
class Layout:
    """Names of a file's inputs and outputs, and which of them have the channels last."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last_inputs: tuple[bool, ...]
    last_outputs: tuple[bool, ...]
    modules: dict[str, str] = field(default_factory=dict, hash=False)
    """The user's modules, ``layer1.0.conv1``, by what the converter calls the nodes of the graph; see `_numbered`."""
    weighted: frozenset[str] = frozenset()
    """Those of them that own weights, not biases alone: where an operator stands for several nodes, they give it its name."""

    @property
    def notes(self) -> dict[str, list[dict[str, Any]]]:
        """As the file's metadata says it, in the order of the inputs and outputs."""
        return {
            "inputs": _described(self.inputs, self.last_inputs),
            "outputs": _described(self.outputs, self.last_outputs),
        }


def _described(names: tuple[str, ...], last: tuple[bool, ...]) -> list[dict[str, Any]]:
    return [{"name": name, "channels_last": turned} for name, turned in zip(names, last, strict=True)]


def tflite_model(network: Network) -> tuple[bytes, Layout]:
    """Convert a network to an fp32 TFLite flatbuffer for one example.

    LiteRT's convolutions want the channels last. Where the file's 4-D inputs and outputs have them there too, the converter
    moves the change of layout out of the graph; otherwise every convolution would sit between two transposes. 64-bit
    integers become 32-bit.

    Raises:
        Exception: whatever the converter raises; `edgepress.targets.export.export` turns it into a sentence.
    """
    with silence():
        import litert_torch
    one = tuple(x[:1].detach().cpu() for x in network.example_inputs)
    module = _tiling(_broadcasting(network.copy().to("cpu").eval().module))
    with torch.no_grad():
        results = [x for x in pytree.tree_leaves(module(*_pair(one))) if isinstance(x, Tensor)]
    names, output_names = port_names(export_program(network))
    layout = Layout(
        tuple(names),
        tuple(output_names),
        tuple(_is_image(x) for x in one),
        tuple(_is_image(x) for x in results),
        _numbered(module),
        frozenset(name.rpartition(".")[0] for name, p in module.named_parameters() if p.dim() > 1),
    )
    wrapped = _FileOrder(module, tuple(x.dtype for x in one), layout)
    feeds = tuple(_file_order(x, last) for x, last in zip(one, layout.last_inputs, strict=True))
    with silence():
        content = bytes(litert_torch.convert(wrapped, feeds).model_content())
    return content, layout


def _broadcasting(module: fx.GraphModule) -> fx.GraphModule:
    """Take expansions out of a graph, in place: where the converter moves channels to the end, it leaves their sizes.

    Those that arithmetic implies go; others become repetitions.
    """
    aten = torch.ops.aten
    arithmetic = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
    for node in list(module.graph.nodes):
        if node.target not in (aten.expand.default, aten.expand_as.default):
            continue
        source, full = node.args[0], node.meta["val"].shape
        for user in list(node.users):
            other = [x for x in user.args[:2] if isinstance(x, fx.Node) and x is not node] if user.target in arithmetic else []
            if other and other[0].meta["val"].shape == full and source.meta["val"].dim() == len(full):
                user.replace_input_with(node, source)
        if node.target is aten.expand.default:
            node.target, node.args = aten.repeat.default, (source, _repeats(source.meta["val"].shape, node.args[1]))
    for node in module.graph.nodes:
        if node.target in (aten.repeat.default, aten.tile.default) and node.meta["val"].dim() > _REPEATED_RANK:
            node.target = _repeated
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _repeats(shape: torch.Size, sizes: list[Any]) -> list[Any]:
    """How often `aten.repeat` lays each dimension down where `aten.expand` makes it that long."""
    given = [1] * (len(sizes) - len(shape)) + list(shape)
    return [size if isinstance(old, int) and old == 1 and size != -1 else 1 for old, size in zip(given, sizes, strict=True)]


def _repeated(x: Tensor, counts: list[int]) -> Tensor:
    """`x.tile(counts)` as repetitions of a matrix: one dimension at a time, all before it against all from it on.

    The converter repeats in twice as many dimensions as the tensor has, and the format's operators end at eight: beyond, it
    fails, or gives other numbers.

    Example:
        >>> _repeated(torch.arange(2), [2, 3])
        tensor([[0, 1, 0, 1, 0, 1],
                [0, 1, 0, 1, 0, 1]])
    """
    shape = [1] * (len(counts) - x.dim()) + list(x.shape)
    for i, count in enumerate(counts, len(shape) - len(counts)):
        if count != 1:
            x = x.reshape(math.prod(shape[:i]), math.prod(shape[i:])).repeat(1, count)
            shape[i] *= count
    return x.reshape(shape)


def _tiling(module: fx.GraphModule) -> fx.GraphModule:
    """Put `_tiled` in the place of folds without overlap, in place: LiteRT cannot run the scatter that they become."""
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.col2im.default):
        _, size, kernel, dilation, padding, stride = node.args
        if list(kernel) == list(stride) and not any(padding) and set(dilation) == {1} and not _rests(size, kernel):
            node.target, node.args = _tiled, (node.args[0], size, kernel)
    module.recompile()
    return module


def _rests(size: list[int], kernel: list[int]) -> bool:
    return any(length % step for length, step in zip(size, kernel, strict=True))


def _tiled(x: Tensor, size: list[int], kernel: list[int]) -> Tensor:
    """`torch.nn.functional.fold` of tiles ``[N, C * kh * kw, L]`` that lie side by side: ``[N, C, *size]``.

    Example:
        >>> _tiled(torch.arange(8).view(1, 4, 2), [2, 4], [2, 2])
        tensor([[[[0, 2, 1, 3],
                  [4, 6, 5, 7]]]])
    """
    rows, columns = size[0] // kernel[0], size[1] // kernel[1]
    tiles = x.reshape(x.shape[0], -1, *kernel, rows, columns)
    return tiles.permute(0, 1, 4, 2, 5, 3).reshape(x.shape[0], -1, *size)


def _pair(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat([x, x]) for x in inputs)


def _is_image(value: Tensor) -> bool:
    return value.dim() == 4 and value.is_floating_point()


def _file_order(value: Tensor, last: bool) -> Tensor:
    value = value.int() if value.dtype == torch.int64 else value
    return value.permute(0, 2, 3, 1).contiguous() if last else value


class _FileOrder(nn.Module):
    """The network with its inputs and outputs as the file has them."""

    def __init__(self, module: fx.GraphModule, dtypes: tuple[torch.dtype, ...], layout: Layout):
        super().__init__()
        self.module, self.dtypes, self.layout = module, dtypes, layout
        self.training = False

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        inner = [
            (x.permute(0, 3, 1, 2) if last else x).to(dtype)
            for x, dtype, last in zip(inputs, self.dtypes, self.layout.last_inputs, strict=True)
        ]
        with traceback.preserve_node_meta():  # the user's modules: the converter names tensors after them
            results = fx.Interpreter(self.module).run(*inner)
        leaves = [x for x in pytree.tree_leaves(results) if isinstance(x, Tensor)]
        return tuple(_file_order(x, last) for x, last in zip(leaves, self.layout.last_outputs, strict=True))

    def train(self, mode: bool = True) -> _FileOrder:  # an exported module refuses to be switched; it is in evaluation mode
        return self


def fed_ports(content: bytes, layout: Layout) -> tuple[Port, ...]:
    """The inputs of an annotated model, as a quantizer has to feed them."""
    from ai_edge_litert import schema_py_generated as schema

    graph = schema.ModelT.InitFromPackedBuf(content, 0).subgraphs[0]
    return tflite_ports(graph, graph.inputs, layout.notes["inputs"])


# ---- names and metadata


def annotate_tflite(content: bytes, layout: Layout, notes: dict[str, Any] | None = None) -> bytes:
    """Name the inputs and outputs of a converted model, in its tensors and its signature, and write edgepress's metadata.

    Other tensors get short names, ``layer1.0.conv1#7``: the converter's hold class names, several hundred bytes each.

    Args:
        content: a TFLite flatbuffer with one signature.
        layout: the names, in the network's order.
        notes: the metadata; none is written where it is None.
    """
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    graph, signature = model.subgraphs[0], model.signatureDefs[0]
    labels = _labels(graph, layout)
    for index, tensor in enumerate(graph.tensors):
        tensor.name = f"{labels.get(index, '')}#{index}"
    for body in model.subgraphs[1:]:  # what a reduction over windows computes; the quantizer leaves these names alone
        for index, tensor in enumerate(body.tensors):
            tensor.name = f"{BODY}{index}"
    graph.inputs = _named(graph, signature.inputs, layout.inputs)
    graph.outputs = _named(graph, signature.outputs, layout.outputs)
    model.description = "edgepress"
    for buffer in model.buffers:
        inline(buffer, content)
    pool_slices(model)
    _flat_biases(model)
    if notes is not None:
        text = json.dumps({**notes, **layout.notes}, default=str)
        _attach(model, METADATA_KEY, text.encode())
    return pack(model)


def _flat_biases(model: Any) -> None:
    """Give biases one dimension, in place: with four, as arithmetic behind a layer leaves them, LiteRT takes one scale only."""
    from ai_edge_litert.schema_py_generated import BuiltinOperator as Code

    places = {Code.CONV_2D: 2, Code.DEPTHWISE_CONV_2D: 2, Code.FULLY_CONNECTED: 2, Code.TRANSPOSE_CONV: 3}
    graph = model.subgraphs[0]
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        place = places.get(max(code.builtinCode, code.deprecatedBuiltinCode), len(operator.inputs))
        if place >= len(operator.inputs) or operator.inputs[place] < 0:
            continue
        bias = copy.copy(graph.tensors[operator.inputs[place]])
        if len(bias.shape) > 1:
            bias.shape, bias.name = [int(np.prod(bias.shape))], f"#{len(graph.tensors)}"
            operator.inputs = np.array([*operator.inputs[:place], len(graph.tensors), *operator.inputs[place + 1 :]], np.int32)
            graph.tensors.append(bias)


def _named(graph: Any, ports: list[Any], names: tuple[str, ...]) -> list[int]:
    """Rename the ports of a signature in the order of their numbers (``args_0``, ``args_1``): the tensors in that order."""
    taken = {_plain(port.name): port for port in ports}
    ordered = [taken[name] for name in names] if set(taken) == set(names) else sorted(ports, key=_number)
    for port, name in zip(ordered, names, strict=True):
        port.name = name
        tensor = graph.tensors[port.tensorIndex]
        if "#" in tensor.name:  # an output that is an input, or another output, has its name
            tensor.name = name
    return [port.tensorIndex for port in ordered]


def _numbered(module: fx.GraphModule) -> dict[str, str]:
    """Number the nodes where the converter looks for modules, and return the user's modules by what it calls them then.

    It names tensors after the classes on the way, each with the last part of its name: the same for ``dw.0`` and ``pw.0``.
    """
    found = {}
    for number, node in enumerate(module.graph.nodes):
        if stack := node.meta.get("nn_module_stack"):
            found[f"node_{number}"] = list(stack.values())[-1][0]
            node.meta["nn_module_stack"] = {"": (str(number), "node")}
    return found


def _labels(graph: Any, layout: Layout) -> dict[int, str]:
    """The user's module for what each operator gives, or for its weights where that is an output and has a name already."""
    found: dict[int, str] = {}
    made = {int(i) for i in graph.inputs} | {int(i) for operator in graph.operators for i in operator.outputs}
    for operator in graph.operators:
        outputs = [int(i) for i in operator.outputs]
        inputs = [int(i) for i in (operator.inputs if operator.inputs is not None else ()) if i >= 0]
        weights = [i for i in inputs[1:] if i not in made]
        label = next((m for i in (*outputs, *weights) if (m := _module(_plain(graph.tensors[i].name), layout))), "")
        named = weights if set(outputs) & {int(i) for i in graph.outputs} else outputs
        found.update({index: label for index in named if index not in found})
    return found


def _module(name: str, layout: Layout) -> str:
    """Of a tensor, as we or the converter called it; of several nodes in one operator, the first, or the one with weights.

    Padding runs before the convolution that it becomes a part of; constants bring the nodes along that they were made for.
    """
    if "#" in name:
        return name.rpartition("#")[0]
    parts = sorted({part for part in name.split(";") if part in layout.modules}, key=lambda part: int(part.rpartition("_")[2]))
    found = [module for part in parts if (module := layout.modules[part])]
    return next((module for module in reversed(found) if module in layout.weighted), next(iter(found), ""))


def _plain(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _number(port: Any) -> int:
    return int(_plain(port.name).rpartition("_")[2])


def _attach(model: Any, name: str, data: bytes) -> None:
    from ai_edge_litert import schema_py_generated as schema

    model.metadata = [entry for entry in model.metadata or [] if _plain(entry.name) != name]
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = np.frombuffer(data, np.uint8)
    model.buffers.append(buffer)
    entry.name, entry.buffer = name, len(model.buffers) - 1
    model.metadata.append(entry)


def pack(model: Any) -> bytes:
    """The bytes of a flatbuffer's object tree, buffers aligned as the schema wants them."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    class Aligned(schema.BufferT):  # type: ignore[misc]
        """A buffer whose data starts where the schema wants it."""

        def Pack(self, builder: Any) -> Any:
            data = None if self.data is None else bytes(self.data)
            if data is not None:
                builder.StartVector(1, len(data), _ALIGNMENT)
                builder.head -= len(data)
                builder.Bytes[builder.head : builder.head + len(data)] = data
                data = builder.EndVector()
            schema.BufferStart(builder)
            if data is not None:
                schema.BufferAddData(builder, data)
            schema.BufferAddOffset(builder, self.offset)
            schema.BufferAddSize(builder, self.size)
            return schema.BufferEnd(builder)

    for buffer in model.buffers:
        buffer.__class__ = Aligned
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())
