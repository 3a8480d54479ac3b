"""Batch normalisation folded into the layer before it, as every deployed file has it."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from .layerwise import kind
from .network import Network

__all__ = ["folded"]

_LAYERS = {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}


def folded(network: Network) -> Network:
    """A copy in evaluation mode whose batch normalisations are part of the convolution or linear layer before them.

    One that follows something else, or whose layer feeds others too or shares its weight, stays. The new weights compute the
    same up to rounding; a layer without bias gets one.

    Example:
        >>> import torch
        >>> from .network import trace
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.BatchNorm2d(4))
        >>> network = folded(trace(model, torch.zeros(1, 3, 2, 2)))
        >>> sorted(network.state_dict())
        ['0.bias', '0.weight']
    """
    result = network.copy().eval()
    graph = result.module.graph
    for norm in list(graph.nodes):
        layer = norm.args[0] if kind(norm) == "batch_norm" else None
        if isinstance(layer, fx.Node) and _folds(layer, norm):
            _fold(result.module, layer, norm)
            norm.replace_all_uses_with(layer)
            graph.erase_node(norm)
    graph.eliminate_dead_code()
    result.module.delete_all_unused_submodules()
    _drop_unused(result.module)
    result.module.recompile()
    return result


def _folds(layer: fx.Node, norm: fx.Node) -> bool:
    weights = layer.args[1] if kind(layer) in _LAYERS and len(layer.users) == 1 else None
    mean = norm.args[3]
    # a linear layer in front of [N, C, L] has its channels last, the normalisation in the middle
    fits = kind(layer) != "linear" or layer.meta["val"].dim() == 2
    return isinstance(weights, fx.Node) and weights.op == "get_attr" and len(weights.users) == 1 and mean is not None and fits


def _fold(module: fx.GraphModule, layer: fx.Node, norm: fx.Node) -> None:
    gamma, beta, mean, var = (_value(module, argument) for argument in norm.args[1:5])
    assert mean is not None
    assert var is not None
    eps = float(norm.args[7])  # type: ignore[arg-type]
    factor = (var + eps).rsqrt() * (1.0 if gamma is None else gamma)
    name = str(layer.args[1].target)  # type: ignore[union-attr]
    weight, bias = _value(module, layer.args[1]), _value(module, layer.args[2] if len(layer.args) > 2 else None)
    assert weight is not None
    with torch.no_grad():
        shift = (0.0 if bias is None else bias) - mean
        _set(module, name, weight * _along(factor, weight, layer))
        new = shift * factor + (0.0 if beta is None else beta)
    target = f"{name.rpartition('.')[0]}.bias".lstrip(".")
    _set(module, target, new)
    with module.graph.inserting_before(layer):
        node = module.graph.get_attr(target)
    node.meta["val"] = new
    layer.args = (*layer.args[:2], node, *layer.args[3:])
    layer.meta["val"] = norm.meta["val"]


def _along(factor: Tensor, weight: Tensor, layer: fx.Node) -> Tensor:
    """The factors of the output channels, shaped for the weight."""
    if "transpose" not in kind(layer):
        return factor.view(-1, *[1] * (weight.dim() - 1))
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    groups = int((dict(zip(names, layer.args, strict=False)) | layer.kwargs).get("groups", 1))  # type: ignore[arg-type]
    inputs = weight.shape[0] // groups  # weight [I, O / groups, ...]
    return (
        factor.view(groups, 1, -1)
        .expand(-1, inputs, -1)
        .reshape(weight.shape[:2])
        .view(*weight.shape[:2], *[1] * (weight.dim() - 2))
    )


def _value(module: fx.GraphModule, argument: object) -> Tensor | None:
    if not isinstance(argument, fx.Node):
        return None
    owner, leaf = _owner(module, str(argument.target))
    value = getattr(owner, leaf)
    assert isinstance(value, Tensor)
    return value.detach()


def _set(module: fx.GraphModule, name: str, value: Tensor) -> None:
    owner, leaf = _owner(module, name)
    setattr(owner, leaf, nn.Parameter(value.clone()))


def _owner(module: fx.GraphModule, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return (module.get_submodule(path) if path else module), leaf


def _drop_unused(module: fx.GraphModule) -> None:
    """Weights and statistics that no node reads any more."""
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for owner_name, owner in list(module.named_modules()):
        for leaf in [*owner._parameters, *owner._buffers]:
            name = f"{owner_name}.{leaf}".lstrip(".")
            if name not in used:
                delattr(owner, leaf)
