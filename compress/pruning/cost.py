"""What a network costs as a function of channel counts: what selection pays with, in whichever currency.

Every cost also answers for a network from which graph nodes have gone, as they do with a residual branch that is left out:
``without`` names them. What they cost goes, weights that only they read go, and an addition of what they gave becomes the
identity.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
from torch import fx, nn

from .analysis import Parameter
from .call import Call
from .groups import Channels
from .labels import axis
from .layers import Layer, Step, Steps
from .sizes import Counts, Extent, Sizes

__all__ = ["Clock", "Cost", "FileBytes", "Latency", "Macs", "Parameters", "PeakActivation"]

_BIAS_BYTES = 4  # int8 files hold biases as int32, fp32 files as float32
_FILE_NORM = ("weight", "bias")  # a batch normalisation that folds into nothing is a scale and a shift in the file


class Cost(Protocol):
    """A currency. ``counts`` are the channels left in each group of the `Channels` it was made from."""

    def total(self, counts: Counts, without: Collection[str] = ()) -> Counts:
        """The whole network's cost: ``[G]`` to a number, ``[G, K]`` to ``[K]``."""
        ...

    def after(self, counts: Counts, steps: Counts, without: Collection[str] = ()) -> Counts:
        """For each group, the total with ``steps[g]`` channels less in that group alone: ``[G]``, ``[G]`` to ``[G]``."""
        ...

    def parts(self, counts: Counts, without: Collection[str] = ()) -> dict[str, float]:
        """What each graph node has of the cost; nodes without any are left out."""
        ...


class Clock(Protocol):
    """Knows how long layers take on some target."""

    def seconds(self, layers: Sequence[Layer]) -> Counts:
        """The time of each layer, ``[len(layers)]``; many are asked for at once so that they can be measured side by side."""
        ...


class _Sum:
    """A cost that is a sum of extents, each owned by some nodes and gone when all of its owners are."""

    def __init__(self, sizes: Sizes, terms: Sequence[tuple[Extent, frozenset[str]]]):
        self._values = sizes.function([extent for extent, _ in terms])
        self._owners = [owners for _, owners in terms]

    def total(self, counts: Counts, without: Collection[str] = ()) -> Counts:
        """The whole network's cost: ``[G]`` to a number, ``[G, K]`` to ``[K]``."""
        result: Counts = np.tensordot(self._there(without), self._values(counts), 1)
        return result

    def after(self, counts: Counts, steps: Counts, without: Collection[str] = ()) -> Counts:
        """For each group, the total with ``steps[g]`` channels less in that group alone, ``[G]``."""
        return self.total(counts[:, None] - np.diag(steps), without)

    def parts(self, counts: Counts, without: Collection[str] = ()) -> dict[str, float]:
        """What each graph node has of the cost; a tied weight counts for the first that holds it."""
        found: dict[str, float] = {}
        values = self._values(counts) * self._there(without)
        for owners, value in zip(self._owners, values.tolist(), strict=True):
            if value:
                name = min(owners - set(without))
                found[name] = found.get(name, 0.0) + value
        return found

    def _there(self, without: Collection[str]) -> Counts:
        gone = frozenset(without)
        return np.array([not owners <= gone for owners in self._owners], float)


class Macs(_Sum):
    """The multiply-accumulates of one example.

    Every product of the graph is a factor times the sizes of some axes, and every size is a constant plus, for each group,
    positions per channel times channels. So both sides of a channel count, filters and readers, as selection proceeds.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> from .analysis import analyse
        >>> from .groups import channels_of
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
        >>> macs = Macs(channels_of(analyse(trace(net, torch.zeros(1, 4)))))
        >>> float(macs.total(np.array([6.0]))), float(macs.total(np.array([3.0])))
        (36.0, 18.0)
        >>> float(macs.total(np.array([6.0]), without=["linear_1"]))
        24.0
    """

    def __init__(self, channels: Channels):
        sizes = Sizes(channels)
        super().__init__(sizes, [(sizes.extent(p.axes, p.factor), frozenset([p.node])) for p in channels.analysis.products])


