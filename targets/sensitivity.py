"""Which layers lose what a quantized file loses: found by leaving each in floats, in the file itself."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import fx

from edgepress.compress.errors import UserError
from edgepress.compress.fake import check_layers, module_of
from edgepress.compress.layerwise import kind
from edgepress.compress.network import Network
from edgepress.compress.progress import bar
from edgepress.compress.quantization import Quantization, quantization
from edgepress.compress.task import Batches

from .artifact import Artifact, read_artifact
from .export import write_file, writer
from .layout import stored
from .matching import divergence
from .profile import Profile, profile
from .runtimes import open_runtime
from .verify import output_error

__all__ = ["Sensitivity", "file_error", "layers_of", "sensitivity", "slower_in_floats"]

_NOTHING = {"batch_norm", "dropout", "contiguous", "clone", "detach", "alias"}  # what leaves no operator in a file


@dataclass(frozen=True)
class Sensitivity:
    """What one layer does to a quantized file.

    Attributes:
        module: the user's name of it.
        error: of the file's outputs with this layer left in the other precision: the squared difference from the network's, over
            the variance of these, mean of the outputs.
        gain: how much smaller that is than the error of the file with nothing left.
        ns: how much longer the layer's operators take in floats, per inference, where that was measured.
        snr_db: how far the file with nothing left has gone by this layer: power of what it gives over that of the error, in
            decibels, for one example; None where it makes no tensor in the file. The first low one is where it goes wrong.
    """

    module: str
    error: float
    gain: float
    ns: float | None = None
    snr_db: float | None = None

    @property
    def worth(self) -> float:
        """Gain per nanosecond; what costs no time comes first."""
        return self.gain / max(self.ns if self.ns is not None else 1.0, 1.0)


def layers_of(network: Network) -> list[str]:
    """The user's modules that compute something, in the order in which they run.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        >>> layers_of(trace(model, torch.zeros(1, 3, 2, 2)))
        ['0', '2']
    """
    found = [module_of(n) for n in network.module.graph.nodes if n.op == "call_function" and _computes(n)]
    return [name for name in dict.fromkeys(found) if name]


def _computes(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return kind(node) not in _NOTHING and getattr(value, "is_floating_point", lambda: False)()


def sensitivity(
    network: Network,
    suffix: str,
    precision: str | Quantization = "int8",
    calibration: Batches | None = None,
    inputs: Sequence[np.ndarray] | None = None,
    *,
    instead: str = "fp32",
    modules: Sequence[str] | None = None,
    clock: bool = False,
) -> tuple[float, list[Sensitivity]]:
    """Write the quantized file once for each layer, with that layer in another precision, and see what it gains.

    Args:
        network: what `export` would write.
        suffix: ``'.onnx'`` or ``'.tflite'``.
        precision: of the other layers.
        calibration: as in `export`; a few dozen examples do.
        inputs: arrays ``[N, ...]`` that the files are run on, best not the calibration's; the example inputs where None.
        instead: the precision of the layer that is left out.
        modules: the layers to try; all that compute where None.
        clock: measure by profile what each layer's operators take longer in floats.

    Returns:
        The error of the file with nothing left out, and one entry for each layer, the most gain first.

    Raises:
        UserError: whatever `export` refuses, or a layer that the network does not have.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> from edgepress.compress.progress import silenced
        >>> x = torch.randn(16, 4)
        >>> network = trace(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), x)
        >>> with silenced():
        ...     error, found = sensitivity(network, ".onnx", "int8", [x])
        >>> error > 0, {entry.module for entry in found} <= {"0", "1", "2"}
        (True, True)
    """
    how = quantization(precision)
    check_layers(network, how)
    known = layers_of(network)
    if unknown := [m for m in modules or () if m not in known]:
        raise UserError(f"The network has no layer '{unknown[0]}' that computes: it has {', '.join(known[:20])}.")
    feeds = [np.ascontiguousarray(x) for x in (inputs or [x.numpy() for x in network.example_inputs])]
    wanted = network.predict(*feeds)
    write = writer(network, suffix, calibration, how.name)
    with _files(write, suffix) as made, bar("Sensitivity") as update:
        base, plain = made(how), made(quantization("fp32"))
        slower = slower_in_floats(profile(plain), profile(base)) if clock else {}
        gone = _gone(network, feeds, plain, base)
        whole = _error(base, feeds, wanted)
        found = []
        names = list(modules or known)
        for i, module in enumerate(names):
            left = _error(made(replace(how, layers={**how.layers, module: instead})), feeds, wanted)
            ns = slower.get(module, 0.0) if clock else None
            found.append(Sensitivity(module, left, whole - left, ns, gone.get(module)))
            update((i + 1) / len(names), module)
    return whole, sorted(found, key=lambda s: -s.gain)


def file_error(
    write: Callable[[Quantization], bytes], suffix: str, how: Quantization, inputs: Sequence[np.ndarray], wanted: object
) -> float:
    """The `output_error` of a file that is written for that alone.

    Args:
        write: of `edgepress.targets.export.writer`.
        suffix: of the format.
        how: what to write.
        inputs: arrays ``[N, ...]``.
        wanted: what the network's ``predict`` gives for them.
    """
    with _files(write, suffix) as made:
        return _error(made(how), inputs, wanted)


@contextlib.contextmanager
def _files(write: Callable[[Quantization], bytes], suffix: str) -> Iterator[Callable[[Quantization], Artifact]]:
    """Files in a scratch folder, each under another name."""
    count = iter(range(10**9))
    with tempfile.TemporaryDirectory() as folder:

        def made(how: Quantization) -> Artifact:
            path = Path(folder) / f"{next(count)}{suffix}"
            write_file(path, write(how))
            return read_artifact(path)

        yield made


def _error(artifact: Artifact, feeds: Sequence[np.ndarray], wanted: object) -> float:
    with contextlib.closing(open_runtime(artifact)) as runtime:
        got = _tuple(runtime.predict(*feeds))
    artifact.path.unlink()
    return output_error(got, _tuple(wanted))


def _gone(network: Network, feeds: Sequence[np.ndarray], plain: Artifact, quantized: Artifact) -> dict[str, float]:
    """The signal to noise of each module's last tensor in the quantized file, for the first example."""
    example = [x[:1] for x in feeds]
    one, other = (_values(artifact, example) for artifact in (plain, quantized))
    return {d.module: d.snr_db for d in divergence(network, example, one, other) if np.isfinite(d.snr_db)}


def _values(artifact: Artifact, example: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """What the tensors of a file hold, as real numbers, by name."""
    given = {port.name: stored(x, port) for port, x in zip(artifact.inputs, example, strict=True)}
    if artifact.format == "tflite":
        from .tflite_tensors import real_tensors

        return real_tensors(artifact.path.read_bytes())(given)
    import onnx

    from .onnx_tensors import onnx_tensors

    return onnx_tensors(onnx.load(artifact.path))(given)


def slower_in_floats(plain: Profile, quantized: Profile) -> Mapping[str, float]:
    """Nanoseconds per module that a float file takes longer than its quantized twin; what runs fused counts for the first."""
    found: dict[str, float] = {}
    for sign, measured in ((1, plain), (-1, quantized)):
        for names, ns, _ in measured.by_module():
            name = names.split(" + ")[0]
            found[name] = found.get(name, 0.0) + sign * ns
    return found


def _tuple(outputs: object) -> tuple[np.ndarray, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)  # type: ignore[return-value]
