"""LSTMs with projections, which ONNX has no operator for, as plain ones."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from edgepress.compress.errors import FileError

__all__ = ["plain_lstms", "unprojected_lstm"]

_ZEROS = torch.ops.aten.zeros.default, torch.ops.aten.zeros_like.default, torch.ops.aten.new_zeros.default


def plain_lstms(module: fx.GraphModule) -> fx.GraphModule:
    """Put `unprojected_lstm` in the place of every LSTM with projections, in place.

    Raises:
        FileError: one of them starts from a state of its own.

    Example:
        >>> plain_lstms(fx.symbolic_trace(torch.nn.ReLU()))(torch.tensor([-1.0, 1.0]))
        tensor([0., 1.])
    """
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.lstm.input):
        _, (start, _), weights, has_biases, layers, _, _, bidirectional, _ = node.args
        if len(weights) // (layers * (1 + bidirectional)) == (4 if has_biases else 2):
            continue
        if start.target not in _ZEROS:
            raise FileError("An LSTM with projections can only be written where its hidden state starts from zeros.")
        node.target = unprojected_lstm
    module.recompile()
    return module


def unprojected_lstm(
    x: Tensor,
    states: tuple[Tensor, Tensor],
    weights: list[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`aten.lstm.input` with projections, in evaluation mode and from a hidden state of zeros, without projections inside.

    A projected LSTM (Sak et al. 2014, arXiv:1402.1128) hands on ``h = W_hr m``, where m is what a plain one hands on. Its gates
    read h only through ``W_hh h = (W_hh W_hr) m``: a plain LSTM with that product as its recurrent weight gives m, and W_hr is
    left for behind it.

    Args:
        x: ``[N, T, C]`` where ``batch_first``, else ``[T, N, C]``.
        states: ``h [layers * directions, N, P]``, all zeros, and ``c [layers * directions, N, H]``.
        weights: of each layer and direction ``W_ih [4H, C or directions * P]``, ``W_hh [4H, P]``, two biases ``[4H]`` where there
            are any, and ``W_hr [P, H]``.

    Returns:
        What the operator returns: the output ``[N, T, directions * P]``, and the last h and c.

    Example:
        >>> lstm = torch.nn.LSTM(3, 8, proj_size=2, batch_first=True).double()
        >>> x, start = torch.randn(1, 5, 3).double(), (torch.zeros(1, 1, 2).double(), torch.zeros(1, 1, 8).double())
        >>> plain = unprojected_lstm(x, start, lstm._flat_weights, True, 1, 0.0, False, False, True)
        >>> torch.allclose(plain[0], lstm(x)[0])
        True
    """
    directions, each = 1 + bidirectional, 5 if has_biases else 3
    hidden: list[Tensor] = []
    cells: list[Tensor] = []
    for layer in range(layers):
        units = [weights[i : i + each] for i in range(layer * directions * each, (layer + 1) * directions * each, each)]
        plain = [w for w_ih, w_hh, *biases, w_hr in units for w in (w_ih, w_hh @ w_hr, *biases)]
        cell = states[1][layer * directions : (layer + 1) * directions]
        y, h, c = torch.ops.aten.lstm.input(
            x, [torch.zeros_like(cell), cell], plain, has_biases, 1, 0.0, False, bidirectional, batch_first
        )
        x = torch.cat([F.linear(part, unit[-1]) for part, unit in zip(y.chunk(directions, -1), units, strict=True)], -1)
        hidden += [F.linear(part, unit[-1]) for part, unit in zip(h.unbind(), units, strict=True)]
        cells.append(c)
    return x, torch.stack(hidden), torch.cat(cells)