class Parameters(_Sum):
    """The trainable numbers; a tied weight counts once and goes when every node that holds it does.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> from .analysis import analyse
        >>> from .groups import channels_of
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
        >>> cost = Parameters(channels_of(analyse(trace(net, torch.zeros(1, 4)))))
        >>> float(cost.total(np.array([6.0]))), float(cost.after(np.array([6.0]), np.array([2.0]))[0])
        (44.0, 30.0)
    """

    def __init__(self, channels: Channels):
        sizes = Sizes(channels)
        held = _held(channels)
        super().__init__(sizes, [(_numel(sizes, p, 1.0), _names(at)) for p, at in held if isinstance(p.tensor, nn.Parameter)])


class FileBytes(_Sum):
    """The bytes of the weights in the deployed file. Headers, operator names and quantization scales are not counted.

    Matrices and kernels take ``bytes_per_weight``, vectors four bytes a number. A batch normalisation folds: where the layer
    before it has no bias, it leaves one.

    Args:
        channels: the network.
        bytes_per_weight: 4 for fp32, 1 for int8.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> from .analysis import analyse
        >>> from .groups import channels_of
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1, bias=False), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 2, 1))
        >>> cost = FileBytes(channels_of(analyse(trace(net.eval(), torch.zeros(1, 3, 4, 4)))), 1)
        >>> float(cost.total(np.array([8.0]))) == 3 * 8 + 4 * 8 + 8 * 2 + 4 * 2
        True
    """

    def __init__(self, channels: Channels, bytes_per_weight: float):
        steps = Steps.of(channels)
        writer = {name: step for step in steps.steps for name in step.nodes}
        terms = []
        for parameter, at in _held(channels):
            each = _file_bytes(parameter, at, writer, bytes_per_weight)
            if each:
                terms.append((_numel(steps.sizes, parameter, each), _names(at)))
        super().__init__(steps.sizes, terms)


def _held(channels: Channels) -> list[tuple[Parameter, list[fx.Node]]]:
    """Every weight with the graph nodes that fetch it."""
    fetched: dict[str, list[fx.Node]] = {}
    for node in channels.analysis.values:
        if node.op == "get_attr":
            fetched.setdefault(str(node.target), []).append(node)
    return [(p, [n for name in p.names for n in fetched[name]]) for p in channels.analysis.parameters.values()]


def _names(nodes: Sequence[fx.Node]) -> frozenset[str]:
    return frozenset(n.name for n in nodes)


def _numel(sizes: Sizes, parameter: Parameter, each: float) -> Extent:
    return sizes.extent([axis(len(ids), ids) for ids in parameter.labels], each)


def _file_bytes(parameter: Parameter, at: Sequence[fx.Node], writer: dict[str, Step], bytes_per_weight: float) -> float:
    """Bytes of each number of a weight in the file; what nothing reads is not there."""
    if parameter.tensor.dim() > 1:
        return bytes_per_weight if parameter.tensor.is_floating_point() else parameter.tensor.element_size()
    roles = [_norm_role(reader, node) for node in at for reader in node.users]
    norms = [(reader, role) for reader, role in roles if role]
    if len(norms) < len(roles) or not norms:
        return _BIAS_BYTES if roles else 0
    reader, role = norms[0]
    step = writer.get(reader.name)
    if step is None or step.node == reader.name:
        return _BIAS_BYTES if role in _FILE_NORM else 0
    return _BIAS_BYTES if role == "bias" and not _biased(reader, step) else 0


def _norm_role(reader: fx.Node, weight: fx.Node) -> tuple[fx.Node, str]:
    """The argument that a batch normalisation takes a weight as; '' for other readers."""
    call = Call(reader)
    names = ("weight", "bias", "running_mean", "running_var")
    return reader, next((n for n in names if call.name == "batch_norm" and call[n] is weight), "")


