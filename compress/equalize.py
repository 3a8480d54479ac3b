"""Equalize: scales moved from one layer's outputs into the next layer's weights, so that both quantize better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from .errors import RecipeError
from .fold import folded
from .layerwise import examples, kind
from .network import Network
from .passes import describe
from .task import Task

__all__ = ["Equalize", "Pair", "migration", "pairs", "weight_equalization"]

_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_HOMOGENEOUS = {  # f(s x) = s f(x) for s > 0, position by position of the channels
    "relu", "leaky_relu", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "dropout", "contiguous", "clone", "relu_",
}  # fmt: skip
_LIMIT = 100.0


@dataclass(frozen=True)
class Pair:
    """Channels that one operator makes and others multiply with weights.

    Attributes:
        outputs: names of what makes them, channels along dim 0: a layer's weight and bias, or those of a layer normalisation.
        inputs: (name of a weight that multiplies them, its dim of input channels).
        made: the node that gives them to the consumers.
    """

    outputs: tuple[str, ...]
    inputs: tuple[tuple[str, int], ...]
    made: fx.Node


@dataclass(frozen=True)
class Equalize:
    """Fold batch normalisation, then move scales over each pair of layers that only positive-homogeneous operators lie between.

    The network computes what it did. Its files differ: channels of unlike ranges share a scale in an int8 activation.

    Args:
        method: ``'weights'``: ranges of a channel's weights on both sides become equal (cross-layer equalization, Nagel et al.
            2019, https://arxiv.org/abs/1906.04721, section 4.1), without data; ``'activations'``: part of a channel's activation
            range moves into the weights that read it (SmoothQuant, Xiao et al. 2023, https://arxiv.org/abs/2211.10438,
            equation 4), also from layer normalisations.
        strength: of ``'activations'``: 0 moves nothing of the activations' ranges, 1 all; the paper's alpha.
        batches: of training data that ``'activations'`` looks at.

    Raises:
        RecipeError: a setting that makes no sense.

    Example:
        >>> import torch
        >>> from .network import trace
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2)), torch.randn(4, 2)
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.tensor([[8.0, 0.0], [0.0, 0.5]]))
        ...     _ = model[2].weight.copy_(torch.tensor([[2.0, 2.0], [2.0, 2.0]]))
        >>> network = trace(model, x)
        >>> equal = Equalize()(network, Task(model, x, lambda predict: {"score": 0.0}, "score"))
        >>> equal.module.get_parameter("0.weight").data, bool(torch.allclose(equal(x), network(x), atol=1e-6))
        (tensor([[4., 0.],
                [0., 1.]]), True)
    """

    method: Literal["weights", "activations"] = "weights"
    strength: float = 0.5
    batches: int = 4

    def __post_init__(self) -> None:
        if self.method not in ("weights", "activations"):
            raise RecipeError(f"Equalize(method='{self.method}') makes no sense: take weights or activations.")
        if not 0 <= self.strength <= 1:
            raise RecipeError(f"Equalize(strength={self.strength}) makes no sense: it lies between 0 and 1.")
        if not isinstance(self.batches, int) or self.batches < 1:
            raise RecipeError(f"Equalize(batches={self.batches!r}) makes no sense: it is a whole number of at least 1.")

    def __call__(self, network: Network, task: Task) -> Network:
        """Return the equalized network in evaluation mode; ``network`` stays as it was."""
        equal = folded(network)
        found = list(pairs(equal))
        with torch.no_grad():
            if self.method == "activations":
                seen = _ranges(equal, {p.made for p in found}, examples(equal, task, self.batches))
                for pair in found:
                    weights = torch.stack([_ends(equal, name, dim) for name, dim in pair.inputs]).amax(0)
                    _move(equal, pair, migration(seen[pair.made], weights, self.strength))
            else:
                convolved = [p for p in found if len(p.inputs) == 1 and "layer_norm" not in kind(p.made)]
                for _ in range(10 if convolved else 0):  # a weight in the middle of a chain belongs to two pairs
                    for pair in convolved:
                        _move(equal, pair, weight_equalization(_ends(equal, pair.outputs[0], 0), _ends(equal, *pair.inputs[0])))
        return equal.then(**{"pass": "Equalize"}, **describe(self), found={"pairs": [p.outputs[0] for p in found]})


def weight_equalization(made: Tensor, read: Tensor) -> Tensor:
    """What each channel is divided by: ``sqrt(r1 / r2)`` of the largest weights that make it and that read it, ``[C]`` each.

    Example:
        >>> weight_equalization(torch.tensor([8.0, 0.5]), torch.tensor([2.0, 2.0]))
        tensor([2.0000, 0.5000])
    """
    return _sane((made / read).sqrt())


def migration(activations: Tensor, weights: Tensor, strength: float) -> Tensor:
    """What each channel is divided by: ``max|X|^a / max|W|^(1 - a)``, ``[C]`` each.

    Example:
        >>> migration(torch.tensor([16.0, 1.0]), torch.tensor([1.0, 1.0]), 0.5)
        tensor([4., 1.])
    """
    return _sane(activations**strength / weights ** (1 - strength))


def _sane(factor: Tensor) -> Tensor:
    """Channels that are always zero, or that nothing reads, stay; none moves by more than two orders of magnitude."""
    usable = factor.isfinite() & (factor > 0)
    return torch.where(usable, factor, torch.ones_like(factor)).clamp(1 / _LIMIT, _LIMIT)


def pairs(network: Network) -> Iterator[Pair]:
    """All channels whose scale can move: one maker, then positive-homogeneous operators, then only layers with weights.

    Args:
        network: with its batch normalisations folded.
    """
    for node in network.module.graph.nodes:
        outputs = _made(node)
        if not outputs:
            continue
        last = kind(node) in ("linear", "layer_norm")
        ends = list(_consumers(node, last))
        inputs = {_reader(before, end, last, network) for before, end in ends}
        if ends and len(inputs) == len(ends) and all(i is not None and _reads_once(network, i[0]) for i in inputs):
            yield Pair(outputs, tuple(sorted(i for i in inputs if i)), ends[0][0])


def _made(node: fx.Node) -> tuple[str, ...]:
    """The weights of a layer that makes channels, where no other node reads them."""
    name = kind(node)
    at = 1 if name in _CONVOLUTIONS | {"linear"} else 2 if name == "layer_norm" else 0
    if not at or (name == "layer_norm" and len(node.args[1]) != 1):  # type: ignore[arg-type]
        return ()
    held = [a for a in node.args[at : at + 2] if isinstance(a, fx.Node)]
    whole = len(held) == sum(a is not None for a in node.args[at : at + 2]) and held
    return tuple(str(a.target) for a in held) if whole and all(a.op == "get_attr" and len(a.users) == 1 for a in held) else ()


def _consumers(node: fx.Node, last: bool) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(what feeds it, what no scale passes) of everything behind a node; ``last``: channels are along the last axis."""
    for user in node.users:
        name = kind(user)
        if name in _HOMOGENEOUS and not (last and "pool" in name):
            yield from _consumers(user, last)
        else:
            yield node, user


