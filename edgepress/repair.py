"""What is done about a quantized file that lost too much, or whose first layers integers make slower, and why one is slow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from edgepress.compress.equalize import Equalize
from edgepress.compress.errors import RecipeError, UserError
from edgepress.compress.network import Network
from edgepress.compress.progress import bar
from edgepress.compress.quantization import Calibrator, Quantization
from edgepress.compress.quantize import trained_ranges
from edgepress.compress.rounding import Round
from edgepress.compress.task import Task
from edgepress.targets.artifact import Artifact, read_artifact
from edgepress.targets.calibration import halves
from edgepress.targets.export import write_file, writer
from edgepress.targets.profile import profile
from edgepress.targets.sensitivity import file_error, layers_of, sensitivity, slower_in_floats

__all__ = ["eased", "improved", "repaired", "why_slow"]

_EXAMPLES = 128
"""Examples that repairs are tried with: half of them to calibrate, half to look at."""

_HELPS = 0.95
"""What part of the error a repair may leave: less gain than that is chance."""

_EASES = 0.02
"""What part of a file's time the layers in floats have to save to be worth a try."""

_RESOLUTION_NS = 1000.0
"""Of the runtimes' profilers: less is chance."""

_FIRST_LAYERS = 0.1
"""What part of the weights may stay in floats for it."""

Made = tuple[Artifact, str]


def repaired(network: Network, path: Path, how: Quantization, task: Task, holds: Callable[[Artifact], bool]) -> Made | None:
    """Write a file that holds the accuracy where the plain one did not.

    First what costs no time: other calibrators and equalization where they help (`improved`), then rounding by the layers'
    outputs (`Round`). Where that is not enough, as few layers as it takes stay in floats: each layer is left in floats in a
    file of its own (`sensitivity`), and they are ordered by what they gain for the time that they cost in floats. So many of them
    are left, in that order, as ``holds`` wants: the count doubles until it does, and then the least count between is looked for.

    Args:
        network: what is written.
        path: of the file; its suffix says the format.
        how: the precision that did not hold.
        task: whose calibration data is used.
        holds: whether a file is good enough.

    Returns:
        The file and what was done, in words; None where nothing holds, and then no file is left.
    """
    better, described, done = improved(network, path.suffix, how, task)

    def tried(content: bytes) -> Artifact | None:
        write_file(path, content)
        artifact = read_artifact(path)
        return artifact if holds(artifact) else None

    if done and (best := tried(_writer(better, path, task, described)(described))):
        return best, ", ".join(done)
    if not trained_ranges(network):
        with contextlib.suppress(RecipeError):  # rounding changes weights for good, so layers are left in floats without it
            rounded = Round(how.name)(better, task)
            if best := tried(_writer(rounded, path, task, described)(described)):
                return best, ", ".join((*done, "weights rounded by the outputs"))
    # what helps a file that gives nonsense may not help one with layers in floats: then without
    for start, settings, said in [(better, described, done)] * bool(done) + [(network, how, ())]:
        if made := _with_floats(start, path, settings, task, tried):
            return made[0], ", ".join((*said, made[1]))
    path.unlink(missing_ok=True)
    return None


def eased(network: Network, artifact: Artifact, floats: Artifact, how: Quantization, task: Task, threads: int) -> Made | None:
    """Write a file beside ``artifact`` whose first layers stay in floats, where the runtime's profile says that this saves time.

    Integers make a convolution of three channels and the depthwise one behind it slower on some CPUs, and rounding the largest
    activations of a network costs it the most. Whether the file is faster has to be measured then.

    Args:
        network: what is written.
        artifact: the quantized file, on this computer.
        floats: the same in fp32.
        how: the precision of the others.
        task: whose calibration data is used.
        threads: of the runtime.

    Returns:
        The file, and which layers are in floats, in words; None where nothing is to be gained.
    """
    measured, names = profile(artifact, threads), layers_of(network)
    slower = slower_in_floats(profile(floats, threads), measured)
    weights = {name: p.numel() for name, p in network.module.named_parameters()}
    costs, inside, best = 0.0, 0, 0
    least = -max(_EASES * measured.rows_ns, _RESOLUTION_NS)
    for count, name in enumerate(names, 1):
        costs += slower.get(name, 0.0)
        inside += sum(size for weight, size in weights.items() if weight.startswith(f"{name}."))
        if inside > _FIRST_LAYERS * sum(weights.values()):
            break
        if costs < least:
            best, least = count, costs
    if not best:
        return None
    path = artifact.path.with_stem(f"{artifact.path.stem}-mixed")
    layers = {**how.layers, **dict.fromkeys(names[:best], "fp32")}
    write_file(path, _writer(network, path, task, how)(replace(how, layers=layers)))
    return read_artifact(path), f"{_listed(names[:best])} in floats"