def _biased(norm: fx.Node, step: Step) -> bool:
    """Whether the layer that a normalisation folds into has a bias of its own."""
    layer = next(n for n in norm.graph.nodes if n.name == step.node)
    return Call(layer).get("bias") is not None


class PeakActivation:
    """The most bytes of activations that are alive at once for one example, over the steps in graph order.

    What is fused into a step is never written. A runtime may do worse: it packs, pads and keeps scratch buffers.

    Args:
        channels: the network.
        bytes_per_value: 4 for fp32, 1 for int8.
        order: the norm that is taken over the steps. The peak is that of infinite order; one that several steps share does not
            fall when one of them shrinks, while a norm of finite order does: `select` is guided by it.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> from .analysis import analyse
        >>> from .groups import channels_of
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1))
        >>> peak = PeakActivation(channels_of(analyse(trace(net, torch.zeros(1, 3, 4, 4)))), 4)
        >>> float(peak.total(np.array([8.0]))) == 4 * 16 * (3 + 8), float(peak.total(np.array([4.0]))) == 4 * 16 * (3 + 4)
        (True, True)
    """

    def __init__(self, channels: Channels, bytes_per_value: float, order: float = math.inf):
        self._steps = Steps.of(channels)
        self._bytes = bytes_per_value
        self._order = order
        self._sizes = self._steps.sizes.function([e for step in self._steps.steps for e in step.written])
        self._owner = np.array([i for i, step in enumerate(self._steps.steps) for _ in step.written], int)
        self._output = frozenset(n.name for n in channels.analysis.values if any(u.op == "output" for u in n.users))
        self._alive: dict[frozenset[str], Counts] = {}

    def total(self, counts: Counts, without: Collection[str] = ()) -> Counts:
        """The peak in bytes: ``[G]`` to a number, ``[G, K]`` to ``[K]``."""
        result: Counts = np.linalg.norm(self._table(without) @ self._values(counts), self._order, axis=0)
        return result

    def after(self, counts: Counts, steps: Counts, without: Collection[str] = ()) -> Counts:
        """For each group, the peak with ``steps[g]`` channels less in that group alone, ``[G]``."""
        return self.total(counts[:, None] - np.diag(steps), without)

    def parts(self, counts: Counts, without: Collection[str] = ()) -> dict[str, float]:
        """The bytes that are alive at the peak, by the node that wrote them."""
        table, values = self._table(without), self._values(counts)
        alive = table[np.argmax(table @ values)] * values
        return {step.node: float(b) for step, b in zip(self._steps.steps, alive, strict=True) if b}

    def _values(self, counts: Counts) -> Counts:
        """Bytes that each step writes, ``[S]`` or ``[S, K]``."""
        sizes = self._sizes(counts) * self._bytes
        written = np.zeros((len(self._steps.steps), *counts.shape[1:]))
        np.add.at(written, self._owner, sizes)
        return written

    def _table(self, without: Collection[str]) -> Counts:
        gone = frozenset(without)
        if gone not in self._alive:
            self._alive[gone] = _lifetimes(self._steps.steps, gone, self._output)
        return self._alive[gone]


def _lifetimes(steps: Sequence[Step], gone: frozenset[str], outputs: frozenset[str]) -> Counts:
    """``[T, S]``: 1 where what step ``s`` wrote is alive while step ``t`` runs."""
    writer: dict[str, int] = {}
    last = list(range(len(steps)))
    for i, step in enumerate(steps):
        read = [writer[n] for n in step.operands if n in writer and n not in gone]
        passed = step.gone(gone) and step.node not in gone and read
        for j in read:
            last[j] = max(last[j], i)
        if step.node not in gone:
            writer.update(dict.fromkeys(step.nodes, read[0] if passed else i))
    for name in outputs & writer.keys():
        last[writer[name]] = len(steps) - 1
    table = np.zeros((len(steps), len(steps)))
    for i, step in enumerate(steps):
        if not step.gone(gone):
            table[i : last[i] + 1, i] = 1
    return table


