"""What pruning kept of the user's own weights, as a plan that can be replayed on their class and their checkpoints.

A pass that slices weights records which positions it kept; rounds and passes are composed into one `Plan`, which says for each
entry of the original ``state_dict`` which indices of which dimension are left. It travels with the network, is plain JSON
(``surgery.json``), and needs nothing of ours to be understood:

    {"edgepress_surgery": 1,
     "state_dict": {"conv1.weight": {"shape": [16, 3, 3, 3], "keep": {"0": [0, 2, 5]}},
                    "block.conv.weight": {"shape": [16, 16, 3, 3], "removed": true}, ...}}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import FileError, UserError

if TYPE_CHECKING:
    from .network import Network

__all__ = ["Dropped", "Plan", "apply", "apply_to_module", "read_plan", "transplant"]

VERSION = 1
_USE_THE_GRAPH = "The pruned graph works as it is: use network.module"
_TOLERANCE = 1e-4  # of replayed outputs, relative: another kernel may sum in another order


@dataclass(frozen=True)
class Plan:
    """Which part of an original ``state_dict`` a network still has.

    Args:
        shapes: of every entry of the original, by name.
        kept: name, dimension, and the original indices that are left there, ascending; whole dimensions are not named.
        removed: names of entries that are gone, with the branch that they belonged to.

    Example:
        >>> plan = Plan({"weight": (4, 2), "bias": (4,)}).after({"weight": [np.array([True, False, True, True])]})
        >>> plan.kept, plan.shape("weight")
        ({'weight': {0: (0, 2, 3)}}, (3, 2))
    """

    shapes: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    removed: tuple[str, ...] = ()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that is left of an entry."""
        kept = self.kept.get(name, {})
        return tuple(len(kept[d]) if d in kept else n for d, n in enumerate(self.shapes[name]))

    def after(self, masks: Mapping[str, Sequence[NDArray[np.bool_]]]) -> Plan:
        """The plan once ``masks`` (name, and one mask for each dimension of what was left) are cut too; strangers are ignored."""
        kept = dict(self.kept)
        for name, cuts in masks.items():
            if name in self.shapes and not all(mask.all() for mask in cuts):
                kept[name] = dict(_composed(self.shapes[name], kept.get(name, {}), cuts))
        return replace(self, kept=kept)

    def of(self, state_dict: Mapping[str, Tensor]) -> Plan:
        """The plan of a network that has these weights: what is missing there was removed.

        Raises:
            UserError: an entry has another shape than was recorded: a pass sliced it and did not say so.
        """
        for name in self.shapes:
            if name in state_dict and tuple(state_dict[name].shape) != self.shape(name):
                raise UserError(
                    f"'{name}' has the shape {list(state_dict[name].shape)}, but {list(self.shape(name))} was recorded: a pass "
                    f"sliced it on its own, so there is no surgery plan. {_USE_THE_GRAPH}."
                )
        gone = [name for name in self.shapes if name not in state_dict]
        # what only trains, like BatchNorm's count of batches, is in no graph and would outlive its module
        alive = {_owner(name) for name, shape in self.shapes.items() if name in state_dict and shape}
        owners = {_owner(name) for name in gone} - alive
        return replace(self, removed=tuple(name for name in self.shapes if name in gone or _owner(name) in owners))

    def json(self) -> dict[str, Any]:
        """The plan as plain values, laid out as the module's text shows."""
        entries: dict[str, dict[str, Any]] = {name: {"shape": list(shape)} for name, shape in self.shapes.items()}
        for name, kept in self.kept.items():
            entries[name]["keep"] = {str(d): list(indices) for d, indices in kept.items()}
        for name in self.removed:
            entries[name]["removed"] = True
        return {"edgepress_surgery": VERSION, "state_dict": entries}

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write ``surgery.json``; raises `FileError` where that cannot be."""
        path = Path(path)
        entries = self.json()["state_dict"]
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}" for name, entry in entries.items())
        try:
            path.write_text(f'{{"edgepress_surgery": {VERSION}, "state_dict": {{\n{lines}\n}}}}\n')
        except OSError as error:
            raise FileError(f"Cannot write {path}: {error.strerror or error}.") from error
        return path

    @classmethod
    def from_json(cls, content: Any) -> Plan:
        """Read what `json` gave; nothing in it is believed unchecked.

        Raises:
            FileError: another version, or an entry that makes no sense; the message names it.

        Example:
            >>> Plan.from_json({"edgepress_surgery": 1, "state_dict": {"w": {"shape": [4], "keep": {"0": [1, 3]}}}}).shape("w")
            (2,)
        """
        version = content.get("edgepress_surgery") if isinstance(content, dict) else None
        if version != VERSION:
            raise FileError(f"This is no surgery plan of version {VERSION}: 'edgepress_surgery' is {version!r}.")
        entries = content.get("state_dict")
        if not isinstance(entries, dict):
            raise FileError("The surgery plan has no 'state_dict' that maps names to shapes and indices.")
        for name, entry in entries.items():
            if problem := _problem(entry):
                raise FileError(f"The surgery plan's entry '{name}' {problem}.")
        return cls(
            {name: tuple(entry["shape"]) for name, entry in entries.items()},
            {name: {int(d): tuple(k) for d, k in e["keep"].items()} for name, e in entries.items() if e.get("keep")},
            tuple(name for name, entry in entries.items() if entry.get("removed")),
        )


def _composed(
    shape: Sequence[int], kept: Mapping[int, tuple[int, ...]], cuts: Sequence[NDArray[np.bool_]]
) -> Iterator[tuple[int, tuple[int, ...]]]:
    for d, n in enumerate(shape):
        before = np.array(kept.get(d, range(n)), np.int64)
        left = before[cuts[d]] if d < len(cuts) else before
        if len(left) < n:
            yield d, tuple(left.tolist())


def _problem(entry: Any) -> str:
    """What is wrong with one entry of a plan; empty where nothing is."""
    if not isinstance(entry, dict) or not set(entry) <= {"shape", "keep", "removed"}:
        return "is not made of 'shape', 'keep' and 'removed'"
    shape, keep = entry.get("shape"), entry.get("keep", {})
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        return "has no shape that is a list of sizes"
    if not isinstance(keep, dict) or not isinstance(entry.get("removed", False), bool):
        return "has a 'keep' that is no mapping, or a 'removed' that is neither true nor false"
    for d, indices in keep.items():
        if not d.isdecimal() or int(d) >= len(shape):
            return f"keeps indices of dimension {d!r}; it has {len(shape)} dimensions"
        if not isinstance(indices, list) or not indices or not all(type(i) is int for i in indices):
            return f"keeps in dimension {d} what is not a list of indices"
        if indices != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= shape[int(d)]:
            return f"keeps in dimension {d} indices that do not ascend within 0 to {shape[int(d)] - 1}"
    return ""


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a ``surgery.json``, a stranger's too: it is JSON, and checked.

    Raises:
        FileError: not there, not JSON, or not a sound plan.
    """
    try:
        return Plan.from_json(json.loads(Path(path).read_text()))
    except FileError as error:
        raise FileError(f"{path}: {error}") from error
    except OSError as error:
        raise FileError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON.") from error


