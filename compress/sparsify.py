"""Sparsify: single weights become zero, the shapes stay; recovery holds the zeros.

Zeros make a file smaller only once it is compressed, and faster only where the runtime has kernels that skip them
(docs/sparsity.md). Masks are pure functions of scores; SparseGPT also corrects the weights that stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from .errors import RecipeError
from .layerwise import LAYERS, LayerByLayer, examples, kind, some_batches
from .network import Network
from .passes import describe
from .pruning.scores import label_free_loss
from .task import Task, labelled_loss

__all__ = ["Sparsify", "dense_twin", "keep_largest", "keep_n_of_m", "sparsegpt", "taylor"]

_LEAST = 0.01  # of each layer's weights stays under a global threshold, so that no layer dies
_COLUMNS = 128  # SparseGPT's block size, of the paper
_DAMPING = 0.01  # SparseGPT's share of the mean diagonal, of the paper


@dataclass(frozen=True)
class Sparsify:
    """Set the least of the weights of convolutions and linear layers to zero.

    A recovery that follows (`Distill`) keeps them zero. Shapes, and so the time on most runtimes, stay as they were.

    Args:
        sparsity: part of the weights that become zero, 0.5 where None; follows from ``pattern`` where that is N:M.
        pattern: 'unstructured', or 'N:M': of every M neighbours along the input channels at most N stay (2:4 is what
            NVIDIA's sparse tensor cores take). Layers whose input channels M does not divide stay dense.
        method: 'magnitude' (Han et al. 2015), 'taylor' (abs(w * gradient), mean over batches) or 'sparsegpt' (Frantar and
            Alistarh 2023), which needs no labels.
        scope: 'layer', the same sparsity in each, or 'global', one threshold for the scores of all.
        keep_first: leave the first layer dense: it is small and sees the input itself.
        keep_last: leave the last layer dense.
        batches: of training data that 'taylor' and 'sparsegpt' look at.

    Raises:
        RecipeError: a setting that makes no sense, or no layer left to sparsify.
        TaskError: no batches to look at.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)), torch.zeros(1, 4)
        >>> task = Task(model, x, lambda predict: {"score": 0.0}, "score")
        >>> sparse = Sparsify(sparsity=0.75)(trace(model, x), task)
        >>> sparse.history[0]["found"]
        {'zeros': 12, 'of': 16, 'layers': [{'weight': '1.weight', 'zeros': 12, 'of': 16}], 'dense': ['0.weight']}
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    method: Literal["magnitude", "taylor", "sparsegpt"] = "magnitude"
    scope: Literal["layer", "global"] = "layer"
    keep_first: bool = True
    keep_last: bool = False
    batches: int = 16

    def __post_init__(self) -> None:
        if self.method not in ("magnitude", "taylor", "sparsegpt") or self.scope not in ("layer", "global"):
            raise RecipeError("Sparsify's method is magnitude, taylor or sparsegpt, and its scope is layer or global.")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise RecipeError(f"Sparsify(sparsity={self.sparsity}) makes no sense: it is the part to zero, between 0 and 1.")
        if self.pattern != "unstructured":
            n, m = self._n_of_m() or (0, 0)
            if not 0 < n < m:
                raise RecipeError(f"Sparsify(pattern='{self.pattern}') makes no sense: take 'unstructured', or N:M such as 2:4.")
            if self.sparsity is not None or self.scope == "global":
                raise RecipeError(f"Sparsify(pattern='{self.pattern}') sets every layer's sparsity: give no other, nor scope.")
        if self.method == "sparsegpt" and self.scope == "global":
            raise RecipeError("Sparsify's sparsegpt goes layer by layer, each with its own inputs: take scope: layer.")
        if not isinstance(self.batches, int) or self.batches < 1:
            raise RecipeError(f"Sparsify(batches={self.batches!r}) makes no sense: it is a whole number of at least 1.")

    def __call__(self, network: Network, task: Task) -> Network:
        """Return the sparse network; ``network`` stays as it was."""
        sparse = network.copy().eval()
        chosen, dense = self._layers(sparse)
        if not chosen:
            raise RecipeError(f"Sparsify finds no layer for pattern: {self.pattern} besides those that stay dense: {dense}.")
        with torch.no_grad():
            if self.method == "sparsegpt":
                LayerByLayer(sparse, chosen, lambda w, h: sparsegpt(w, h, self._amount)).run(
                    *examples(sparse, task, self.batches)
                )
            else:
                scores = self._scores(sparse, task, chosen)
                for name, mask in self._masks(scores).items():
                    sparse.module.get_parameter(name).mul_(mask)
        zeros = {name: int((sparse.module.get_parameter(name) == 0).sum()) for name in chosen.values()}
        layers = [{"weight": n, "zeros": z, "of": sparse.module.get_parameter(n).numel()} for n, z in zeros.items()]
        found = {
            "zeros": sum(zeros.values()),
            "of": sum(sparse.module.get_parameter(n).numel() for n in zeros),
            "layers": layers,
            "dense": dense,
        }
        return sparse.then(**{"pass": "Sparsify"}, **describe(self), found=found)

    def _corrected(self, weight: Tensor, hessian: Tensor) -> Tensor:
        return sparsegpt(weight, hessian, self._amount)

    def _n_of_m(self) -> tuple[int, int] | None:
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def _amount(self) -> float | tuple[int, int]:
        return self._n_of_m() or (0.5 if self.sparsity is None else self.sparsity)

    def _layers(self, network: Network) -> tuple[dict[fx.Node, str], list[str]]:
        """Calls and the weights that they read, and the names of weights that stay dense."""
        found: dict[fx.Node, str] = {}
        for node in network.module.graph.nodes:
            weight = node.args[1] if kind(node) in LAYERS else None
            if isinstance(weight, fx.Node) and weight.op == "get_attr" and str(weight.target) not in found.values():
                found[node] = str(weight.target)
        names = list(found.values())
        dense = names[:1] * self.keep_first + names[-1:] * self.keep_last
        step = (self._n_of_m() or (0, 1))[1]
        dense += [n for n in names if n not in dense and network.module.get_parameter(n).shape[1] % step]
        return {node: name for node, name in found.items() if name not in dense}, dense

    def _scores(self, network: Network, task: Task, chosen: dict[fx.Node, str]) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {name: network.module.get_parameter(name) for name in chosen.values()}
        if self.method == "magnitude":
            return {name: w.abs() for name, w in weights.items()}
        scores = {name: torch.zeros_like(w) for name, w in weights.items()}
        for gradients in _gradients(network, task, weights, self.batches):
            for name, gradient in gradients.items():
                scores[name] += taylor(weights[name], gradient)
        return scores

    def _masks(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        amount = self._amount
        if isinstance(amount, tuple):
            return {name: keep_n_of_m(s, *amount, dim=1) for name, s in scores.items()}
        if self.scope == "layer":
            return {name: keep_largest(s, amount) for name, s in scores.items()}
        whole = keep_largest(torch.cat([s.flatten() for s in scores.values()]), amount)
        parts = whole.split([s.numel() for s in scores.values()])
        return {
            name: part.view(s.shape) | keep_largest(s, 1 - _LEAST) for (name, s), part in zip(scores.items(), parts, strict=True)
        }


def dense_twin(network: Network, seed: int = 0) -> Network:
    """The same network with small numbers in place of zeros: what its time is compared with. Its outputs mean nothing.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> network = trace(torch.nn.Linear(4, 2), torch.zeros(1, 4))
        >>> _ = network.module.get_parameter("weight").data.zero_()
        >>> bool((dense_twin(network).module.get_parameter("weight") != 0).all())
        True
    """
    twin, random = network.copy(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in twin.parameters():
            if p.is_floating_point():
                size = p.abs().max().clamp_min(1e-3)
                noise = (torch.rand(p.shape, generator=random) + 0.01).to(p) * 0.1 * size
                p.copy_(torch.where(p == 0, noise, p))
    return twin


# ---- masks


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """``|w g|``, the first-order change of the loss when a weight becomes zero (SNIP: Lee, Ajanthan, Torr 2019).

    Example:
        >>> import torch
        >>> taylor(torch.tensor([2.0, -3.0]), torch.tensor([0.5, 0.1]))
        tensor([1.0000, 0.3000])
    """
    return (weight * gradient).abs()


def keep_largest(scores: Tensor, sparsity: float) -> Tensor:
    """A mask of the shape of ``scores`` that is False at the ``sparsity`` part with the lowest, and True elsewhere.

    Example:
        >>> import torch
        >>> keep_largest(torch.tensor([[3.0, 1.0], [2.0, 4.0]]), 0.5)
        tensor([[ True, False],
                [False,  True]])
    """
    lowest = scores.flatten().argsort(stable=True)[: round(sparsity * scores.numel())]
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    return mask.index_fill_(0, lowest, False).view(scores.shape)


def keep_n_of_m(scores: Tensor, n: int, m: int, dim: int = -1) -> Tensor:
    """A mask that is True at the ``n`` highest of every ``m`` neighbours along ``dim``, whose length ``m`` divides.

    Source: Mishra et al. 2021, "Accelerating sparse deep neural networks", for 2:4.

    Example:
        >>> import torch
        >>> keep_n_of_m(torch.tensor([1.0, 4.0, 2.0, 3.0, 5.0, 0.0, 0.0, 6.0]), 2, 4)
        tensor([False,  True, False,  True,  True, False, False,  True])
    """
    rows = scores.movedim(dim, -1)
    best = rows.reshape(-1, m).argsort(dim=1, descending=True, stable=True)[:, :n]
    mask = torch.zeros(rows.numel() // m, m, dtype=torch.bool, device=scores.device).scatter_(1, best, True)
    return mask.view(rows.shape).movedim(-1, dim)


# ---- SparseGPT


def sparsegpt(weight: Tensor, hessian: Tensor, amount: float | tuple[int, int]) -> Tensor:
    """Zero a part of a layer's weights and correct the others so that the layer's outputs move least.

    Frantar and Alistarh 2023, "SparseGPT", algorithm 1: columns go from left to right, the error that a zeroed weight leaves is
    made up for by the columns right of it (Optimal Brain Surgeon: Hassibi and Stork 1993). The mask is chosen for each block
    of 128 columns, or each M columns, by ``w^2 / [H^-1]_jj``, when its turn comes.

    Args:
        weight: ``[O, K]``.
        hessian: ``X X^T`` of the layer's inputs ``X [K, samples]``.
        amount: part to zero, or (N, M).

    Returns:
        New weights ``[O, K]``.

    Example:
        >>> import torch
        >>> sparsegpt(torch.tensor([[3.0, 1.0]]), torch.eye(2), 0.5)  # uncorrelated inputs: by magnitude
        tensor([[3., 0.]])
    """
    w, h = weight.double().clone(), hessian.double().clone()
    dead = h.diagonal() == 0  # an input that is always zero: its weights do nothing
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    h.diagonal().add_(_DAMPING * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    columns = w.shape[1]
    width = amount[1] if isinstance(amount, tuple) else min(_COLUMNS, columns)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        scores = (w[:, start:stop] / upper.diagonal()[start:stop]).square()
        keep = keep_n_of_m(scores, *amount) if isinstance(amount, tuple) else keep_largest(scores, amount)
        for j in range(start, stop):
            error = w[:, j] * ~keep[:, j - start] / upper[j, j]
            w[:, j + 1 :] -= torch.outer(error, upper[j, j + 1 :])
            w[:, j] *= keep[:, j - start]
    return w.to(weight.dtype)


# ---- data


def _gradients(network: Network, task: Task, weights: dict[str, Tensor], count: int) -> Iterator[dict[str, Tensor]]:
    for seed, (inputs, targets) in enumerate(some_batches(task, count)):
        with torch.enable_grad():
            outputs = network(*(x.to(network.device) for x in inputs))
            targets = targets.to(network.device) if isinstance(targets, Tensor) else targets
            loss = label_free_loss(outputs, seed) if targets is None else labelled_loss(task, outputs, targets)
            yield dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
