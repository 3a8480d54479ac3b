"""Operators that PyTorch makes of others: each is put into the graph as those, so that nobody needs to know it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._decomp import get_decompositions
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

__all__ = ["split_composites"]

_COMPOSITES = {
    *("broadcast_tensors", "dstack", "hsplit", "vsplit", "dsplit", "row_stack", "ravel", "msort", "positive", "one_hot"),
    *("linalg_matmul", "linalg_multi_dot", "chain_matmul", "linalg_matrix_norm", "frobenius_norm", "kron", "ger"),
    *("rot90", "quantile", "nanquantile", "trapezoid", "trapz", "cumulative_trapezoid", "gradient"),
}


def split_composites(module: fx.GraphModule) -> None:
    """Put what a rare operator is composed of in its place: of a quantile, a sort and a choice.

    Args:
        module: of ``torch.export``, changed in place. An operator that does not come apart stays as it is.

    Example:
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         return torch.dstack([x, x])
        >>> module = torch.export.export(Net(), (torch.zeros(1, 4, 2),)).module()
        >>> split_composites(module)
        >>> [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
        ['aten.cat.default']
    """
    for node in list(module.graph.nodes):
        if _is_composite(node) and (parts := _parts(node)) is not None:
            _put(module.graph, node, parts)
    module.recompile()


def _is_composite(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._schema.name.removeprefix("aten::")
    return name in _COMPOSITES or name.startswith("special_")


def _parts(node: fx.Node) -> fx.Graph | None:
    """A graph from the node's operands to its result."""
    target: Any = node.target
    made = get_decompositions([target]).get(target, target.decompose)
    leaves, shape = pytree.tree_flatten((node.args, node.kwargs))

    def run(*operands: Any) -> Any:
        given = iter(operands)
        args, kwargs = pytree.tree_unflatten([next(given) if isinstance(x, fx.Node) else x for x in leaves], shape)
        return made(*args, **kwargs)

    operands = [x.meta.get("val") for x in leaves if isinstance(x, fx.Node)]
    mode = detect_fake_mode(operands)
    if mode is None:
        return None
    try:
        with mode, torch.no_grad():
            graph: fx.Graph = make_fx(run)(*operands).graph
    except Exception:  # it is not made of others, or looks at numbers that are not known yet
        return None
    return None if graph.find_nodes(op="get_attr") else graph


def _put(graph: fx.Graph, node: fx.Node, parts: fx.Graph) -> None:
    operands = [x for x in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(x, fx.Node)]
    copies: dict[fx.Node, Any] = dict(zip(parts.find_nodes(op="placeholder"), operands, strict=True))
    belongs = {key: value for key, value in node.meta.items() if key in ("nn_module_stack", "stack_trace", "source_fn_stack")}
    with graph.inserting_before(node):
        for part in parts.nodes:
            if part.op not in ("placeholder", "output"):
                copies[part] = graph.node_copy(part, copies.__getitem__)
                copies[part].meta.update(belongs)
    result: Any = fx.map_arg(parts.output_node().args[0], copies.__getitem__)
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    for user in list(node.users):  # of several results: what takes one of them
        assert user.target is operator.getitem
        index: Any = user.args[1]
        user.replace_all_uses_with(result[index])
        graph.erase_node(user)
    graph.erase_node(node)
