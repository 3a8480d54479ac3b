"""Fake quantization: a float graph that computes what the integer file will, with gradients through the rounding."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import RecipeError
from .network import Network
from .pruning.call import operator_name
from .quantization import Quantization, operator_kind, operator_kinds

__all__ = [
    "FIXED",
    "check_layers",
    "fake_activation",
    "fake_bias",
    "fake_weight",
    "faked",
    "learned_ranges",
    "module_of",
    "nearest_range",
    "on_grid",
    "points",
    "quantized_weight",
    "weights",
]

_FAKES = "fakes"  # the submodule that holds what is learned of the grids

_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_LAYERS = {"linear", *_CONVOLUTIONS, *_TRANSPOSED}
_ACTIVATIONS = {"relu", "relu6", "hardtanh", "clamp", "clamp_min"}
_CARRIERS = {*_LAYERS, "add", "sub", "mul", "div", "batch_norm"}
"""Operators whose kernels clamp what they write: an activation behind them costs no rounding of its own."""
_MOVES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "movedim",
    "contiguous", "clone", "detach", "alias", "expand", "expand_as", "repeat", "tile", "to", "_to_copy", "lift_fresh_copy",
    "slice", "select", "narrow", "index_select", "split", "split_with_sizes", "chunk", "unbind", "getitem", "flip", "roll",
    "pad", "constant_pad_nd", "max_pool1d", "max_pool2d", "max_pool2d_with_indices", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "upsample_nearest2d", "dropout", "feature_dropout", "identity",
}  # fmt: skip
"""Operators that give no numbers which they did not get (zeros are on every grid): they round nothing."""
_SHARES = {"avg_pool1d", "avg_pool2d", "upsample_bilinear2d"}
"""Operators that compute, but whose kernels write on the grid that they read."""

FIXED: Mapping[str, tuple[float, float]] = {
    "softmax": (0.0, 255 / 256),
    "sigmoid": (0.0, 255 / 256),
    "tanh": (-1.0, 127 / 128),
}
"""Ranges that kernels prescribe (TFLite's 8-bit quantization specification)."""


# ---- numbers


def quantized_weight(weight: Tensor, top: int, axis: int = 0) -> tuple[Tensor, Tensor]:
    """The integers and the scales that a file holds of a weight: one scale, ``max |w| / top``, for each channel.

    Args:
        weight: of any shape.
        top: the largest integer: 127 for 8 bits, 7 for 4.
        axis: of the output channels.

    Returns:
        integers (in float32) of the weight's shape, and scales ``[C]``.

    Example:
        >>> import torch
        >>> quantized_weight(torch.tensor([[3.5, -1.0], [0.0, 0.0]]), 7)
        (tensor([[ 7., -2.],
                [ 0.,  0.]]), tensor([0.5000, 1.0000]))
    """
    rows = weight.detach().movedim(axis, 0).flatten(1)
    scale = rows.abs().amax(1) / top
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight.detach() / _along(scale, weight, axis)).round().clamp(-top, top), scale


def fake_weight(weight: Tensor, top: int, axis: int = 0, limit: Tensor | None = None) -> Tensor:
    """A weight rounded to the grid that the file will have; the gradient goes straight through.

    Args:
        weight: of any shape.
        top: the largest integer.
        axis: of the output channels.
        limit: ``[C]``, where the grids end; at the largest weight of each channel where None. It is learned (LSQ, Esser et al.
            2020, https://arxiv.org/abs/1902.08153), and never goes beyond the largest weight: some weight then always lies at
            the end of its grid, from which the grid can be told again.

    Example:
        >>> import torch
        >>> w = torch.tensor([[1.0, 0.3]], requires_grad=True)
        >>> fake_weight(w, 2).backward(torch.ones(1, 2))
        >>> fake_weight(w, 2).detach(), w.grad
        (tensor([[1.0000, 0.5000]]), tensor([[1., 1.]]))
    """
    scale = _weight_scale(weight, top, axis, limit)
    learnable = torch._fake_quantize_learnable_per_channel_affine
    rounded: Tensor = learnable(weight.float(), scale, torch.zeros_like(scale), axis, -top, top, 1.0)
    return rounded.to(weight.dtype)


