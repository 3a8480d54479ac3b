"""Training data mixed and labels softened: mixup, cutmix and label smoothing as a wrapper around a task's batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import RecipeError, TaskError
from .task import Batches

__all__ = ["mixed"]


def mixed(
    batches: Batches, classes: int, *, mixup: float = 0.0, cutmix: float = 0.0, smoothing: float = 0.0, seed: int = 0
) -> Callable[[int], Iterator[tuple[Any, Tensor]]]:
    """Batches with mixed inputs and soft targets ``[N, classes]``, for `Task.train_batches`.

    The same epoch gives the same batches. Where both mixings are asked for, each batch gets one of them, by chance.

    Args:
        batches: labelled, as `Task.train_batches` takes them; targets are class numbers ``[N]``. Soft ones are mixed as they are.
        classes: how many there are.
        mixup: alpha of the Beta distribution that weights come from (Zhang et al. 2018); 0.2 is usual, 0 is off.
        cutmix: alpha of the share of a pasted rectangle (Yun et al. 2019), for images ``[N, C, H, W]``; 1.0 is usual, 0 is off.
        smoothing: share of every label that is spread over all classes (Szegedy et al. 2016); 0.1 is usual.
        seed: of the mixing.

    Raises:
        RecipeError: a value that makes no sense.
        TaskError: batches that cannot be mixed, when they are read.

    Example:
        >>> data = [(torch.eye(2), torch.tensor([0, 1]))]
        >>> soft = mixed(lambda epoch: data, 2, smoothing=0.1)
        >>> next(soft(0))[1]
        tensor([[0.9500, 0.0500],
                [0.0500, 0.9500]])
    """
    if mixup < 0 or cutmix < 0 or not 0 <= smoothing < 1 or classes < 2:
        raise RecipeError("mixed() needs mixup and cutmix of at least 0, smoothing from 0 to below 1, and at least 2 classes.")

    def epoch_batches(epoch: int) -> Iterator[tuple[Any, Tensor]]:
        random = np.random.default_rng((seed, epoch))
        for inputs, targets in _read(batches, epoch):
            tensors = inputs if isinstance(inputs, tuple | list) else (inputs,)
            soft = _soft(targets, classes, smoothing)
            if mixup or cutmix:
                paste = bool(cutmix) and (not mixup or random.random() < 0.5)
                tensors, soft = (_cutmix if paste else _mixup)(tensors, soft, random, cutmix if paste else mixup)
            yield (tuple(tensors) if isinstance(inputs, tuple | list) else tensors[0]), soft

    return epoch_batches


def _read(batches: Batches, epoch: int) -> Iterator[tuple[Any, Any]]:
    source = batches(*(epoch,)[: len(inspect.signature(batches).parameters)]) if callable(batches) else batches
    for batch in source:
        if not isinstance(batch, tuple | list) or len(batch) != 2 or batch[1] is None:
            raise TaskError("mixed() needs labelled batches: pairs (inputs, targets).")
        yield batch[0], batch[1]


def _soft(targets: Any, classes: int, smoothing: float) -> Tensor:
    labels = torch.as_tensor(targets)
    if labels.is_floating_point() and labels.dim() == 2 and labels.shape[1] == classes:
        soft = labels
    elif labels.dim() == 1 and not labels.is_floating_point() and labels.min() >= 0 and labels.max() < classes:
        soft = F.one_hot(labels.long(), classes).float()
    else:
        raise TaskError(f"mixed() needs targets from 0 to {classes - 1} of shape [N]; a batch has {list(labels.shape)}.")
    return soft * (1 - smoothing) + smoothing / classes


def _mixup(inputs: Any, targets: Tensor, random: np.random.Generator, alpha: float) -> tuple[list[Tensor], Tensor]:
    kinds = {str(torch.as_tensor(x).dtype).removeprefix("torch.") for x in inputs if not torch.as_tensor(x).is_floating_point()}
    if kinds:
        raise TaskError(f"mixup mixes numbers; a batch's inputs are {', '.join(sorted(kinds))}: mixed() without mixup, please.")
    share = float(random.beta(alpha, alpha))
    other = torch.from_numpy(random.permutation(len(targets)))
    mix = [torch.as_tensor(x) * share + torch.as_tensor(x)[other] * (1 - share) for x in inputs]
    return mix, targets * share + targets[other] * (1 - share)


def _cutmix(inputs: Any, targets: Tensor, random: np.random.Generator, alpha: float) -> tuple[list[Tensor], Tensor]:
    if len(inputs) != 1 or torch.as_tensor(inputs[0]).dim() != 4:
        raise TaskError("cutmix pastes rectangles of images [N, C, H, W]: mixed() without cutmix for other inputs, please.")
    images = torch.as_tensor(inputs[0]).clone()
    height, width = images.shape[2:]
    side = float(np.sqrt(1 - random.beta(alpha, alpha)))
    row, column = int(random.integers(height)), int(random.integers(width))
    top, bottom = (int(np.clip(row + s * side * height / 2, 0, height)) for s in (-1, 1))
    left, right = (int(np.clip(column + s * side * width / 2, 0, width)) for s in (-1, 1))
    other = torch.from_numpy(random.permutation(len(targets)))
    images[:, :, top:bottom, left:right] = torch.as_tensor(inputs[0])[other][:, :, top:bottom, left:right]
    share = 1 - (bottom - top) * (right - left) / (height * width)  # of what is left of the image
    return [images], targets * share + targets[other] * (1 - share)
