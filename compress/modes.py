"""Switch an exported graph between training and evaluation.

``torch.export`` bakes the mode into the operators' arguments. Graphs are exported in evaluation mode and switched here,
operator by operator: the dropout family, batch normalisation, recurrent layers and attention carry the flag, and
`torch.nn.Module.train` refuses to act on an exported module. What evaluation mode leaves out of the graph cannot come back:
attention modules export a dropout probability of 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["set_mode"]

aten = torch.ops.aten

# operator -> index of its boolean 'training' argument
_FLAG: dict[Any, int] = {
    aten.dropout.default: 2,
    aten.dropout_.default: 2,
    aten.feature_dropout.default: 2,
    aten.feature_dropout_.default: 2,
    aten.alpha_dropout.default: 2,
    aten.alpha_dropout_.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.batch_norm.default: 5,
    aten.instance_norm.default: 5,
    aten.lstm.input: 6,
    aten.gru.input: 6,
    aten.rnn_tanh.input: 6,
    aten.rnn_relu.input: 6,
    aten.rrelu.default: 3,
}
_RUNNING_MEAN = 3  # of batch_norm and instance_norm


def set_mode(graph: fx.GraphModule, training: bool) -> None:
    """Switch ``graph`` in place.

    A batch normalisation without running statistics always uses the batch's own, so its flag stays as it was exported.
    """
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is aten.scaled_dot_product_attention.default:
            _attention_dropout(node, training)
            continue
        index = _FLAG.get(node.target)
        if index is None:
            continue
        if node.target in (aten.batch_norm.default, aten.instance_norm.default) and node.args[_RUNNING_MEAN] is None:
            continue
        # instance_norm's flag is use_input_stats: with running statistics it follows the mode like batch_norm's
        if len(node.args) > index:
            node.update_arg(index, training)
        else:  # left at its default
            node.update_kwarg(node.target._schema.arguments[index].name, training)
    graph.training = training
    graph.recompile()


def _attention_dropout(node: fx.Node, training: bool) -> None:
    """Attention takes a probability, not a flag: remember it, and pass 0 when evaluating."""
    where: Any = 4 if len(node.args) > 4 else "dropout_p"
    current = node.args[4] if where == 4 else node.kwargs.get("dropout_p", 0.0)
    probability = node.meta.setdefault("dropout_p", current)
    value = probability if training else 0.0
    if where == 4:
        node.update_arg(4, value)
    elif "dropout_p" in node.kwargs:
        node.update_kwarg("dropout_p", value)
