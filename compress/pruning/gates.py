"""Per-example gates: what each example's loss loses, to first order, when a channel or a branch is closed.

A gate multiplies by one whatever reads a channel; the loss differentiated by it is activation times gradient, summed over the
channel's positions at every reader. `Analysis.contractions` lists the readers. One forward and one backward pass give
every gate of every example: each reader gets its operand under an alias, so that gradients of several readers do not mix, and
a hook reduces them as soon as they come. Gradients of weights are not computed.

A layer reads its input through a weight, and weight times gradient summed over the weight's slice of one channel is input times
gradient summed over that channel; the input has examples where the weight has none. What the table of readers does not
know (recurrent layers), and channels that nothing reads, are gated at the weights with one example at a time; so is a network
that reorders its examples, which two of the first ones show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..network import EXPORT_BATCH, Network
from .analysis import Analysis, tensor_of
from .call import Call, hint, shape_of
from .groups import Channels
from .labels import Ids, size

if TYPE_CHECKING:
    from ..shorten import Branch

__all__ = ["Gates", "branch_gates", "channel_gates"]


class Examples(NamedTuple):
    """Where a tensor has the examples: ``dim`` is ``[outer, N, inner]``, flattened."""

    dim: int
    outer: int


@dataclass(frozen=True)
class Gate:
    """One place where something is read.

    Attributes:
        node: name of the graph node that reads.
        operand: name of what it reads.
        dim: of the operand, along which channels lie; None where the whole operand is one gate.
        index: for each position along ``dim`` its gate; ``Gates.count`` for what is nobody's.
        examples: where the operand has the examples; None where it has none.
    """

    node: str
    operand: str
    dim: int | None
    index: Tensor
    examples: Examples | None

    def reduce(self, product: Tensor, batch: int) -> Tensor:
        """Activation times gradient, summed to ``[N, positions]``."""
        examples, shape = self.examples, list(product.shape)
        if examples is None:
            examples, shape = Examples(0, 1), [1, *shape]  # one example at a time
        at, dim = examples.dim, None if self.dim is None else self.dim + (self.examples is None)
        inner = shape[at] // (examples.outer * batch)
        split = product.reshape(*shape[:at], examples.outer, batch, inner, *shape[at + 1 :])
        keep = {at + 1} if dim is None else {at + 1, dim if dim < at else dim + 2}
        reduced = split.sum([d for d in range(split.dim()) if d not in keep], dtype=torch.float32)
        if dim is not None and dim < at:
            reduced = reduced.T
        return reduced.reshape(batch, -1)


@dataclass(frozen=True)
class Gates:
    """Gates of a network, to be run on its batches.

    Attributes:
        places: where they are; one gate may be in several places.
        count: how many gates there are.
        whole: whether batches can be run whole; otherwise one example at a time.
    """

    places: tuple[Gate, ...]
    count: int
    whole: bool

    def to(self, device: torch.device | str) -> Gates:
        """The same gates for a network on that device."""
        return replace(self, places=tuple(replace(g, index=g.index.to(device)) for g in self.places))

    def joined(self, other: Gates) -> Gates:
        """These gates and then the other's, for one pass over the batches."""
        count = self.count + other.count
        mine = (replace(g, index=torch.where(g.index == self.count, count, g.index)) for g in self.places)
        theirs = (replace(g, index=g.index + self.count) for g in other.places)
        return Gates((*mine, *theirs), count, self.whole and other.whole)

    def contributions(
        self, network: Network, inputs: tuple[Tensor, ...], targets: Any, loss: Callable[[Any, Any], Tensor], scale: float
    ) -> Tensor:
        """The loss of a batch differentiated by the gates of each of its examples, ``[N, G]``.

        Args:
            network: the network they were made for or a copy; its weights must not require gradients.
            inputs: one batch, examples first.
            targets: whatever ``loss`` takes.
            loss: ``loss(outputs, targets)``.
            scale: each example's own loss is so many times its part in the batch's: N where that is the mean.
        """
        count = len(inputs[0])
        if self.whole or count == 1:
            return self._run(network, inputs, targets, loss)
        rows = [_row((inputs, targets), i, count) for i in range(count)]
        return torch.cat([self._run(network, x, y, loss) for x, y in rows]) / scale

    def checked(self, network: Network, inputs: tuple[Tensor, ...]) -> Gates:
        """The same gates, for one example at a time if two examples together give something else than each alone.

        An operator that reorders the examples, as mixtures of experts do, cannot be seen from sizes.
        """

        def loss(outputs: Any, targets: Any) -> Tensor:
            floats = [y for y in pytree.tree_leaves(outputs) if isinstance(y, Tensor) and y.is_floating_point()]
            return torch.stack([y.float().square().sum() for y in floats]).sum()

        if not self.whole or len(inputs[0]) < 2:
            return self
        alone = replace(self, whole=False)
        two = tuple(x[:2] for x in inputs)
        found, expected = (g.contributions(network, two, None, loss, 1) for g in (self, alone))
        same = torch.allclose(found, expected, rtol=0, atol=0.01 * float(expected.abs().max()), equal_nan=True)
        return self if same else alone

    def _run(self, network: Network, inputs: tuple[Tensor, ...], targets: Any, loss: Callable[[Any, Any], Tensor]) -> Tensor:
        total = torch.zeros(len(inputs[0]), self.count + 1, device=network.device)
        gated = _Gated(network.module, self.places, total)
        value = loss(gated.run(*inputs), targets)
        if value.requires_grad:  # without any gate on the way to it, it does not
            value.backward()
        gated.release()
        return total[:, : self.count]