# ---- replaying it


def apply(plan: Plan, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Slice a ``state_dict`` of the original network, trained further or not, as the plan says.

    Tensors that were one stay one. The input is left as it was.

    Raises:
        UserError: a name is missing or unknown, or a shape is another than the plan's.

    Example:
        >>> import torch
        >>> plan = Plan({"w": (4, 2), "b": (4,)}, {"w": {0: (0, 3)}}, removed=("b",))
        >>> apply(plan, {"w": torch.arange(8).view(4, 2), "b": torch.zeros(4)})
        {'w': tensor([[0, 1],
                [6, 7]])}
    """
    _check(plan, {name: tuple(value.shape) for name, value in state_dict.items()}, "The state_dict")
    slices: dict[Any, Tensor] = {}
    result = {}
    for name in plan.shapes:
        if name not in plan.removed:
            value, kept = state_dict[name], plan.kept.get(name, {})
            key = (value.data_ptr(), tuple(value.shape), value.stride(), tuple(kept.items())) if value.numel() else name
            result[name] = slices.setdefault(key, _sliced(value, kept))
    return result


def _check(plan: Plan, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    missing = [name for name in plan.shapes if name not in shapes]
    unknown = [name for name in shapes if name not in plan.shapes]
    if missing or unknown:
        both = [f"{word} {_some(names)}" for word, names in (("lacks", missing), ("has the unknown", unknown)) if names]
        raise UserError(f"{what} does not belong to this surgery plan: it {' and '.join(both)}.")
    for name, shape in shapes.items():
        if shape != plan.shapes[name]:
            raise UserError(
                f"{what} does not belong to this surgery plan: '{name}' has the shape {list(shape)}, the plan is for "
                f"{list(plan.shapes[name])}; take the original network, before pruning."
            )


def _some(names: Sequence[str]) -> str:
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _sliced(value: Tensor, kept: Mapping[int, Sequence[int]]) -> Tensor:
    for d, indices in kept.items():
        value = value.index_select(d, torch.tensor(indices, device=value.device))
    return value.contiguous()


def apply_to_module(plan: Plan, module: nn.Module) -> None:
    """Slice an instance of the user's own class, in place: weights, buffers, and the attributes that repeat their sizes.

    Tied weights stay tied. Modules all of whose weights are gone become `Dropped`. What the class's own code fixes (``view``
    to constant sizes, padding by constants) no plan can change: `transplant` finds out whether the class still works.

    Raises:
        UserError: the module is not the one that the plan was made for, or a layer cannot have the planned sizes; it is then
            left as it was.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
        >>> apply_to_module(Plan(shapes, {"0.weight": {0: (0, 2)}, "0.bias": {0: (0, 2)}, "1.weight": {1: (0, 2)}}), net)
        >>> net[0].out_features, net[1].in_features, net(torch.zeros(1, 4)).shape
        (2, 2, torch.Size([1, 2]))
    """
    _check(plan, {name: tuple(value.shape) for name, value in module.state_dict().items()}, f"{type(module).__name__}()")
    gone = _gone(plan, module)
    layers = {path: layer for path, layer in module.named_modules() if not any(_inside(path, top) for top in gone)}
    changes = {path: _attributes(path, layer, plan) for path, layer in layers.items()}  # raises before anything is touched
    stuck = [n for n in plan.removed if n in plan.shapes and not any(_inside(n, top) for top in gone)]
    if stuck:
        raise UserError(f"The plan drops '{stuck[0]}' alone, which the class would miss. {_USE_THE_GRAPH}.")
    new: dict[int, Tensor] = {}
    for path, layer in layers.items():
        for leaf, old in [*layer._parameters.items(), *layer._buffers.items()]:
            kept = plan.kept.get(f"{path}.{leaf}".lstrip("."))
            if old is not None and kept:
                if id(old) not in new:
                    value = _sliced(old.detach(), kept)
                    new[id(old)] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
                setattr(layer, leaf, new[id(old)])
        for name, value in changes[path].items():
            setattr(layer, name, value)
    for path in gone:
        module.set_submodule(path, Dropped(module.get_submodule(path)))


def _inside(name: str, top: str) -> bool:
    return name == top or name.startswith(f"{top}.")


def _gone(plan: Plan, module: nn.Module) -> list[str]:
    """The layers whose every entry is removed: leaves, and attention, which is called as a whole."""
    removed = set(plan.removed)
    found: list[str] = []
    for path, layer in module.named_modules():
        own = [n for n in plan.shapes if _inside(n, path)] if path else []
        whole = isinstance(layer, nn.MultiheadAttention) or not any(True for _ in layer.children())
        if own and whole and removed.issuperset(own) and not any(_inside(path, top) for top in found):
            found.append(path)
    return found


class Dropped(nn.Module):
    """Stands where a layer of a dropped branch was, in a class that still calls it: it gives zeros as large as its input.

    Example:
        >>> import torch
        >>> Dropped(torch.nn.Linear(2, 2))(torch.ones(1, 2))
        tensor([[0., 0.]])
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.was = type(layer).__name__
        self._pair = isinstance(layer, nn.MultiheadAttention)

    def forward(self, x: Tensor, *others: Any, **settings: Any) -> Any:
        """Zeros like ``x``; with a None beside them where attention gave its weights."""
        return (torch.zeros_like(x), None) if self._pair else torch.zeros_like(x)

    def extra_repr(self) -> str:
        """What it was."""
        return self.was