def _writer(network: Network, path: Path, task: Task, how: Quantization) -> Callable[[Quantization], bytes]:
    return writer(network, path.suffix, task.calibration_batches, how.name)


def _with_floats(
    network: Network, path: Path, how: Quantization, task: Task, tried: Callable[[bytes], Artifact | None]
) -> Made | None:
    """The file with as few layers in floats as it takes; None where no number of them is enough."""
    assert task.calibration_batches is not None
    seen, shown = halves(task.calibration_batches, _EXAMPLES)
    _, layers = sensitivity(network, path.suffix, how, seen, shown, clock=True)
    order = [s.module for s in sorted(layers, key=lambda s: -s.worth) if s.gain > 0]
    write = _writer(network, path, task, how)

    def left(count: int) -> Artifact | None:
        return tried(write(replace(how, layers={**how.layers, **dict.fromkeys(order[:count], "fp32")})))

    best, count = _fewest(left, len(order))
    return (best, f"{_listed(order[:count])} in floats") if best is not None else None


def _fewest(tried: Callable[[int], Artifact | None], most: int) -> tuple[Artifact | None, int]:
    """The result of the least count that gives one: by doubling, then by halves between."""
    low, high, best = 0, 0, None
    while best is None and low < most:
        high = min(max(1, 2 * low), most)
        best = tried(high)
        low = low if best else high
    while best is not None and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if tried(middle) else (middle, high)
    return (tried(high) if best is not None else None), high


def improved(network: Network, suffix: str, how: Quantization, task: Task) -> tuple[Network, Quantization, tuple[str, ...]]:
    """The network and the description whose file's outputs are nearest to the network's, and what that took.

    Args:
        network: what is written.
        suffix: of the format.
        how: what to start from.
        task: whose calibration data is used: a part to calibrate, another to compare on.

    Returns:
        The network, the description, and what helped, in words; without any where nothing did.
    """
    assert task.calibration_batches is not None
    seen, shown = halves(task.calibration_batches, _EXAMPLES)
    wanted = network.predict(*shown)
    best = file_error(writer(network, suffix, seen, how.name), suffix, how, shown, wanted)
    done: tuple[tuple[str, str], ...] = ()
    with bar("Repair") as update:
        tries = list(_repairs(network, how, task))
        for i, (kind, said, make) in enumerate(tries):
            update(i / len(tries), said)
            with contextlib.suppress(UserError):  # what a repair cannot do to this network is not done
                other, described = make(network, how)
                error = file_error(writer(other, suffix, seen, how.name), suffix, described, shown, wanted)
                if error < _HELPS * best:
                    best, network, how = error, other, described
                    done = (*(d for d in done if d[0] != kind), (kind, said))
    return network, how, tuple(said for _, said in done)


_Make = Callable[[Network, Quantization], tuple[Network, Quantization]]


def _repairs(network: Network, how: Quantization, task: Task) -> Iterator[tuple[str, str, _Make]]:
    """(kind, in words, what it does), one after the other on what helped before; of one kind the last that helped holds."""
    if trained_ranges(network):
        return  # training has chosen weights and ranges

    def calibrated(calibrator: Calibrator) -> _Make:
        return lambda network, how: (network, replace(how, calibrator=calibrator))

    def equalized(method: Literal["weights", "activations"]) -> _Make:
        return lambda network, how: (Equalize(method)(network, task), how)

    if how.calibrated:
        for name in get_args(Calibrator):
            if name != how.calibrator:
                yield "ranges", f"ranges by {name}", calibrated(name)
    yield "equal weights", "weights equalized", equalized("weights")
    yield "equal activations", "activations equalized", equalized("activations")


def why_slow(artifact: Artifact, threads: int = 1) -> str:
    """Where the time of a quantized file goes, as half a sentence; empty where that cannot be profiled.

    Args:
        artifact: a file on this computer.
        threads: of the runtime.
    """
    try:
        found = profile(artifact, threads)
    except UserError:
        return ""
    sums = ((found.converts, "in converting numbers"), (found.fallbacks, "in slower kernels"))
    said = [f"{share:.0%} of its time {what}" for remarks, what in sums if (share := sum(r.op.share for r in remarks)) >= 0.01]
    name, _, share = found.by_operator()[0]
    return ", ".join([*said, f"{share:.0%} in {name}"])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
