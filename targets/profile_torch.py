"""Times by operator of a network's graph in PyTorch, in the same terms as those of a file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from edgepress.compress.errors import UserError
from edgepress.compress.network import Network

from .agent.torch_session import open_program
from .artifact import Artifact
from .profile import Profile, Timed, alternate, check_numbers, finish, kept
from .runtimes import open_runtime, random_feeds

__all__ = ["profile_network", "profile_pt2"]


def profile_network(network: Network, threads: int = 1, feeds: Sequence[np.ndarray] | None = None, runs: int = 50) -> Profile:
    """Time each operator of a network's graph in PyTorch, eager, on the CPU, one after the other.

    Args:
        network: what `trace` or a pass gave; it is left as it was.
        threads: that PyTorch may use meanwhile.
        feeds: inputs in the network's layout; the first of its example inputs where None.
        runs: with the clock around each operator, and as many without.

    Raises:
        UserError: fewer than 1 thread or 3 runs.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> network = trace(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()), torch.zeros(1, 8))
        >>> [(row.operator, row.module) for row in profile_network(network, runs=5).rows]
        [('aten.linear', '0'), ('aten.tanh', '1')]
    """
    check_numbers(threads, runs)
    module = network.copy().to("cpu").eval().module
    inputs = [x[:1] for x in network.example_inputs] if feeds is None else [torch.as_tensor(x) for x in feeds]
    return _profiled("network", module, module, inputs, threads, runs)


def profile_pt2(artifact: Artifact, threads: int, feeds: Sequence[np.ndarray] | None, runs: int) -> Profile:
    """See `edgepress.targets.profile.profile`; ``artifact`` is a ``.pt2`` file, run eager on the CPU."""
    arrays = list(feeds) if feeds is not None else random_feeds(artifact)
    open_runtime(artifact, threads).run(arrays)  # what does not fit, or is not to be trusted, is refused in its words
    program = open_program(str(artifact.path), "torch", threads)
    if program.device.type != "cpu":  # the clock below does not wait for a GPU
        raise UserError(f"{artifact.path.name} is profiled on the CPU: unset EDGEPRESS_TORCH_DEVICE.")
    inputs = program.placed(arrays)
    return _profiled(artifact.path.name, program.module, program.call_for(inputs), inputs, threads, runs)


def _profiled(
    subject: str, module: fx.GraphModule, call: Callable[..., Any], inputs: Sequence[Any], threads: int, runs: int
) -> Profile:
    """Time a graph's operators; ``call`` runs it on the same flat inputs without a clock inside."""
    clock = _Clock(module)
    with torch.no_grad(), _torch_threads(threads):
        plain, profiled = alternate(lambda: call(*inputs), lambda: clock.timed_run(*inputs), runs)
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    timed = [_timed_node(node, samples) for node, *samples in zip(nodes, *kept(clock.readings, runs), strict=True)]
    return finish(
        timed, subject=subject, runtime="torch", version=torch.__version__, threads=threads, runs=runs,
        plain_ns=float(np.median(plain)), profiled_ns=float(np.median(profiled)),
        method="A clock around each operator of the graph, called from Python: what PyTorch takes for a call is in it.",
    )  # fmt: skip


class _Clock(fx.Interpreter):
    """Runs a graph node by node, with a clock around each operator."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.readings: list[list[int]] = []

    def timed_run(self, *inputs: Any) -> None:
        self.readings.append([])
        self.run(*inputs, enable_io_processing=False)  # inputs are flat already

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        start = time.perf_counter_ns()
        result = target(*args, **kwargs)
        self.readings[-1].append(time.perf_counter_ns() - start)
        return result


def _timed_node(node: fx.Node, samples: Sequence[int]) -> Timed:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    value = node.meta.get("val")
    first = value[0] if isinstance(value, list | tuple) and value else value
    dtype = str(getattr(first, "dtype", "")).removeprefix("torch.")
    operator = ".".join(str(node.target).split(".")[:2])
    return Timed(node.name, operator, stack[-1][0] if stack else "", f"eager {dtype}".strip(), samples)


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