def transplant(network: Network, module: nn.Module) -> nn.Module:
    """Give a pruned and trained network back to the user's class: replay its plan, load its weights, compare the outputs.

    Args:
        network: what the passes made.
        module: an instance of the original class, with the original sizes and any weights; changed in place.

    Returns:
        ``module``, in evaluation mode; on the network's example inputs it computes what the network computes.

    Raises:
        UserError: the class cannot take the new sizes, or computes something else with them.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> network = trace(torch.nn.Linear(3, 2), torch.zeros(1, 3))
        >>> net = transplant(network, torch.nn.Linear(3, 2))
        >>> bool(torch.equal(net.weight, network.state_dict()["weight"]))
        True
    """
    apply_to_module(network.plan(), module)
    left = module.state_dict()
    weights = network.state_dict()
    module.load_state_dict({name: weights[name] for name in left})
    module.eval()
    fresh = network.copy().to("cpu").eval()
    where = next((p.device for p in module.parameters()), torch.device("cpu"))
    sentence = f"{type(module).__name__}'s own code fixes sizes, so it cannot be pruned in this way"
    with torch.no_grad():
        expected = [t for t in pytree.tree_leaves(fresh(*fresh.example_inputs)) if isinstance(t, Tensor)]
        try:
            found = module(*(x.to(where) for x in fresh.example_inputs))
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(f"{sentence} ({first}). {_USE_THE_GRAPH}.") from error
    outputs = [t.cpu() for t in pytree.tree_leaves(found) if isinstance(t, Tensor)]
    if len(outputs) != len(expected) or any(not _alike(a, b) for a, b in zip(outputs, expected, strict=False)):
        raise UserError(f"{sentence}: it runs, and gives other outputs. {_USE_THE_GRAPH}.")
    return module


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    scale = float(b.double().abs().max()) if b.numel() else 0.0
    return bool(torch.allclose(a.double(), b.double(), rtol=0, atol=_TOLERANCE * max(scale, 1e-12), equal_nan=True))


