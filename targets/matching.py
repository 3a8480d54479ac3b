"""Which tensor of a deployed file is which node of the network: told by their values, since converters rename and rearrange."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from edgepress.compress.fake import module_of
from edgepress.compress.network import Network
from edgepress.compress.quantize import trained_ranges

__all__ = ["Divergence", "deployed_ranges", "divergence", "matched"]

_TOLERANCE = 1e-3  # of the values' root mean square: converters and kernels sum in other orders

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Divergence:
    """How far a quantized file is from the float file at one tensor.

    Attributes:
        tensor: its name in the files.
        node: the graph node that computes it.
        module: the user's module that the node belongs to, ``layer1.0.conv1``, or else that of what it reads: a file has a
            functional activation fused into the layer before. '' where none is known.
        snr_db: power of the signal over that of the error, in decibels; infinite where there is no error.
    """

    tensor: str
    node: str
    module: str
    snr_db: float


def matched(network: Network, inputs: Sequence[Floats], values: Mapping[str, Floats]) -> dict[str, str]:
    """The graph node that computes each float tensor of a deployed file.

    A file transposes, renames and fuses, so neither names nor shapes say which is which; the values do, whatever their order.

    Args:
        network: that the file was written from.
        inputs: arrays ``[N, ...]`` as the network takes them: typical data, of few examples; one is enough.
        values: what the file's tensors hold for the same examples, by name: of `onnx_tensors` or `tflite_tensors`.

    Returns:
        names of tensors to names of nodes, the earliest that fits; a tensor that no node gives, or that holds one value only,
        is left out.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> network, x = trace(torch.nn.Hardtanh(), torch.zeros(1, 2, 3)), np.float32([[[-2, 0.5, 3], [0.1, 0, 9]]])
        >>> matched(network, [x], {"turned": np.clip(x, -1, 1).transpose(0, 2, 1), "other": x + 1})
        {'turned': 'hardtanh'}
    """
    return {tensor: nodes[0] for tensor, nodes in _candidates(network, inputs, values).items()}


def deployed_ranges(network: Network, inputs: Sequence[Floats], values: Mapping[str, Floats]) -> dict[str, tuple[float, float]]:
    """The ranges that `Quantize` trained, by the file's names for its tensors: what the writers take as ``ranges``.

    Args:
        network: from `Quantize`; of another, there are none.
        inputs: as in `matched`.
        values: as in `matched`.

    Returns:
        (lowest, highest) in the tensor's unit. Tensors that training did not round are left out.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> x, found = np.float32([[-2, 0.5]]), {"ranges": {"relu": [0.0, 4.0]}}
        >>> network = trace(torch.nn.ReLU(), torch.zeros(1, 2)).then(**{"pass": "Quantize"}, found=found)
        >>> deployed_ranges(network, [x], {"result": x.clip(0)})
        {'result': (0.0, 4.0)}
    """
    trained = trained_ranges(network)
    if not trained:
        return {}
    found = {}
    for tensor, nodes in _candidates(network, inputs, values).items():
        node = next((node for node in nodes if node in trained), None)
        if node is not None:
            found[tensor] = trained[node]
    return found


def divergence(
    network: Network, inputs: Sequence[Floats], values: Mapping[str, Floats], quantized: Mapping[str, Floats]
) -> list[Divergence]:
    """How far a quantized file has gone from the float file at every tensor that a node of the network computes.

    Args:
        network: that both files were written from.
        inputs: as in `matched`.
        values: of the float file's tensors for these inputs, by name.
        quantized: of the quantized file's, in real numbers, by the same names; those that it lacks are left out.

    Returns:
        one for each tensor, in the order in which the network computes them: the first with a low ratio is where to look.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> network, x = trace(torch.nn.Sequential(torch.nn.Tanh()), torch.zeros(1, 2)), np.float32([[1, -2]])
        >>> found = divergence(network, [x], {"y": np.tanh(x)}, {"y": np.tanh(x) * 1.01})
        >>> [(d.tensor, d.node, d.module, round(d.snr_db)) for d in found]
        [('y', 'tanh', '0', 40)]
    """
    order = {node.name: i for i, node in enumerate(network.module.graph.nodes)}
    modules: dict[str, str] = {}
    for node in network.module.graph.nodes:
        modules[node.name] = module_of(node) or next((modules[n.name] for n in node.all_input_nodes if modules[n.name]), "")
    found = [
        Divergence(tensor, node, modules[node], _snr_db(values[tensor], quantized[tensor]))
        for tensor, node in matched(network, inputs, values).items()
        if tensor in quantized and quantized[tensor].shape == values[tensor].shape
    ]
    return sorted(found, key=lambda d: order[d.node])


def _snr_db(signal: Floats, noisy: Floats) -> float:
    power = float(np.square(signal, dtype=np.float64).sum())
    noise = float(np.square(noisy.astype(np.float64) - signal).sum())
    if not noise:
        return math.inf
    return 10 * math.log10(power / noise) if power else -math.inf


def _candidates(network: Network, inputs: Sequence[Floats], values: Mapping[str, Floats]) -> dict[str, list[str]]:
    """Of each tensor the nodes with the same values, in graph order; tensors without any are left out."""
    recorder = _Recorder(network.copy().eval().module)
    with torch.inference_mode():
        recorder.run(*(torch.from_numpy(np.ascontiguousarray(x)).to(network.device) for x in inputs))
    nodes: dict[int, list[tuple[str, Floats]]] = {}
    for name, value in recorder.values.items():
        nodes.setdefault(value.size, []).append((name, value))
    found = {}
    for tensor, value in values.items():
        if value.dtype.kind != "f" or not value.size or not np.isfinite(value).all():
            continue
        given = np.sort(value, axis=None).astype(np.float32)
        same = [name for name, own in nodes.get(given.size, []) if _same(given, own)]
        if same and given[0] != given[-1]:
            found[tensor] = same
    return found


def _same(a: Floats, b: Floats) -> bool:
    """Whether two sorted arrays of one length hold the same values, up to what rounding changes."""
    allowed = _TOLERANCE * float(np.sqrt(np.mean(np.square(a)))) + 1e-12
    if abs(a[0] - b[0]) > allowed or abs(a[-1] - b[-1]) > allowed or abs(a[a.size // 2] - b[b.size // 2]) > allowed:
        return False
    return bool(np.abs(a - b).max() <= allowed)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the sorted values of every float node that depends on an input."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.values: dict[str, Floats] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and keep what it gave."""
        value = super().run_node(n)
        if n.op in ("placeholder", "call_function") and isinstance(value, Tensor) and value.is_floating_point():
            self.values[n.name] = np.sort(value.float().cpu().numpy(), axis=None)
        return value
