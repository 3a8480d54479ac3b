"""Inner tensors of two networks, matched by the names of the user's modules: what feature distillation compares.

A module's name survives pruning, shortening, saving and loading; a graph node's name does not (``relu_11`` is another layer
once a block is gone). Tensors are looked at while the network runs, by nodes put into its graph that are taken out again, so
that the weights are the network's own and one pass serves both.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import losses
from .errors import RecipeError
from .network import Network

__all__ = ["FEATURES", "Features", "Place", "compared", "matched", "places", "projections", "watched"]

aten = torch.ops.aten

Features = Literal["none", "hints", "attention", "similarity", "relational"]
FEATURES = {"hints": 1.0, "attention": 1000.0, "similarity": 3000.0, "relational": 1.0}
"""How inner tensors are compared, and with what weight where none is given: those of the authors' code, but for hints."""

_MOST = 4
"""Layers that are compared where nothing gets smaller on the way, as in a transformer."""

_CHANNELS_SECOND = {
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding),
    *(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
    *(aten.batch_norm.default, aten.instance_norm.default, aten.group_norm.default),
}
_CHANNELS_LAST = {aten.linear.default, aten.layer_norm.default, aten.rms_norm.default, aten.embedding.default, aten.lstm.input}


@dataclass(frozen=True)
class Place:
    """Where a module's output stands.

    Attributes:
        module: name of the user's module; its second call has '@1' behind it.
        node: the graph node.
        shape: of one example.
        axis: of the channels, the batch counted: 1, or the last.
    """

    module: str
    node: str
    shape: tuple[int, ...]
    axis: int

    @property
    def width(self) -> int:
        """How many channels there are."""
        return self.shape[self.axis - 1]

    @property
    def positions(self) -> tuple[int, ...]:
        """The shape without batch and channels."""
        return self.shape[: self.axis - 1] + self.shape[self.axis :]


def places(network: Network) -> dict[str, Place]:
    """The modules with one output of two or more dimensions, batch first, in the order in which they end.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
        >>> [(p.module, p.shape, p.axis) for p in places(trace(model, torch.zeros(1, 3, 8, 8))).values()]
        [('0', (4, 6, 6), 1), ('1', (4, 6, 6), 1), ('2', (144,), 1)]
    """
    nodes = list(network.module.graph.nodes)
    inside = {node: _modules(node) for node in nodes}
    batch = next((str(node.meta["val"].shape[0]) for node in nodes if node.op == "placeholder"), "")
    ends: dict[str, list[fx.Node]] = {}
    shapes = {node: shape for node in nodes if (shape := _shape(node, batch))}
    for node in shapes:
        for module in inside[node]:
            if any(_reads(user) and module not in inside[user] for user in node.users):
                ends.setdefault(module, []).append(node)
    order = {node: i for i, node in enumerate(nodes)}
    alone = sorted(((m, found[0]) for m, found in ends.items() if len(found) == 1), key=lambda e: (order[e[1]], -len(e[0])))
    return {module: Place(module, node.name, shapes[node], _channel_axis(node, len(shapes[node]))) for module, node in alone}


def matched(student: Network, teacher: Network, layers: str = "", *, same_positions: bool = True) -> list[tuple[Place, Place]]:
    """Which tensors of the student are compared with which of the teacher.

    Args:
        student: the network that is trained.
        teacher: the network it follows.
        layers: names of modules, 'layer2, layer3'; 'mine=theirs' where they are called differently. Where empty, of the modules
            that both have: the outermost that ends last before each reduction of height and width (the stages of a residual
            network), or some of the numbered layers where nothing is reduced.
        same_positions: whether height and width, or length, must be the same in both.

    Raises:
        RecipeError: there is no such module, the shapes do not fit, or the two have nothing in common.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> def net(width):
        ...     body = torch.nn.Sequential(torch.nn.Conv2d(3, width, 3), torch.nn.MaxPool2d(2), torch.nn.Conv2d(width, 8, 3))
        ...     return trace(torch.nn.Sequential(body, torch.nn.Flatten()), torch.zeros(1, 3, 8, 8))
        >>> [(mine.module, mine.width, theirs.width) for mine, theirs in matched(net(4), net(6))]
        [('0.0', 4, 6), ('0.1', 4, 6)]
    """
    mine, theirs = places(student), places(teacher)
    if layers.strip():
        return [_named(item, mine, theirs, same_positions) for item in layers.split(",")]
    common = [m for m, p in mine.items() if m in theirs and _alike(p, theirs[m])]
    chosen = _stages([theirs[m] for m in theirs if m in common])
    if not chosen:
        raise RecipeError(
            "The student and the teacher have no module of the same name whose outputs are alike: say which to compare, "
            f"layers: 'mine=theirs'. The student has {_some(mine)}; the teacher has {_some(theirs)}."
        )
    return [(mine[p.module], p) for p in chosen]


@contextlib.contextmanager
def watched(network: Network, at: Sequence[Place]) -> Iterator[dict[str, Tensor]]:
    """Inside, each run of ``network`` leaves the tensors at these places in the dict, by module; then the graph is as before.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> network = trace(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()), torch.zeros(1, 4))
        >>> with watched(network, [places(network)["0"]]) as seen:
        ...     torch.equal(network(torch.ones(2, 4)), seen["0"].relu())
        True
    """
    seen: dict[str, Tensor] = {}

    def look(module: str, value: Tensor) -> None:
        seen[module] = value

    graph = network.module.graph
    nodes = {node.name: node for node in graph.nodes}
    for place in at:
        with graph.inserting_after(nodes[place.node]):
            graph.call_function(look, (place.module, nodes[place.node]))
    network.module.recompile()
    try:
        yield seen
    finally:
        for node in list(network.module.graph.nodes):
            if node.target is look:
                network.module.graph.erase_node(node)
        network.module.recompile()
        seen.clear()


