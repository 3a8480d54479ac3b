"""Round: weights onto the grid of the quantized file so that the layers' outputs move least, not each weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import RecipeError
from .fold import folded
from .layerwise import LAYERS, LayerByLayer, examples, kind
from .network import Network
from .passes import describe
from .quantization import quantization
from .task import Task

__all__ = ["Round", "gptq", "grid_scale"]

_DAMPING = 0.01  # GPTQ's share of the mean diagonal, of the paper
_SHRINK = 0.4  # how far a channel's range may be clipped
_STEPS = 41


@dataclass(frozen=True)
class Round:
    """Fold batch normalisation and put every weight on the grid that the writers use, rounding up or down as the inputs want.

    A file that stores these weights in ``precision`` holds them exactly. Rounding to nearest is best for each weight alone;
    GPTQ (Frantar et al. 2023, https://arxiv.org/abs/2210.17323) makes up for a rounding error with the weights not yet rounded.
    No labels are needed, and no training. What changes weights afterwards undoes it.

    Args:
        precision: ``'int8'`` or ``'w4a8'``: whose weights.
        batches: of training data that are looked at.

    Raises:
        RecipeError: a precision without integer weights of one scale per channel.
        TaskError: no batches to look at.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> model, x = torch.nn.Linear(3, 1, bias=False), torch.tensor([[1.0, 1.0, 0.0]])
        >>> model.weight.data = torch.tensor([[0.7, 0.04, 0.0]])
        >>> task = Task(model, x, lambda predict: {"score": 0.0}, "score", train_batches=[(x, x)])
        >>> Round("w4a8")(trace(model, x), task).module.get_parameter("weight").data
        tensor([[0.7000, 0.0000, 0.0000]])
    """

    precision: str = "w4a8"
    batches: int = 4

    def __post_init__(self) -> None:
        numbers = quantization(self.precision).weights
        if numbers is None or numbers.kind != "int" or numbers.per != "channel":
            raise RecipeError(f"Round(precision='{self.precision}') makes no sense: take int8 or w4a8.")
        if not isinstance(self.batches, int) or self.batches < 1:
            raise RecipeError(f"Round(batches={self.batches!r}) makes no sense: it is a whole number of at least 1.")

    def __call__(self, network: Network, task: Task) -> Network:
        """Return the rounded network in evaluation mode; ``network`` stays as it was."""
        rounded = folded(network)
        chosen: dict[torch.fx.Node, str] = {}
        for node in rounded.module.graph.nodes:
            weight = node.args[1] if kind(node) in LAYERS else None
            if isinstance(weight, torch.fx.Node) and weight.op == "get_attr" and str(weight.target) not in chosen.values():
                chosen[node] = str(weight.target)
        top = self._top
        with torch.no_grad():
            LayerByLayer(rounded, chosen, lambda w, h: gptq(w, h, grid_scale(w, top), top)).run(
                *examples(rounded, task, self.batches)
            )
        return rounded.then(**{"pass": "Round"}, **describe(self), found={"weights": list(chosen.values())})

    @property
    def _top(self) -> int:
        numbers = quantization(self.precision).weights
        assert numbers is not None
        return numbers.limits[1]


def grid_scale(weight: Tensor, top: int) -> Tensor:
    """The step of each row's grid for which rounding and clipping lose the least, squared.

    Args:
        weight: ``[O, K]``.
        top: the largest integer; the grid is symmetric.

    Returns:
        ``[O, 1]``. Some weight of each row is clipped to, or lies at, an end of the grid, so that the rule of the writers,
        ``max |w| / top``, finds the same step again.

    Example:
        >>> import torch
        >>> grid_scale(torch.tensor([[-127.0, 1.0, 0.5]]), 127)
        tensor([[1.]])
    """
    widest = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / top
    best, least = widest, torch.full_like(widest, torch.inf)
    for part in torch.linspace(1.0, 1.0 - _SHRINK, _STEPS).tolist():
        scale = widest * part
        error = ((weight / scale).round().clamp(-top, top) * scale - weight).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def gptq(weight: Tensor, hessian: Tensor, scale: Tensor, top: int) -> Tensor:
    """Round weights to a grid, each column's error made up for by the columns after it.

    Frantar et al. 2023, "GPTQ", with columns in the order of falling ``H_jj`` (their "act-order"). The largest weight of a row
    goes to the end of the grid, so that the grid can be told from the weights.

    Args:
        weight: ``[O, K]``.
        hessian: ``X X^T`` of the layer's inputs ``X [K, samples]``.
        scale: ``[O, 1]``, the step of each row.
        top: the largest integer; the grid is symmetric.

    Returns:
        Weights ``[O, K]``, whole multiples of ``scale``.

    Example:
        >>> import torch
        >>> alike = torch.ones(2, 2) + 0.01 * torch.eye(2)  # two inputs that are nearly always the same
        >>> gptq(torch.tensor([[7.0, 1.4], [7.4, 1.4]]), alike, torch.ones(2, 1), 7)  # what 7.4 lost, 1.4 gains
        tensor([[7., 1.],
                [7., 2.]])
    """
    w, h, step = weight.double().clone(), hessian.double().clone(), scale.double()
    h.diagonal()[h.diagonal() == 0] = 1.0  # an input that is always zero
    h.diagonal().add_(_DAMPING * h.diagonal().mean())
    order = h.diagonal().argsort(descending=True, stable=True)
    w, h = w[:, order], h[order][:, order]
    ends = torch.zeros_like(w, dtype=torch.bool).scatter_(1, w.abs().argmax(1, keepdim=True), True)
    end = w.sign() * top * step
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for j in range(w.shape[1]):
        nearest = (w[:, j] / step[:, 0]).round().clamp(-top, top) * step[:, 0]
        nearest = torch.where(ends[:, j], end[:, j], nearest)
        error = (w[:, j] - nearest) / upper[j, j]
        w[:, j + 1 :] -= torch.outer(error, upper[j, j + 1 :])
        w[:, j] = nearest
    return w[:, order.argsort()].to(weight.dtype)