def fake_bias(bias: Tensor, weight: Tensor, top: int, axis: int, limit: Tensor | None, low: Tensor, high: Tensor) -> Tensor:
    """A bias rounded as the file does: to whole multiples of the step of the products, the input's step times the weight's.

    What that changes is small, but it moves enough values across the middle between two integers to be seen ten layers on.

    Args:
        bias: ``[C]``.
        weight: of the same layer; this and the next three as in `fake_weight`.
        top: see there.
        axis: see there.
        limit: see there.
        low: lower end of the input's range; this and the next as in `fake_activation`.
        high: see there.

    Example:
        >>> low, high = torch.tensor(0.0), torch.tensor(255.0)
        >>> fake_bias(torch.tensor([0.3]), torch.tensor([[1.0, 0.5]]), 2, 0, None, low, high)
        tensor([0.5000])
    """
    with torch.no_grad():
        step = (high.clamp_min(0) - low.clamp_max(0)) / 255 * _weight_scale(weight, top, axis, limit)
        rounded = (bias / step).round() * step
    return bias + (rounded - bias).detach()


def _weight_scale(weight: Tensor, top: int, axis: int, limit: Tensor | None) -> Tensor:
    """The step of each channel's grid, ``[C]``; 1 where a channel is all zero."""
    rows = weight.detach().movedim(axis, 0).flatten(1).float()
    widest = rows.abs().amax(1)
    end = widest if limit is None else torch.minimum(_eased(limit, rows.shape[1], top).clamp_min(0), widest)
    return torch.where(widest > 0, end / top, torch.ones_like(end)).clamp_min(torch.finfo(torch.float32).tiny)


def fake_activation(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """An activation rounded to 256 numbers between ``low`` and ``high``, of which one is 0.

    Inside the range the gradient goes straight through, outside there is none; both ends are learned with the gradients and
    the scale of them that LSQ (Esser et al. 2020, https://arxiv.org/abs/1902.08153) gives the step size.

    Args:
        x: ``[N, ...]``.
        low: lower end, a scalar; 0 where it is above.
        high: upper end, a scalar; 0 where it is below.

    Example:
        >>> import torch
        >>> fake_activation(torch.tensor([-1.0, 0.4, 7.2, 300.0]), torch.tensor(0.0), torch.tensor(255.0))
        tensor([  0.,   0.,   7., 255.])
    """
    count = x[:1].numel()
    low, high = _eased(low, count, 255).clamp_max(0), _eased(high, count, 255).clamp_min(0)
    scale = ((high - low) / 255).clamp_min(1e-12)
    point = -low / scale  # of numbers from 0 on: the kernel's gradients would truncate a negative one
    learnable = torch._fake_quantize_learnable_per_tensor_affine
    rounded: Tensor = learnable(x.float(), scale.reshape(1), point.reshape(1), 0, 255, 1.0)
    return rounded.to(x.dtype)


def nearest_range(low: float, high: float) -> tuple[float, float]:
    """The range of the 8-bit grid nearest to a range: it holds 0 as one of its 256 numbers.

    Whoever computes a scale and a zero point from it gets these, in whatever precision.

    Example:
        >>> nearest_range(0.0, 255.0), nearest_range(-0.6, 254.4)
        ((0.0, 255.0), (-1.0, 254.0))
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 or 1.0
    below = round(-low / scale)
    return 0.0 - below * scale, (255 - below) * scale


def _eased(end: Tensor, count: int, levels: int) -> Tensor:
    """An end of a range, its gradient scaled as LSQ scales that of the step: ``1 / sqrt(count * levels)`` there is this here."""
    factor: float = levels**1.5 / count**0.5
    return end.detach() + (end - end.detach()) * factor


def _along(scale: Tensor, weight: Tensor, axis: int) -> Tensor:
    return scale.view([-1 if i == axis % weight.dim() else 1 for i in range(weight.dim())])


# ---- graphs


def points(network: Network, how: Quantization) -> dict[str, str]:
    """Where a deployed file rounds activations: names of graph nodes, each with the node whose range it has.

    That is the output of every operator, and the inputs of the network. An operator that is followed by nothing but an activation
    which its kernel applies does not round; operators that only move data have the range of what they move; and what goes
    into a concatenation and nowhere else has that of the whole.

    Args:
        network: with its batch normalisations folded.
        how: a layer that it keeps in floats is left out.

    Example:
        >>> import torch
        >>> from .network import trace
        >>> from .quantization import quantization
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU(), torch.nn.Flatten())
        >>> points(trace(model, torch.zeros(1, 3, 2, 2)), quantization("int8"))
        {'input_1': 'input_1', 'relu': 'relu', 'flatten': 'relu'}
    """
    leaders: dict[str, str] = {}
    computed: dict[fx.Node, None] = {}  # what depends on the inputs
    for node in network.module.graph.nodes:
        sources = [n for n in node.all_input_nodes if n in computed]
        if node.op != "placeholder" and (node.op == "output" or not sources):
            continue
        computed[node] = None
        name = operator_name(node.target) if node.op == "call_function" else ""
        if name in _MOVES | _SHARES:
            if sources[0].name in leaders:
                leaders[node.name] = leaders[sources[0].name]
        elif _is_float(node) and not _fused(node) and _stored(node, name, how):
            leaders[node.name] = node.name
            if name == "cat":
                _join(leaders, node, sources)
    return {n.name: leaders[n.name] for n in computed if n.name in leaders and _is_float(n)}


def _join(leaders: dict[str, str], cat: fx.Node, sources: list[fx.Node]) -> None:
    """Give what only the concatenation reads its range; what shares its range with others keeps its own."""
    for source in sources:
        alone = len(source.users) == 1 and list(leaders.values()).count(source.name) == 1
        if leaders.get(source.name) == source.name and alone and operator_name(source.target) not in FIXED:
            leaders[source.name] = cat.name


def _fused(node: fx.Node) -> bool:
    """Whether it is followed by nothing but an activation that its kernel applies."""
    if node.op != "call_function" or operator_name(node.target) not in _CARRIERS or len(node.users) != 1:
        return False
    (user,) = node.users
    return user.op == "call_function" and operator_name(user.target) in _ACTIVATIONS


def _stored(node: fx.Node, name: str, how: Quantization) -> bool:
    return node.op == "placeholder" or how.of(module_of(node), _kind(node)).activations is not None


def _kind(node: fx.Node) -> str:
    """What ``op:`` patterns call a node."""
    name = operator_name(node.target)
    if name not in _CONVOLUTIONS:
        return operator_kind(name)
    source, weight = (getattr(each, "meta", {}).get("val") for each in node.args[:2])
    return operator_kind(name, depthwise=weight is not None and source is not None and weight.shape[1] == 1 < source.shape[1])


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def module_of(node: fx.Node) -> str:
    """The user's innermost module that a node belongs to, ``layer1.0.conv1``; '' where none is known."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return str(stack[-1]) if stack else ""