class Latency:
    """Seconds of one run on a target, as the sum of what its clock says for each layer.

    A layer is asked for once for each of its sizes. Where a branch is left out, its addition is the identity, and an activation
    behind that counts as free: it fuses, or follows one that did the same.

    Args:
        channels: the network.
        clock: times of layers on the target.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> from .analysis import analyse
        >>> from .groups import channels_of
        >>> class Blocks:
        ...     def seconds(self, layers):
        ...         return np.array([-(-x.output[0] // 16) if x.output else 0 for x in layers], float)
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 1), torch.nn.Conv2d(32, 8, 1))
        >>> latency = Latency(channels_of(analyse(trace(net, torch.zeros(1, 3, 4, 4)))), Blocks())
        >>> [float(latency.total(np.array([n]))) for n in (32.0, 24.0, 16.0)]
        [4.0, 4.0, 3.0]
    """

    def __init__(self, channels: Channels, clock: Clock):
        self._steps = Steps.of(channels)
        self._clock = clock
        self._sizes = self._steps.sizes.function([e for step in self._steps.steps for e in step.extents])
        ends = np.cumsum([len(step.extents) for step in self._steps.steps])
        self._slices = [slice(end - len(s.extents), end) for s, end in zip(self._steps.steps, ends.tolist(), strict=True)]
        self._known: list[dict[bytes, float]] = [{} for _ in self._steps.steps]
        self._touching: list[list[int]] = [[] for _ in channels.groups]
        for i, step in enumerate(self._steps.steps):
            for group in self._steps.sizes.groups(step.extents):
                self._touching[group].append(i)

    def total(self, counts: Counts, without: Collection[str] = ()) -> Counts:
        """Seconds of one run: ``[G]`` to a number, ``[G, K]`` to ``[K]``."""
        there = self._there(without)
        choices = counts.reshape(len(counts), -1)
        every = [(k, i) for k in range(choices.shape[1]) for i in there]
        seconds = np.bincount([k for k, _ in every], self._seconds(choices, every), choices.shape[1])
        result: Counts = seconds.astype(float).reshape(counts.shape[1:])
        return result

    def after(self, counts: Counts, steps: Counts, without: Collection[str] = ()) -> Counts:
        """For each group, the total with ``steps[g]`` channels less in that group alone, ``[G]``."""
        there = set(self._there(without))
        touched = [(g, i) for g, step in enumerate(steps) if step for i in self._touching[g] if i in there]
        saved = self._seconds(counts[:, None], [(0, i) for _, i in touched])
        saved -= self._seconds(counts[:, None] - np.diag(steps), touched)
        result: Counts = self.total(counts, without) - np.bincount([g for g, _ in touched], saved, len(steps))
        return result

    def parts(self, counts: Counts, without: Collection[str] = ()) -> dict[str, float]:
        """Seconds by the node that each step comes from."""
        there = self._there(without)
        seconds = self._seconds(counts[:, None], [(0, i) for i in there])
        return {self._steps.steps[i].node: float(s) for i, s in zip(there, seconds, strict=True)}

    def _there(self, without: Collection[str]) -> list[int]:
        gone = frozenset(without)
        return [i for i, step in enumerate(self._steps.steps) if not step.gone(gone)]

    def _seconds(self, choices: Counts, wanted: Sequence[tuple[int, int]]) -> Counts:
        """The time of step ``i`` at ``choices[:, k]`` for each ``(k, i)`` wanted; what is new is asked for in one go."""
        values = np.rint(self._sizes(choices)).astype(np.int64)
        columns = np.ascontiguousarray(values.T)
        keys = [columns[k, self._slices[i]].tobytes() for k, i in wanted]
        new = {(i, key): k for (k, i), key in zip(wanted, keys, strict=True) if key not in self._known[i]}
        if new:
            layers = [self._steps.steps[i].at(columns[k, self._slices[i]]) for (i, _), k in new.items()]
            for (i, key), seconds in zip(new, self._clock.seconds(layers), strict=True):
                self._known[i][key] = float(seconds)
        return np.array([self._known[i][key] for (_, i), key in zip(wanted, keys, strict=True)], float)