def _row(batch: Any, i: int, count: int) -> Any:
    """One example of a batch of ``count``, as a batch of one."""

    def row(t: Tensor) -> Tensor:
        return t[i : i + 1] if t.dim() and len(t) == count else t

    return pytree.tree_map_only(Tensor, row, batch)


class _Gated(fx.Interpreter):
    """Runs a graph; its backward pass adds activation times gradient of every gate to ``total``, ``[N, G + 1]``."""

    def __init__(self, module: fx.GraphModule, places: Iterable[Gate], total: Tensor):
        super().__init__(module)
        self._total = total
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._at: dict[str, list[Gate]] = {}
        for gate in places:
            self._at.setdefault(gate.node, []).append(gate)

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self._at:
            return super().run_node(n)
        values = {m: self.env[m] for m in n.all_input_nodes}
        for m in n.all_input_nodes:
            if gates := [gate for gate in self._at[n.name] if gate.operand == m.name]:
                values[m] = self._alias(m, n, gates)
        args, kwargs = (fx.map_arg(x, lambda m: values[m]) for x in (n.args, n.kwargs))
        return n.target(*args, **kwargs)  # type: ignore[operator, arg-type]

    def _alias(self, operand: fx.Node, reader: fx.Node, gates: Sequence[Gate]) -> Tensor:
        """The operand for this reader alone: gradients of several readers come apart."""
        value: Tensor = self.env[operand]
        # not view_as: in torch 2.13 its gradients were wrong for batches of one where two of them meet in an addition
        alias = torch.ops.aten.alias.default(value) if value.requires_grad else value.detach().requires_grad_()
        # what is changed in place must be kept as it was read
        kept = value.detach().clone() if any(_in_place(user) for user in operand.users) else value.detach()
        total = self._total

        def hook(gradient: Tensor) -> None:
            product = kept * gradient
            for gate in gates:
                total.index_add_(1, gate.index, gate.reduce(product, len(total)))

        self._hooks.append(alias.register_hook(hook))
        return alias.clone() if _in_place(reader) else alias

    def release(self) -> None:
        """Let go of the batch: a hook that holds what its own tensor leads to is a cycle that no collector sees."""
        for hook in self._hooks:
            hook.remove()
        self.env.clear()


def _in_place(n: fx.Node) -> bool:
    return isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable


# ---- channels


def channel_gates(channels: Channels) -> Gates:
    """A gate for each of ``channels.classes``, at all of its readers.

    Example:
        >>> from edgepress.compress.network import trace
        >>> from .analysis import analyse
        >>> from .groups import channels_of
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> gates = channel_gates(channels_of(analyse(trace(net, torch.zeros(1, 4)))))
        >>> gates.count, [(g.node, g.operand, g.dim) for g in gates.places], gates.whole
        (6, [('linear_1', 'relu', 1)], True)
    """
    analysis = channels.analysis
    readers = list(dict.fromkeys(analysis.contractions))
    direct = [g for reader in readers for g in _places(channels, *reader)]
    read = np.unique(np.concatenate([g.index.numpy() for g in direct] or [np.zeros(0, np.int64)]))
    unread = np.setdiff1d(np.arange(len(channels.classes)), read)
    seen = [_seen(channels, *reader) for reader in readers]
    if not len(unread) and all(places is not None for places in seen):
        return Gates(tuple(g for places in seen for g in places or ()), len(channels.classes), whole=True)
    return Gates((*direct, *_weights(channels, unread)), len(channels.classes), whole=False)


def _seen(channels: Channels, node: fx.Node, operand: fx.Node, dim: int) -> list[Gate] | None:
    """Gates of one reader where examples can be told apart; None where they cannot."""
    if not _places(channels, node, operand, dim):
        return []
    for place in ((operand, dim), _partner(Call(node), operand, dim)):
        if place is not None and (examples := _examples(channels.analysis, *place)) is not None:
            return [replace(g, examples=examples) for g in _places(channels, node, *place)]
    return None