def check_layers(network: Network, how: Quantization) -> None:
    """Find out before hours of work that a pattern of ``how.layers`` is nobody's name.

    Raises:
        RecipeError: such a pattern, with the names that come nearest. Modules that pruning has taken away still count.

    Example:
        >>> import torch
        >>> from .network import trace
        >>> from .quantization import quantization
        >>> network = trace(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()), torch.zeros(1, 3))
        >>> check_layers(network, quantization("int8", layers={"0": "fp32", "op:linear": "int8"}))
    """
    nodes = [node for node in network.module.graph.nodes if node.op == "call_function"]
    modules = dict.fromkeys([*map(module_of, nodes), *(name.rpartition(".")[0] for name in network.kept.shapes)])
    modules.pop("", None)
    kinds = dict.fromkeys(map(_kind, nodes))
    for pattern in how.layers:
        if pattern.startswith("op:"):
            if not any(fnmatchcase(kind, pattern[3:]) for kind in (*kinds, *operator_kinds())):
                raise RecipeError(
                    f"No operator is called '{pattern}'; the network has {', '.join(f'op:{kind}' for kind in kinds)}."
                )
        elif not any(fnmatchcase(name, pattern) for name in modules):
            inside = any(name.startswith(f"{pattern}.") for name in modules)
            near = get_close_matches(pattern, modules, 3) or list(modules)[:3]
            names = ", ".join(f"'{name}'" for name in near)
            hint = f"its layers are '{pattern}.*'" if inside else f"there is {names or 'no module in it'}"
            raise RecipeError(f"No layer of the network is called '{pattern}'; {hint}.")


def weights(network: Network, how: Quantization) -> dict[str, tuple[int, int]]:
    """The weights of convolutions and linear layers that are stored as integers: names to (largest integer, channel axis).

    Example:
        >>> import torch
        >>> from .network import trace
        >>> from .quantization import quantization
        >>> weights(trace(torch.nn.Linear(3, 2), torch.zeros(1, 3)), quantization("w4a8"))
        {'weight': (7, 0)}
    """
    found: dict[str, tuple[int, int]] = {}
    for node in network.module.graph.nodes:
        weight, _ = _weight_and_input(node)
        if weight:
            name = operator_name(node.target)
            numbers = how.of(module_of(node), _kind(node)).weights
            if numbers is not None and numbers.kind == "int":
                found.setdefault(weight, (numbers.limits[1], 1 if name in _TRANSPOSED else 0))
    return found


