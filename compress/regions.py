"""Regions of a graph that torch.export keeps apart: what ran under ``torch.no_grad()`` stands in a graph of its own."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

__all__ = ["inline_regions"]

_GRADIENT_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled


def inline_regions(module: fx.GraphModule) -> None:
    """Put what ran under ``torch.no_grad()`` back into the graph around it, its results detached, in place.

    Whoever reads the graph then sees every operator and every weight: pruning, exporters, the switch between modes.

    Example:
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body, self.head = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)
        ...     def forward(self, x):
        ...         with torch.no_grad():
        ...             y = self.body(x)
        ...         return self.head(y)
        >>> module = torch.export.export(Net(), (torch.zeros(1, 4),)).module()
        >>> inline_regions(module)
        >>> [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
        ['aten.linear.default', 'aten.detach.default', 'aten.linear.default']
    """
    while regions := [n for n in module.graph.nodes if n.op == "call_function" and n.target is _GRADIENT_REGION]:
        for node in regions:
            _inline(module, node)
    module.graph.lint()
    module.recompile()


def _inline(module: fx.GraphModule, node: fx.Node) -> None:
    arguments: Any = node.args
    enabled, body, *operands = arguments
    assert isinstance(body, fx.Node)
    inner = module.get_submodule(str(body.target))
    assert isinstance(inner, fx.GraphModule)
    copies: dict[fx.Node, Any] = dict(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))
    with module.graph.inserting_before(node):
        for n in inner.graph.nodes:
            if n.op not in ("placeholder", "output"):
                copies[n] = module.graph.node_copy(n, copies.__getitem__)
        outputs: Any = inner.graph.output_node().args[0]
        results: list[Any] = [fx.map_arg(n, copies.__getitem__) for n in outputs]
        if not enabled:
            results = [_detached(module.graph, r) for r in results]
    for user in list(node.users):
        assert user.target is operator.getitem
        index: Any = user.args[1]
        user.replace_all_uses_with(results[index])
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    if not body.users:
        module.graph.erase_node(body)


def _detached(graph: fx.Graph, value: Any) -> Any:
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return value
    result = graph.call_function(torch.ops.aten.detach.default, (value,))
    result.meta.update(value.meta)
    return result
