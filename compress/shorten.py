"""Shorten: whole residual branches go, those whose absence the network notices least.

On small devices a dropped block buys more time than the same multiplications taken from channels: nothing of it is left to
start, load or store. Residual networks bear it: each block refines what the shortcut already carries (Veit, Wilber,
Belongie 2016, "Residual networks behave like ensembles of relatively shallow networks").
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from .distill import output_distance
from .errors import EdgepressError, RecipeError
from .network import Network, retrace
from .passes import describe
from .progress import bar
from .task import Task, input_batches, training_batches

__all__ = ["Branch", "Shorten", "branches", "found_again", "left_out", "taken_along", "without"]

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_RELU = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)
_RELU6 = (torch.ops.aten.relu6.default, torch.ops.aten.relu6_.default)
# an activation that changes nothing behind one of these
_IDEMPOTENT = {**dict.fromkeys(_RELU, _RELU + _RELU6), **dict.fromkeys(_RELU6, _RELU6)}


@dataclass(frozen=True)
class Branch:
    """One operand of an addition that can be left out.

    Attributes:
        addition: name of the graph node that adds.
        operand: which of its two operands goes, 0 or 1.
        module: the innermost module of the user's that holds the whole branch, or the node's name.
        nodes: names of the graph nodes that compute nothing else.
        parameters: names of the weights that go with them.
    """

    addition: str
    operand: int
    module: str
    nodes: tuple[str, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Shorten:
    """Remove residual branches, one at a time, until the budgets are met.

    Each remaining branch is left out in turn and the change of the outputs is measured; the one that costs least for what it
    saves goes. No labels are needed.

    Args:
        macs: multiply-accumulates to keep, as a fraction of what came in.
        parameters: weights to keep, as a fraction of what came in; no budget where None.
        examples: how many inputs the change is measured on.
    """

    macs: float = 0.6
    parameters: float | None = None
    examples: int = 256

    def __post_init__(self) -> None:
        for name, value in (("macs", self.macs), ("parameters", self.parameters)):
            if value is not None and not 0 < value < 1:
                raise RecipeError(f"Shorten needs {name} between 0 and 1, not {value}.")
        if self.examples < 1:
            raise RecipeError(f"Shorten needs at least one example, not {self.examples}.")

    def __call__(self, network: Network, task: Task) -> Network:
        """Return the shorter network; where no branch can go, the same one with a line of history that says so."""
        inputs = _examples(task, self.examples)
        shorter, full = network.copy().eval(), _sizes(network)
        budgets = {"macs": self.macs, "parameters": self.parameters if self.parameters is not None else 1.0}
        gone: list[dict[str, Any]] = []
        changes: dict[tuple[str, ...], float] = {}
        with torch.inference_mode():
            wanted = _outputs(shorter, inputs)
        with bar("Shorten") as update:
            while True:
                size = _sizes(shorter)
                unmet = {name: full[name] for name in full if size[name] > budgets[name] * full[name]}
                best = _cheapest(shorter, unmet, inputs, wanted, changes) if unmet else None
                if best is None:
                    break
                shorter = without(shorter, best)
                gone.append({"branch": best.module, "change": round(changes[best.parameters], 5)})
                done = min((full[n] - size[n]) / (full[n] * (1 - budgets[n])) for n in unmet)
                update(done, f"{len(gone)} branches gone, last {best.module}")
        found = {"removed": gone, "before": full, "after": size}
        return shorter.then(**{"pass": "Shorten"}, **describe(self), found=found)


def _sizes(network: Network) -> dict[str, int]:
    return {"macs": network.macs(), "parameters": network.parameter_count}


def branches(network: Network) -> list[Branch]:
    """The residual branches that can be left out: operands of an addition as large as its result, with weights of their own.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.f = torch.nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + self.f(x)
        >>> [b.parameters for b in branches(trace(Block(), torch.zeros(1, 4)))]
        [('f.weight', 'f.bias')]
    """
    found = []
    for node in network.module.graph.nodes:
        if node.op != "call_function" or node.target not in _ADDITIONS:
            continue
        for index in (0, 1):
            branch = _branch(node, index)
            if branch is not None:
                found.append(branch)
    return found


def taken_along(network: Network, branches: Iterable[Branch]) -> list[tuple[str, frozenset[str]]]:
    """The nodes that may go with the branches, each with its readers, readers first; none where each takes its own weights alone.

    An encoder goes when no layer of the decoder reads it any more.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> class TwoReaders(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encode, self.f, self.g = (torch.nn.Linear(4, 4) for _ in range(3))
        ...     def forward(self, x):
        ...         memory = self.encode(x)
        ...         return x + self.f(memory) + self.g(memory)
        >>> network = trace(TwoReaders(), torch.zeros(1, 4))
        >>> [name for name, readers in taken_along(network, branches(network)) if readers == {"linear_1", "linear_2"}]
        ['linear']
    """
    own = {name for branch in branches for name in branch.nodes}
    gone, found, shared = set(own), [], False
    for node in reversed(network.module.graph.nodes):
        readers = frozenset(user.name for user in node.users)
        if node.op not in ("call_function", "get_attr") or (_writes(node) and not readers):
            continue
        if node.name in own or readers <= gone:
            found.append((node.name, readers))
            gone.add(node.name)
            shared |= node.op == "get_attr" and bool(readers) and node.name not in own
    return found if shared else []


def without(network: Network, *gone: Branch) -> Network:
    """A new network in which the branches' additions pass their other operands through.

    Weights that only these branches read together go with them.
    """
    shorter = network.copy()
    graph = shorter.module.graph
    held = _held(graph)
    named = {node.name: node for node in graph.nodes}
    for branch in gone:
        node = named[branch.addition]
        node.replace_all_uses_with(node.args[1 - branch.operand])
        graph.erase_node(node)
    _merge_activations(graph)
    _sweep(graph)
    for name in held - _held(graph):
        path, _, leaf = name.rpartition(".")
        delattr(shorter.module.get_submodule(path), leaf)
    shorter.module.recompile()
    return retrace(shorter)


def found_again(gone: Collection[Branch], before: Network, after: Network) -> list[Branch]:
    """The same branches in a network whose nodes have other names, for it was exported again: its additions are in that order.

    Raises:
        EdgepressError: it has more or fewer of them.
    """
    old, new = ([n.name for n in network.module.graph.nodes if n.target in _ADDITIONS] for network in (before, after))
    if len(old) != len(new):
        raise EdgepressError(
            f"{len(old)} additions became {len(new)} when channels were removed: this is a bug; please report it."
        )
    renamed = dict(zip(old, new, strict=True))
    return [replace(branch, addition=renamed[branch.addition]) for branch in gone]


def _held(graph: fx.Graph) -> set[str]:
    """Names of the weights that something reads."""
    return {str(node.target) for node in graph.find_nodes(op="get_attr") if node.users}


def _branch(addition: fx.Node, index: int) -> Branch | None:
    operand, other = addition.args[index], addition.args[1 - index]
    if not (isinstance(operand, fx.Node) and isinstance(other, fx.Node)) or addition.kwargs.get("alpha", 1) != 1:
        return None
    if operand is other or _shape(other) != _shape(addition) or _shape(operand) != _shape(addition):
        return None
    alone = _exclusive(operand, addition)
    parameters = tuple(str(n.target) for n in alone if n.op == "get_attr")
    if not parameters or other in alone:
        return None
    return Branch(addition.name, index, _module(alone), tuple(n.name for n in alone), parameters)


def _exclusive(operand: fx.Node, addition: fx.Node) -> list[fx.Node]:
    """The nodes that would compute nothing any more if ``addition`` did not read ``operand``, in graph order."""
    dead: set[fx.Node] = set()
    for node in reversed(addition.graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        users = set(node.users) - ({addition} if node is operand else set())
        unread = users <= dead if node is operand or node.users else False
        if unread or (_writes(node) and _writes_for(node, dead | ({addition} if _written(node) is operand else set()))):
            dead.add(node)
    return [n for n in addition.graph.nodes if n in dead]


def _merge_activations(graph: fx.Graph) -> None:
    """A dropped branch leaves relu(relu(x)), which no kernel fuses: LiteRT ran such an int8 file at half the speed."""
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if node.target in _IDEMPOTENT and isinstance(source, fx.Node) and source.target in _IDEMPOTENT[node.target]:
            node.replace_all_uses_with(source)


def _sweep(graph: fx.Graph) -> None:
    """Erase what nothing reads, writing in place included: torch's own elimination keeps whatever might be impure."""
    for node in reversed(graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users and (not _writes(node) or _writes_for(node, set())):
            graph.erase_node(node)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _writes_for(node: fx.Node, dead: set[fx.Node]) -> bool:
    """Whether a node that writes in place, and that nobody reads, writes into a tensor, made here, that only dead nodes read."""
    made = _written(node)
    seen, left = {made}, [made]
    while left:
        for user in left.pop().users:
            if user not in seen and (_is_view(user) or (_writes(user) and user.args[0] in seen)):
                seen.add(user)
                left.append(user)
    read = {user for shown in seen for user in shown.users}
    return not node.users and made.op == "call_function" and read <= seen | dead


def _written(node: fx.Node) -> fx.Node:
    """The node that made the tensor whose numbers a view shows, or that is written in place."""
    while _is_view(node) or _writes(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_view(node: fx.Node) -> bool:
    """Whether it shows the numbers of its first argument."""
    if node.target is operator.getitem:
        return _is_view(node.args[0])  # type: ignore[arg-type]
    schema = getattr(node.target, "_schema", None)
    infos = [r.alias_info for r in schema.returns] if schema is not None else []
    return any(info is not None and not info.is_write for info in infos) and isinstance(node.args[0], fx.Node)


def _shape(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return tuple(str(s) for s in value.shape) if isinstance(value, Tensor) else None


def _module(nodes: list[fx.Node]) -> str:
    paths = [list(n.meta["nn_module_stack"].values())[-1][0].split(".") for n in nodes if n.meta.get("nn_module_stack")]
    common = paths[0] if paths else []
    for path in paths[1:]:
        common = [a for a, b in zip(common, path, strict=False) if a == b]
    return ".".join(common) or nodes[-1].name


def _cheapest(
    network: Network,
    full: dict[str, int],
    inputs: list[tuple[Tensor, ...]],
    wanted: list[Any],
    changes: dict[tuple[str, ...], float],
) -> Branch | None:
    """The branch with the least change of the outputs for its share of ``full``, the sizes whose budgets are not met.

    What leaving a branch out changed when fewer were gone bounds what it changes now from below, so branches are measured
    again in that order and only until a fresh cost is the least (lazy greedy selection, Minoux 1978). ``changes`` carries
    them over.
    """
    macs, weights = network.node_macs(), dict(network.module.named_parameters())
    shares: dict[Branch, float] = {}
    for branch in branches(network):
        saved = {
            "macs": sum(macs.get(name, 0) for name in branch.nodes),
            "parameters": sum(weights[name].numel() for name in branch.parameters if name in weights),
        }
        if saved["macs"]:
            shares[branch] = sum(saved[name] / full[name] for name in full)
    best, least = None, math.inf
    for branch in sorted(shares, key=lambda b: changes.get(b.parameters, -math.inf) / shares[b]):
        if changes.get(branch.parameters, -math.inf) / shares[branch] >= least:
            break
        with left_out(network, branch), torch.inference_mode():
            pairs = zip(_outputs(network, inputs), wanted, strict=True)
            changes[branch.parameters] = sum(float(output_distance(a, b)) for a, b in pairs) / len(wanted)
        if changes[branch.parameters] / shares[branch] < least:
            best, least = branch, changes[branch.parameters] / shares[branch]
    return best


@contextlib.contextmanager
def left_out(network: Network, branch: Branch) -> Iterator[None]:
    """Inside, the addition's readers read its other operand; much cheaper than `without`, which exports again."""
    node = next(n for n in network.module.graph.nodes if n.name == branch.addition)
    other, kind = node.args[1 - branch.operand], node.target
    before = {user: (user.args, user.kwargs) for user in node.users}
    node.replace_all_uses_with(other)
    node.target = torch.ops.aten.add.Tensor  # one in place would write into the other operand
    network.module.recompile()
    try:
        yield
    finally:
        node.target = kind
        for user, (args, kwargs) in before.items():
            user.args, user.kwargs = args, kwargs
        network.module.recompile()


def _outputs(network: Network, inputs: list[tuple[Tensor, ...]]) -> list[Any]:
    device = network.device
    return [network(*(x.to(device) for x in batch)) for batch in inputs]


def _examples(task: Task, count: int) -> list[tuple[Tensor, ...]]:
    """About ``count`` inputs: calibration batches where there are some, training batches otherwise."""
    source = (
        input_batches(task.calibration_batches)
        if task.calibration_batches is not None
        else (inputs for inputs, _ in training_batches(task, 0))
    )
    found, seen = [], 0
    for batch in source:
        found.append(tuple(x[: count - seen] for x in batch))
        seen += len(found[-1][0])
        if seen >= count:
            break
    return found