def projections(pairs: Sequence[tuple[Place, Place]], device: torch.device, seed: int = 0) -> dict[str, nn.Parameter]:
    """One matrix ``[teacher's width, student's width]`` by module for each pair of unequal widths.

    Example:
        >>> narrow, wide = Place("a", "relu", (4, 8, 8), 1), Place("a", "relu", (6, 8, 8), 1)
        >>> {name: tuple(p.shape) for name, p in projections([(narrow, wide), (wide, wide)], torch.device("cpu")).items()}
        {'a': (6, 4)}
    """
    random = torch.Generator().manual_seed(seed)
    return {
        mine.module: nn.Parameter((torch.randn(theirs.width, mine.width, generator=random) / mine.width**0.5).to(device))
        for mine, theirs in pairs
        if mine.width != theirs.width
    }


def compared(
    kind: Features,
    pairs: Sequence[tuple[Place, Place]],
    seen: dict[str, Tensor],
    wanted: dict[str, Tensor],
    projected: dict[str, nn.Parameter],
) -> Tensor:
    """The loss of inner tensors, mean over the pairs.

    Args:
        kind: one of `FEATURES`.
        pairs: from `matched`.
        seen: the student's tensors by module.
        wanted: the teacher's.
        projected: from `projections`, for hints.
    """
    terms = []
    for mine, theirs in pairs:
        a, b = seen[mine.module].movedim(mine.axis, 1), wanted[theirs.module].movedim(theirs.axis, 1)
        if kind == "hints":
            weight = projected.get(mine.module)
            a = a.float() if weight is None else F.linear(a.float().movedim(1, -1), weight).movedim(-1, 1)
            terms.append(losses.feature_hints(a, b))
        elif kind == "attention":
            terms.append(losses.attention_transfer(a, b))
        elif kind == "similarity":
            terms.append(losses.similarity_preserving(a, b))
        else:
            terms.append(losses.relational(a, b))
    return torch.stack(terms).mean()


# ---- the graph


def _modules(node: fx.Node) -> set[str]:
    """Names of the user's modules around a node, other calls than the first with their number."""
    stack = node.meta.get("nn_module_stack") or {}
    return {path + (re.search(r"@\d+$", key) or [""])[0] for key, (path, _) in stack.items() if path and not path.startswith("_")}


def _reads(user: fx.Node) -> bool:
    """Whether a node takes more of a tensor than its size."""
    return user.op == "output" or (user.op == "call_function" and not isinstance(user.meta.get("val"), torch.SymInt | int))


def _shape(node: fx.Node, batch: str) -> tuple[int, ...]:
    """Of one example; empty where it is no tensor of real numbers with the batch first and fixed sizes behind."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2 or str(value.shape[0]) != batch:
        return ()
    return tuple(value.shape[1:]) if all(isinstance(n, int) for n in value.shape[1:]) else ()


def _channel_axis(node: fx.Node, last: int) -> int:
    """By the nearest layer behind it along first operands; images have their channels second where none tells."""
    at: Any = node
    while isinstance(at, fx.Node) and at.op == "call_function":
        if at.target in _CHANNELS_SECOND:
            return 1
        if at.target in _CHANNELS_LAST:
            return last
        value = at.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() != last + 1:
            break
        at = at.args[0] if at.args else None
    return 1 if last == 3 else last


# ---- the choice


def _stages(found: list[Place]) -> list[Place]:
    """The outermost module that ends last at each size in a row, or some numbered layers where there is one size only."""
    found = [p for p in found if len(p.shape) >= 2 and any(n > 1 for n in p.positions)]
    runs = [list(run) for _, run in itertools.groupby(found, key=lambda p: p.positions)]
    if len(runs) == 1:
        numbered = [p for p in found if p.module.rpartition(".")[2].isdigit() and _holds_more(p, found)]
        least = min((p.module.count(".") for p in numbered), default=0)
        layers = [p for p in numbered if p.module.count(".") == least]
        if len(layers) > 1:
            steps = min(_MOST, len(layers))
            return [layers[(i + 1) * len(layers) // steps - 1] for i in range(steps)]
    return [[p for p in run if p.module.count(".") == min(q.module.count(".") for q in run)][-1] for run in runs]


def _holds_more(place: Place, found: list[Place]) -> bool:
    return any(p.module.startswith(place.module + ".") for p in found)


def _alike(mine: Place, theirs: Place) -> bool:
    return mine.positions == theirs.positions and len(mine.shape) == len(theirs.shape)


def _named(item: str, mine: dict[str, Place], theirs: dict[str, Place], same_positions: bool) -> tuple[Place, Place]:
    """One entry of ``layers``."""
    own, _, other = (part.strip() for part in item.partition("="))
    other = other or own
    for name, known, whose in ((own, mine, "student"), (other, theirs, "teacher")):
        if name not in known:
            raise RecipeError(
                f"The {whose} has no module '{name}' with one output whose batch comes first; it has {_some(known)}."
            )
    pair = mine[own], theirs[other]
    if same_positions and not _alike(*pair):
        raise RecipeError(
            f"'{own}' gives {['N', *pair[0].shape]} in the student and '{other}' {['N', *pair[1].shape]} in the teacher: all but "
            "the channels must be the same; features: similarity or relational needs no such thing."
        )
    return pair


def _some(known: dict[str, Place]) -> str:
    """A few names, the outermost first."""
    names = sorted(known, key=lambda m: m.count("."))
    return ", ".join(f"'{m}'" for m in names[:8]) + (" and more" if len(names) > 8 else "") if names else "none"