def _partner(c: Call, operand: fx.Node, dim: int) -> tuple[fx.Node, int] | None:
    """What ``operand`` is multiplied with along its ``dim``, and where that has the same channels.

    Example:
        >>> from edgepress.compress.network import trace
        >>> graph = trace(torch.nn.Conv2d(4, 6, 3), torch.zeros(1, 4, 8, 8)).module.graph
        >>> conv = next(n for n in graph.nodes if n.op == "call_function")
        >>> _partner(Call(conv), conv.args[1], 1)
        (input_1, 1)
    """
    if c.name == "einsum":
        return _einsum_partner(c, operand, dim)
    if c.name.startswith("conv") and "input" in c:
        kernel = len(shape_of(c["weight"].meta["val"])) - 2
        return _last(c["input"], before=kernel)
    if c.name == "bilinear":
        return _last(c[f"input{dim}"])
    if c.name in _LEFT:
        left = c[_LEFT[c.name]] if _LEFT[c.name] in c else c.node.args[0]
        assert isinstance(left, fx.Node)
        return _last(left)
    return None


_LEFT = {
    "linear": "input", "matmul": "self", "mm": "self", "bmm": "self", "mv": "self", "dot": "self", "addmm": "mat1",
    "baddbmm": "batch1",
}  # fmt: skip
"""Products whose right operand is said to be summed over, and the name of the left one."""


def _last(node: fx.Node, before: int = 0) -> tuple[fx.Node, int]:
    return node, len(shape_of(node.meta["val"])) - 1 - before


def _einsum_partner(c: Call, operand: fx.Node, dim: int) -> tuple[fx.Node, int] | None:
    if "." in c["equation"]:
        return None
    terms = list(zip(c["equation"].replace(" ", "").partition("->")[0].split(","), c["tensors"], strict=True))
    letter = next(term[dim] for term, x in terms if x is operand)
    others = [(x, term.index(letter)) for term, x in terms if x is not operand and letter in term]
    return others[0] if len(others) == 1 else None


def _places(channels: Channels, node: fx.Node, operand: fx.Node, dim: int) -> list[Gate]:
    """Gates for the channels along an axis, one for each atom of it that holds some; the examples are not looked for."""
    axis, found = channels.analysis.axes(operand)[dim], []
    for i, (n, labels) in enumerate(axis):
        index = channels.index(labels) if labels is not None else np.full(n, -1)
        if (index >= 0).any():
            index = np.where(index < 0, len(channels.classes), index)
            index = np.tile(np.repeat(index, size(axis[i + 1 :])), size(axis[:i]))
            found.append(Gate(node.name, operand.name, dim, torch.from_numpy(index), None))
    return found


def _weights(channels: Channels, units: Ids) -> list[Gate]:
    """Gates of some channels at every use of every weight of theirs."""
    found = []
    for attribute in channels.analysis.module.graph.nodes:
        if attribute.op == "get_attr" and isinstance(tensor_of(channels.analysis.module, str(attribute.target)), nn.Parameter):
            users = [user for user in attribute.users if user.op == "call_function"]
            found += [
                g
                for user in users
                for dim in range(len(channels.analysis.axes(attribute)))
                for g in _places(channels, user, attribute, dim)
            ]
    mine = [torch.from_numpy(np.isin(g.index.numpy(), units)) for g in found]
    return [replace(g, index=g.index.where(m, len(channels.classes))) for g, m in zip(found, mine, strict=True) if m.any()]


def _examples(analysis: Analysis, operand: fx.Node, dim: int) -> Examples | None:
    """The one other dimension whose size follows the batch; the batch has a factor of its own in it where it was merged."""
    shape = operand.meta["val"].shape
    symbolic = [d for d, n in enumerate(shape) if not isinstance(n, int)]
    if len(symbolic) != 1 or symbolic[0] == dim or hint(shape[symbolic[0]]) % EXPORT_BATCH:
        return None
    outer = 1
    for atom in analysis.axes(operand)[symbolic[0]]:
        if atom.size % EXPORT_BATCH == 0:
            return Examples(symbolic[0], outer)
        outer *= atom.size
    return Examples(symbolic[0], 1)


# ---- branches


def branch_gates(network: Network, branches: Sequence[Branch]) -> Gates:
    """A gate for each branch, on its operand of its addition.

    Example:
        >>> from edgepress.compress.network import trace
        >>> from edgepress.compress.shorten import branches
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.f = torch.nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + self.f(x)
        >>> network = trace(Block(), torch.zeros(1, 4))
        >>> [(g.node, g.operand, g.dim) for g in branch_gates(network, branches(network)).places]
        [('add', 'linear', None)]
    """
    nodes = {n.name: n for n in network.module.graph.nodes}
    places = []
    for i, branch in enumerate(branches):
        operand = nodes[branch.addition].args[branch.operand]
        assert isinstance(operand, fx.Node)
        symbolic = [d for d, n in enumerate(operand.meta["val"].shape) if not isinstance(n, int)]
        examples = Examples(symbolic[0], 1) if len(symbolic) == 1 else None
        places.append(Gate(branch.addition, operand.name, None, torch.tensor([i]), examples))
    return Gates(tuple(places), len(branches), whole=all(g.examples is not None for g in places))
