"""Random numbers that come out the same whenever, and after whatever interruption, they are drawn."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import TaskError

__all__ = ["FixedDraws", "deterministic", "draws", "kept_random", "reproducible"]

T = TypeVar("T")

_DRAWS = {
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "uniform", "bernoulli"),
    *("multinomial", "poisson", "binomial", "exponential", "cauchy", "geometric", "log_normal", "random"),
}


def _state() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _restore(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])


@contextlib.contextmanager
def kept_random() -> Iterator[None]:
    """Behind the block, the generators of torch (on the CPU), numpy and python go on as if it had drawn nothing.

    Example:
        >>> before = torch.get_rng_state()
        >>> with kept_random():
        ...     _ = torch.manual_seed(1), random.random()
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    state = _state()
    try:
        yield
    finally:
        _restore(state)


def reproducible(batches: Callable[[], Iterable[T]], seed: int) -> Iterator[T]:
    """What ``batches`` gives, its random numbers drawn from generators of torch, numpy and python that nothing else draws from.

    The n-th batch is then the same whether anyone trained on those before or skipped them, which is what going on in the middle
    of an epoch needs.

    Args:
        batches: called once.
        seed: of all three generators.

    Example:
        >>> def noise():
        ...     return (round(random.random(), 3) for _ in range(3))
        >>> [(x, random.seed(5))[0] for x in reproducible(noise, 0)] == list(reproducible(noise, 0))
        True
    """
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    for batch in batches():
        own = _state()
        yield batch
        _restore(own)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch computes with kernels that give the same bits every time, where ``wanted``.

    Raises:
        TaskError: the network has an operator without such a kernel on its device.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise TaskError(f"{str(error).split('. ')[0]}: train with deterministic=False, or on the CPU.") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


def _is_draw(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.name.removeprefix("aten::").rstrip("_") in _DRAWS


def draws(module: fx.GraphModule) -> list[fx.Node]:
    """The operators that draw random numbers for the outputs in evaluation mode too; dropout does not.

    Example:
        >>> class Sampled(torch.nn.Module):
        ...     def forward(self, x):
        ...         _ = torch.rand(1)
        ...         return torch.dropout(x, 0.5, self.training) + torch.randn_like(x)
        >>> [node.name for node in draws(torch.export.export(Sampled().eval(), (torch.zeros(2),)).module())]
        ['randn_like']
    """
    needed = {module.graph.output_node()}
    for node in reversed(module.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in module.graph.nodes if node in needed and _is_draw(node.target)]


class FixedDraws(TorchDispatchMode):
    """Inside, whatever is drawn is one half (of whole numbers zero, of truth values true), so that two networks of unlike sizes
    can be compared.

    Example:
        >>> with FixedDraws():
        ...     torch.randn(2).tolist(), torch.randperm(2).tolist()
        ([0.5, 0.5], [0, 0])
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        result = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(result) if _is_draw(func) else ():
            if isinstance(value, Tensor):
                value.fill_(0.5 if value.is_floating_point() else value.dtype is torch.bool)
        return result
