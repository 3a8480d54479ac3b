"""Several processes that train one network: ``torchrun --nproc-per-node 2 ...`` with no change to the task.

Every process reads the same batches and computes its slice of each; gradients are summed, and batch normalisation takes its
statistics over all slices. The result is that of one process, up to the order of additions.
"""

from __future__ import annotations

import atexit
import datetime
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from .errors import TaskError, UserError

__all__ = ["World", "join", "synchronised"]

T = TypeVar("T")

_PATIENCE = datetime.timedelta(hours=6)  # the others wait while the first evaluates
_TRAINING = 5  # of batch_norm's arguments


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Args:
        rank: 0 for the first one, which alone writes checkpoints and logs and evaluates.
        size: how many there are.

    Example:
        >>> World().share((torch.arange(4),), torch.arange(4)), World(1, 2).share((torch.arange(4),), {"y": torch.arange(4)})
        (((tensor([0, 1, 2, 3]),), tensor([0, 1, 2, 3])), ((tensor([2, 3]),), {'y': tensor([2, 3])}))
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, inputs: tuple[Tensor, ...], targets: Any) -> tuple[tuple[Tensor, ...], Any]:
        """This process's slice of a batch; of the targets, tensors as long as the batch are sliced.

        Raises:
            TaskError: fewer examples than processes.
        """
        if self.size == 1:
            return inputs, targets
        count = len(inputs[0])
        if count < self.size:
            raise TaskError(f"A batch of {count} cannot be shared by {self.size} processes: give larger ones (drop_last=True).")
        part = slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

        def cut(value: Any) -> Any:
            return value[part] if isinstance(value, Tensor) and value.dim() and len(value) == count else value

        return tuple(x[part] for x in inputs), tree_map(cut, targets)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Sum each tensor over all processes, in place, in one exchange."""
        chosen = list(tensors)
        if self.size == 1 or not chosen:
            return
        flat = torch.cat([t.detach().reshape(-1) for t in chosen])
        dist.all_reduce(flat)
        for tensor, total in zip(chosen, flat.split([t.numel() for t in chosen]), strict=True):
            tensor.detach().copy_(total.view_as(tensor))

    def agree(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; what it raises of ours, too."""
        if self.size == 1:
            return make()
        box: list[Any] = [None]
        if self.first:
            try:
                box = [make()]
            except UserError as error:
                box = [error]
        dist.broadcast_object_list(box)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def align(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                plain = tensor.detach().contiguous()
                dist.broadcast(plain, 0)
                tensor.detach().copy_(plain)

    def gathered(self, text: str) -> str:
        """The first text that is not empty."""
        if self.size == 1:
            return text
        texts: list[Any] = [""] * self.size
        dist.all_gather_object(texts, text)
        return next((t for t in texts if t), "")


def join(device: torch.device) -> World:
    """The processes that ``torchrun`` started, joined through gloo on CPUs and nccl on GPUs; one where it started none.

    Example:
        >>> join(torch.device("cpu"))
        World(rank=0, size=1)
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not (dist.is_available() and dist.is_initialized()):
        return World()
    if not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes do not meet ({str(error).splitlines()[0]}): start "
                "them with torchrun, or unset WORLD_SIZE."
            ) from error
        atexit.register(_leave)
    return World(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def synchronised(module: fx.GraphModule) -> fx.GraphModule:
    """Let the batch normalisations of a graph in training mode see the examples of all processes, in place."""
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default):
        if node.args[_TRAINING]:
            node.target = _batch_norm
    module.recompile()
    return module


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> Tensor:
    """``aten.batch_norm`` in training mode, on this process's examples with the statistics of all."""
    result, batch_mean, batch_var, count = _Normalise.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    if mean is not None and var is not None:
        with torch.no_grad():
            mean.lerp_(batch_mean.to(mean.dtype), momentum)
            var.lerp_((batch_var * count / (count - 1)).to(var.dtype), momentum)
    return result  # type: ignore[no-any-return]


class _Normalise(torch.autograd.Function):
    """Batch normalisation over all processes (Ioffe and Szegedy 2015, with sums exchanged)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide = x.float()
        sums = torch.cat([wide.sum(dims), wide.new_tensor([x.numel() / x.shape[1]])])
        dist.all_reduce(sums)
        count = sums[-1]
        mean = sums[:-1] / count
        centred = wide - mean.view(shape)
        squares = centred.square().sum(dims)
        dist.all_reduce(squares)
        var = squares / count
        inverse = (var + eps).rsqrt()
        scale = inverse if weight is None else inverse * weight
        result = centred * scale.view(shape)
        if bias is not None:
            result = result + bias.view(shape)
        ctx.save_for_backward(x, weight, mean, inverse, count)
        ctx.dims, ctx.shape, ctx.has_bias = dims, shape, bias is not None
        ctx.mark_non_differentiable(mean, var, count)
        return result.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, inverse, count = ctx.saved_tensors
        grad = grads[0].float()
        normal = (x.float() - mean.view(ctx.shape)) * inverse.view(ctx.shape)
        own = torch.stack([grad.sum(ctx.dims), (grad * normal).sum(ctx.dims)])
        total = own.clone()
        dist.all_reduce(total)
        scale = inverse if weight is None else inverse * weight
        sums = total / count
        through = scale.view(ctx.shape) * (grad - sums[0].view(ctx.shape) - normal * sums[1].view(ctx.shape))
        return (
            through.to(x.dtype),
            own[1].to(weight.dtype) if weight is not None else None,
            own[0] if ctx.has_bias else None,
            None,
        )