# ---- the attributes of torch's own layers that repeat the sizes of their weights


def _attributes(path: str, layer: nn.Module, plan: Plan) -> dict[str, Any]:
    """The attributes of one layer as they must be afterwards; empty where nothing of it changes."""
    prefix = f"{path}." if path else ""
    names = [*layer._parameters, *layer._buffers]
    if not any(prefix + leaf in plan.kept for leaf in names):
        return {}
    shapes = {leaf: plan.shape(prefix + leaf) for leaf in names if prefix + leaf in plan.shapes}
    kept = {leaf: plan.kept.get(prefix + leaf, {}) for leaf in names}
    for kinds, follow in _LAYERS.items():
        if isinstance(layer, kinds):
            try:
                found: dict[str, Any] = follow(layer, shapes, kept)
            except _CannotFollow as reason:
                text = f"'{path or type(layer).__name__}' ({type(layer).__name__}) cannot have the planned sizes: {reason}"
                raise UserError(f"{text}. {_USE_THE_GRAPH}.") from None
            return found
    return {}


class _CannotFollow(Exception):
    """Why a layer's class cannot have the sizes."""


_Shapes = Mapping[str, tuple[int, ...]]
_Kept = Mapping[str, Mapping[int, tuple[int, ...]]]


def _blocks(count: int, size: int, kept: Iterable[int] | None) -> int:
    """How many of ``count`` equal blocks of ``size`` positions are left, each with equally many."""
    if kept is None:
        return count
    sizes = np.bincount(np.array(list(kept)) // (size // count), minlength=count)
    left = sizes[sizes > 0]
    if len(set(left.tolist())) > 1:
        raise _CannotFollow("its groups or heads are left with different sizes")
    return len(left)


def _conv(layer: Any, shapes: _Shapes, kept: _Kept) -> dict[str, Any]:
    # axis 0 of a weight counts the channels of all groups, axis 1 those of one
    groups = _blocks(layer.groups, layer.out_channels, kept["weight"].get(0))
    return {"out_channels": shapes["weight"][0], "in_channels": shapes["weight"][1] * groups, "groups": groups}


def _transposed_conv(layer: Any, shapes: _Shapes, kept: _Kept) -> dict[str, Any]:
    groups = _blocks(layer.groups, layer.in_channels, kept["weight"].get(0))
    return {"in_channels": shapes["weight"][0], "out_channels": shapes["weight"][1] * groups, "groups": groups}


def _linear(layer: Any, shapes: _Shapes, kept: _Kept) -> dict[str, Any]:
    return {"out_features": shapes["weight"][0], "in_features": shapes["weight"][1]}


def _per_channel(layer: Any, shapes: _Shapes, kept: _Kept) -> dict[str, Any]:
    return {"num_features": next(shape[0] for shape in shapes.values() if shape)}


def _group_norm(layer: Any, shapes: _Shapes, kept: _Kept) -> dict[str, Any]:
    groups = _blocks(layer.num_groups, layer.num_channels, kept["weight"].get(0))
    return {"num_channels": shapes["weight"][0], "num_groups": groups}


def _layer_norm(layer: Any, shapes: _Shapes, kept: _Kept) -> dict[str, Any]:
    return {"normalized_shape": shapes["weight"]}


def _prelu(layer: Any, shapes: _Shapes, kept: _Kept) -> dict[str, Any]:
    return {"num_parameters": shapes["weight"][0]}


def _embedding(layer: Any, shapes: _Shapes, kept: _Kept) -> dict[str, Any]:
    if 0 in kept["weight"]:
        raise _CannotFollow("rows of its table are gone, and the indices that it is given would no longer fit")
    return {"embedding_dim": shapes["weight"][1]}


def _recurrent(layer: Any, shapes: _Shapes, kept: _Kept) -> dict[str, Any]:
    gates = {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)
    hidden = {shape[0] // gates for name, shape in shapes.items() if name.startswith("weight_ih")}
    projected = {shape[0] for name, shape in shapes.items() if name.startswith("weight_hr")}
    if len(hidden) > 1 or len(projected) > 1:
        raise _CannotFollow("its layers or directions are left with different widths")
    return {"hidden_size": hidden.pop(), "input_size": shapes["weight_ih_l0"][1], "proj_size": max(projected, default=0)}


def _attention(layer: Any, shapes: _Shapes, kept: _Kept) -> dict[str, Any]:
    if "in_proj_weight" not in shapes:
        raise _CannotFollow("its queries, keys and values have weights of their own")
    inner, width = shapes["in_proj_weight"][0] // 3, shapes["in_proj_weight"][1]
    queries = kept["in_proj_weight"].get(0, range(layer.embed_dim))
    heads = _blocks(layer.num_heads, layer.embed_dim, [i for i in queries if i < layer.embed_dim])
    if inner != width or inner // heads != layer.head_dim:
        raise _CannotFollow("torch's own attention wants as many positions in its heads, all of the old size, as in its input")
    return {"embed_dim": width, "num_heads": heads, "kdim": width, "vdim": width}


_LAYERS: dict[Any, Any] = {
    (nn.Conv1d, nn.Conv2d, nn.Conv3d): _conv,
    (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d): _transposed_conv,
    nn.Linear: _linear,
    (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm): _per_channel,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.PReLU: _prelu,
    nn.Embedding: _embedding,
    nn.RNNBase: _recurrent,
    nn.MultiheadAttention: _attention,
}


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
