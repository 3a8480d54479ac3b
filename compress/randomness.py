"""Random numbers that come out the same whenever, and after whatever interruption, they are drawn."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch

from .errors import TaskError

__all__ = ["deterministic", "kept_random", "reproducible"]

T = TypeVar("T")


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