def _reader(node: fx.Node, user: fx.Node, last: bool, network: Network) -> tuple[str, int] | None:
    """The weight that multiplies the channels, and its dim of them; None where it is no such layer."""
    weight = user.args[1] if kind(user) in _CONVOLUTIONS | {"linear"} else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or user.args[0] is not node or last != (kind(user) == "linear"):
        return None
    shape = network.module.get_parameter(str(weight.target)).shape
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    groups = int((dict(zip(names, user.args, strict=False)) | user.kwargs).get("groups", 1))  # type: ignore[arg-type]
    if groups == 1:
        return str(weight.target), 1
    return (str(weight.target), 0) if groups == shape[0] and shape[1] == 1 else None  # depthwise: one row for each channel


def _reads_once(network: Network, name: str) -> bool:
    return sum(n.op == "get_attr" and n.target == name and len(n.users) for n in network.module.graph.nodes) == 1


def _ends(network: Network, name: str, dim: int) -> Tensor:
    """The largest absolute weight of each channel along a dim."""
    weight = network.module.get_parameter(name)
    return weight.movedim(dim, 0).flatten(1).abs().amax(1) if weight.dim() > 1 else weight.abs()


def _move(network: Network, pair: Pair, factor: Tensor) -> None:
    for name in pair.outputs:
        value = network.module.get_parameter(name)
        value.div_(factor.view(-1, *[1] * (value.dim() - 1)))
    for name, dim in pair.inputs:
        value = network.module.get_parameter(name)
        value.mul_(factor.view(*[-1 if i == dim else 1 for i in range(value.dim())]))


def _ranges(network: Network, nodes: set[fx.Node], inputs: tuple[Tensor, ...]) -> Mapping[fx.Node, Tensor]:
    """The largest absolute value of each channel that these nodes give."""
    found: dict[fx.Node, Tensor] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n in nodes:
                last = any(kind(user) == "linear" for user in n.users)
                found[n] = value.movedim(-1 if last else 1, 0).flatten(1).abs().amax(1)
            return value

    Watch(network.module).run(*inputs)
    return found