def faked(
    network: Network,
    how: Quantization,
    ranges: Mapping[str, tuple[float, float]],
    limits: Mapping[str, Tensor] | None = None,
) -> Network:
    """A copy that rounds weights and activations as the file will, and can be trained.

    The ends of the ranges are parameters, except where a range begins or ends at 0 or a kernel prescribes it.

    Args:
        network: with its batch normalisations folded.
        how: what is stored in which numbers.
        ranges: of the nodes that `points` names as leaders; others are ignored.
        limits: ``[C]`` by weight, where the grids end that are to be learned; others end at the largest weight.
    """
    result = network.copy()
    module, where, stored = result.module, points(network, how), weights(network, how)
    graph, held = module.graph, nn.Module()
    module.add_submodule(_FAKES, held)
    nodes = {node.name: node for node in graph.nodes}
    first = next(iter(nodes.values()))
    ends: dict[str, tuple[fx.Node, fx.Node]] = {}  # of the ranges, by leader
    tops: dict[str, tuple[Any, ...]] = {}  # what `fake_weight` takes beside the weight, by name
    with graph.inserting_before(first):
        for leader in dict.fromkeys(where.values()):
            _hold(held, leader, ranges[leader], FIXED.get(operator_name(nodes[leader].target)), result.device)
            low, high = (graph.get_attr(f"{_FAKES}.{leader}_{end}") for end in ("low", "high"))
            ends[leader] = low, high
        for i, (name, (top, axis)) in enumerate(stored.items()):
            tops[name] = top, axis, None
            if limits is not None and name in limits:
                held.register_parameter(f"limit_{i}", nn.Parameter(limits[name].clone()))
                tops[name] = top, axis, graph.get_attr(f"{_FAKES}.limit_{i}")
    for node in nodes.values():
        weight, source = _weight_and_input(node)
        if weight in tops and source in where and len(node.args) > 2 and isinstance(node.args[2], fx.Node):
            with graph.inserting_before(node):
                arguments = (node.args[2], node.args[1], *tops[weight], *ends[where[source]])
                node.update_arg(2, graph.call_function(fake_bias, arguments))
    for node in nodes.values():
        fake: tuple[Any, tuple[Any, ...]] | None = None
        if node.op == "get_attr" and node.target in tops:
            fake = fake_weight, (node, *tops[str(node.target)])
        elif node.name in where and not (node.op == "call_function" and operator_name(node.target) in _MOVES):
            fake = fake_activation, (node, *ends[where[node.name]])
        if fake is not None:
            with graph.inserting_before(node.next):
                _replace(node, graph.call_function(*fake))
    module.recompile()
    return result


def _weight_and_input(node: fx.Node) -> tuple[str, str]:
    """Of a layer with weights their name and the node that it reads; of others empty names."""
    if node.op != "call_function" or operator_name(node.target) not in _LAYERS:
        return "", ""
    source, weight = node.args[0], node.args[1]
    if not (isinstance(source, fx.Node) and isinstance(weight, fx.Node) and weight.op == "get_attr"):
        return "", ""
    return str(weight.target), source.name


def _replace(node: fx.Node, fake: fx.Node) -> None:
    fake.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(fake, lambda user: user is not fake and user.target is not fake_bias)


def _hold(held: nn.Module, name: str, span: tuple[float, float], fixed: tuple[float, float] | None, device: Any) -> None:
    for end, value in zip(("low", "high"), fixed or span, strict=True):
        number = torch.tensor(float(value), device=device)
        if fixed is not None or value == 0:
            held.register_buffer(f"{name}_{end}", number)
        else:
            held.register_parameter(f"{name}_{end}", nn.Parameter(number))


def learned_ranges(network: Network) -> dict[str, tuple[float, float]]:
    """The ranges that a network of `faked` has now, by leader."""
    held = dict(network.module.get_submodule(_FAKES).state_dict())
    leaders = [name.removesuffix("_low") for name in held if name.endswith("_low")]
    return {name: nearest_range(float(held[f"{name}_low"]), float(held[f"{name}_high"])) for name in leaders}


def on_grid(network: Network, fake: Network, how: Quantization) -> None:
    """Put the weights that ``fake`` learned into ``network``, in place, each exactly on the grid of the file."""
    learned = fake.state_dict()
    for i, (name, (top, axis)) in enumerate(weights(network, how).items()):
        weight, limit = learned[name], learned.get(f"{_FAKES}.limit_{i}")
        if limit is not None:
            widest = weight.movedim(axis, 0).flatten(1).abs().amax(1)
            end = _along(torch.minimum(limit.clamp_min(0), widest), weight, axis)
            weight = weight.clamp(-end, end)
        integers, scale = quantized_weight(weight, top, axis)
        learned[name] = integers * _along(scale, weight, axis)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            value.copy_(learned[name])
