"""How long layers take on a target: measured once for each shape, kept on disk.

Time is a staircase over channel counts, other for each runtime, precision and CPU, so shapes are measured as they are asked
for, not modelled. A layer's time is the slope of the run time of tiny files that hold it once and several times: what a call
costs by itself cancels out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepress.compress.cache import cache_folder
from edgepress.compress.errors import DeviceError, FileError, UserError
from edgepress.compress.progress import bar
from edgepress.compress.pruning.layers import Layer

from . import probe_onnx, probe_tflite
from .agent.machine import environment
from .devices import Device, find_device
from .devices.link import Piped, Prober
from .probe_onnx import onnx_context, onnx_probe
from .probe_tflite import tflite_probe

__all__ = ["LatencyTable"]


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How layers are timed on a runtime: what brings it, how probes are written, what else a copy costs, what they can hold."""

    packages: tuple[str, ...]
    format: str
    write: Callable[[Layer, int, str], bytes]
    context: Callable[[Layer], tuple[Layer, ...]]
    operators: frozenset[str]


_INTERPRETERS = ("ai-edge-litert", "tflite-runtime", "tensorflow")
_KINDS = {
    "onnxruntime": _Kind(("onnxruntime",), "onnx", onnx_probe, onnx_context, frozenset(probe_onnx.OPERATORS)),
    "litert": _Kind(_INTERPRETERS, "tflite", tflite_probe, lambda _: (), frozenset(probe_tflite.OPERATORS)),
}
_PRECISIONS = ("fp32", "int8")
_FORMAT = 4  # of the cache; goes up when layers are measured in another way
_REFERENCE = Layer("conv", ((32, 16, 16),), (32, 16, 16), (3, 3), (1, 1), (1, 1), (1, 1), 1, "relu")
"""Measured with every batch: the machine's speed just then."""
_BATCH = 24  # layers measured side by side
_PROBE_S = 100e-6  # so long a file with several copies should take at least
_COPIES = (3, 24)
_REFERENCES = 3  # copies of the reference in each batch
_STEADY = 0.03  # a reference that moved by less is noise of its own
_PERIOD = 16  # the widest tile of channels in use; counts that are equal modulo this lie on one straight line
_EXACT = 128  # channel counts up to this are measured as they are
_CLIFF = 0.15  # two anchors whose times grow otherwise than their counts by more than this are not interpolated between


class LatencyTable:
    """A clock for selection: seconds of each layer on a device with one runtime, precision and number of threads.

    Layers are measured when they are first asked for, many side by side, and kept on disk. HALP (Shen et al. 2022, "Structural
    Pruning via Latency-Saliency Knapsack") measures the layers of one network over their channel counts before it prunes, and
    prices a layer's outputs with its inputs as they were before the step. Here a shape is measured only when selection comes by
    it, a channel is worth what goes on both of its sides (`Latency`), what a runtime fuses is one layer, and one table serves
    every network.

    Up to 128 channels every count is measured as it is. Above, times are interpolated between four counts to the octave that
    are equal to the wanted one modulo 16: kernels work in tiles of 4, 8 or 16 channels, and along such counts the staircase is
    a straight line. Where two of them differ by more than their counts explain, a cache has overflown or another kernel taken
    over, and the wanted count is measured.

    A layer that cannot be measured counts as one multiplication for each three values that it reads or writes: no probe is known
    for its operator, or the runtime refuses it.

    Args:
        runtime: ``'onnxruntime'`` or ``'litert'``.
        precision: ``'fp32'`` or ``'int8'``.
        threads: that a run may use.
        cache: folder of the tables; `cache_folder` where None.
        device: where layers are timed: ``'local'``, ``'ssh://pi@board'``, see `find_device`.

    Raises:
        UserError: no such runtime or precision.
        DeviceError: the device cannot be reached, or has not the runtime.
        FileError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> layers = [Layer("linear", ((n,),), (n,)) for n in (8, 512)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     small, large = LatencyTable("litert", "int8", cache=folder).seconds(layers)
        >>> bool(0 < small < large)
        True
    """

    def __init__(
        self,
        runtime: str = "onnxruntime",
        precision: str = "fp32",
        threads: int = 1,
        cache: str | os.PathLike[str] | None = None,
        device: str | Device = "local",
    ):
        if runtime not in _KINDS:
            raise UserError(f"There is no runtime '{runtime}' to time layers on: choose {' or '.join(_KINDS)}.")
        if precision not in _PRECISIONS:
            raise UserError(f"'{precision}' is no precision to time layers in: choose {' or '.join(_PRECISIONS)}.")
        if threads < 1:
            raise UserError(f"{threads} threads cannot run a layer: ask for 1 or more.")
        self.runtime, self.precision, self.threads = runtime, precision, threads
        self._kind = _KINDS[runtime]
        place = find_device(device)
        if not isinstance(place, Piped):
            raise DeviceError(f"Layers cannot be timed on {place.name}.")
        self.device = place
        folder = cache_folder() if cache is None else Path(cache)
        with contextlib.closing(place):  # until there is something to time
            facts = environment() if place.name == "local" else place.environment()
        self._store = _Store(folder / self._file_name(facts))

    def _file_name(self, place: dict[str, Any]) -> str:
        if place["emulated"]:
            raise DeviceError(f"{self.device.name} is an emulated machine: it has no time that means anything.")
        versions = place["packages"]
        package = next((name for name in self._kind.packages if name in versions), None)
        if package is None:
            wanted, where = self._kind.packages[0], "here" if self.device.name == "local" else f"on {self.device.name}"
            raise DeviceError(f"The runtime {wanted} is not installed {where}: python3 -m pip install {wanted}")
        cpu = re.sub(r"[^a-z0-9]+", "-", str(place["cpu"]).lower()).strip("-")
        features = zlib.crc32(" ".join(place["cpu_features"]).encode())
        runtime = self.runtime if package == self._kind.packages[0] else package
        return f"{cpu}-{features:08x}-{runtime}-{versions[package]}-{self.precision}-{self.threads}t-v{_FORMAT}.jsonl"

    @property
    def path(self) -> Path:
        """The file that holds the times."""
        return self._store.path

    def seconds(self, layers: Sequence[Layer]) -> NDArray[np.float64]:
        """The time of each layer, ``[len(layers)]``; those that are not known yet are measured."""
        if not layers:
            return np.zeros(0)
        wanted = [self._plain(layer) for layer in layers]
        mixes = {layer: _mix(layer) for layer in dict.fromkeys(wanted)}
        self._fill([point for mix in mixes.values() for point in mix])
        self._fill([layer for layer, mix in mixes.items() if not _straight(self._ns, mix)])
        return np.array([self._time(layer, mixes[layer]) for layer in wanted]) * 1e-9

    def _ns(self, layer: Layer) -> float:
        return self._store.times[layer]

    def _time(self, layer: Layer, mix: dict[Layer, float]) -> float:
        known = self._store.times.get(layer)
        return known if known is not None else sum(part * self._ns(point) for point, part in mix.items())

    def _fill(self, layers: Sequence[Layer]) -> None:
        """Measure what is not in the table; another process may have done so in the meantime."""
        missing = [layer for layer in dict.fromkeys(layers) if layer not in self._store.times]
        if not missing:
            return
        self._store.refresh()
        missing = [layer for layer in missing if layer not in self._store.times]
        with _progress(len(missing)) as update, contextlib.closing(self.device):
            for start in range(0, len(missing), _BATCH):
                batch = missing[start : start + _BATCH]
                self._store.add(self._measure(batch))
                update((start + len(batch)) / len(missing), f"{start + len(batch)} of {len(missing)} shapes")

    def _measure(self, layers: Sequence[Layer]) -> dict[Layer, float]:
        """Nanoseconds of each layer, as they would be with the machine as fast as when the table was begun."""
        every = list(dict.fromkeys(other for layer in (_REFERENCE, *layers) for other in self._with_context(layer)))
        times = self._slopes([*every, *[_REFERENCE] * (_REFERENCES - 1)])
        slopes = dict(zip(every, times, strict=False))
        slopes[_REFERENCE] = float(np.median([slopes[_REFERENCE], *times[len(every) :]]))
        found = {layer: self._alone(layer, slopes) for layer in every}
        speed = self._store.times.get(_REFERENCE, found[_REFERENCE]) / found[_REFERENCE]
        if abs(speed - 1) < _STEADY:
            speed = 1.0
        return {layer: ns * speed for layer, ns in found.items() if layer not in self._store.times}

    def _slopes(self, layers: Sequence[Layer]) -> list[float]:
        """Nanoseconds of each layer: files with one and with several copies of it take turns, all layers interleaved."""
        with Prober(self.device, self._kind.format, self.threads) as prober:
            probed, numbers, seconds = list(layers), [], []
            for i, (layer, found) in enumerate(zip(layers, prober.add(self._files([(x, 1) for x in layers])), strict=True)):
                number, second = found
                if second is None:  # whatever a runtime says to a shape that it does not take
                    probed[i] = _moved(layer)
                    [(number, second)] = prober.add(self._files([(probed[i], 1)]))
                numbers.append(number)
                seconds.append(second or 1e-7)
            copies = [_copies(s) if x.operator != "input" else 1 for x, s in zip(layers, seconds, strict=True)]
            several = iter(prober.add(self._files([(x, n) for x, n in zip(probed, copies, strict=True) if n > 1])))
            others = [next(several)[0] if n > 1 else number for n, number in zip(copies, numbers, strict=True)]
            times = prober.times([*numbers, *others])
        pairs = zip(times[: len(layers)], times[len(layers) :], copies, strict=True)
        return [(b - a) / (n - 1) if n > 1 else a for a, b, n in pairs]

    def _files(self, wanted: Sequence[tuple[Layer, int]]) -> list[tuple[bytes, bool]]:
        """Probes, and whether a call of each is timed with the arrays in and out."""
        return [(self._kind.write(layer, n, self.precision), layer.operator == "input") for layer, n in wanted]

    def _with_context(self, layer: Layer) -> list[Layer]:
        """A layer, what stands beside it in its probe, what stands beside that in its own, and so on."""
        return [layer, *(x for other in self._kind.context(layer) for x in self._with_context(other))]

    def _alone(self, layer: Layer, slopes: dict[Layer, float]) -> float:
        """What a layer takes without what stands beside it in its probe."""
        return max(slopes[layer] - sum(self._alone(other, slopes) for other in self._kind.context(layer)), 1.0)

    def _plain(self, layer: Layer) -> Layer:
        """The layer that is measured in its place."""
        return layer if layer.operator in self._kind.operators | {"input"} else _moved(layer)


@contextlib.contextmanager
def _progress(count: int) -> Iterator[Callable[..., None]]:
    """A bar where it will take more than about two seconds."""
    with bar("Timing layers") if count > _BATCH else contextlib.nullcontext(lambda *_: None) as update:
        yield update


# ---- which shapes stand for which


def _moved(layer: Layer) -> Layer:
    """One multiplication for each value that a layer reads or writes, in its place."""
    values = max(sum(_count(s) for s in (*layer.inputs, layer.output)) // 3, 1)
    return Layer("mul", ((values,),) * 2, (values,))


def _count(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


_TWO_SIDED = {"conv", "linear"}
_ONE_SIDED = {"depthwise", "add", "mul", "scale", "max_pool", "avg_pool", "mean", "relu", "relu6"}


def _mix(layer: Layer) -> dict[Layer, float]:
    """The shapes to measure and their weights in the layer's time."""
    if layer.operator in _TWO_SIDED and layer.groups == 1:
        sides = [_around(_channels(layer, layer.inputs[0])), _around(_channels(layer, layer.output))]
    elif layer.operator in _ONE_SIDED and len({_channels(layer, s) for s in (*layer.inputs, layer.output)}) == 1:
        sides = [_around(_channels(layer, layer.output))]
    else:
        return {layer: 1.0}
    mix: dict[Layer, float] = {}
    for corner in itertools.product(*(side.items() for side in sides)):
        counts = [count for count, _ in corner]
        weight = float(np.prod([part for _, part in corner]))
        mix[_with_channels(layer, counts[0], counts[-1])] = weight
    return mix


def _around(count: int) -> dict[int, float]:
    """Channel counts to measure for ``count``, with their weights: itself, or its neighbours on the same phase of a tile.

    Example:
        >>> _around(40), _around(344)
        ({40: 1.0}, {328: 0.75, 392: 0.25})
    """
    if count <= _EXACT:
        return {count: 1.0}
    phase, tiles = count % _PERIOD, count // _PERIOD
    stride = 1 << (tiles.bit_length() - 3)
    low = tiles // stride * stride
    part = (tiles - low) / stride
    found = {low * _PERIOD + phase: 1 - part, (low + stride) * _PERIOD + phase: part}
    return {n: weight for n, weight in found.items() if weight}


def _channels(layer: Layer, shape: Sequence[int]) -> int:
    """The channels of a shape: its first size where space follows, else its last."""
    return shape[0] if _spatial(layer, shape) else shape[-1] if shape else 1


def _spatial(layer: Layer, shape: Sequence[int]) -> bool:
    return bool(layer.kernel) or len(shape) == 3


def _with_channels(layer: Layer, inputs: int, output: int) -> Layer:
    def other(shape: tuple[int, ...], n: int) -> tuple[int, ...]:
        return (n, *shape[1:]) if _spatial(layer, shape) else (*shape[:-1], n)

    return dataclasses.replace(layer, inputs=tuple(other(s, inputs) for s in layer.inputs), output=other(layer.output, output))


def _straight(ns: Callable[[Layer], float], mix: dict[Layer, float]) -> bool:
    """Whether the times of some shapes grow as their sizes do, so that what lies between can be read off."""
    if len(mix) == 1:
        return True
    points = [(_work(layer), ns(layer)) for layer in mix]
    least, most = min(points), max(points)
    growth = (most[1] / least[1]) / (most[0] / least[0])
    return 1 / (1 + _CLIFF) <= growth <= 1 + _CLIFF


def _work(layer: Layer) -> float:
    output = _channels(layer, layer.output)
    return float(output * _channels(layer, layer.inputs[0])) if layer.operator in _TWO_SIDED else float(output)


def _copies(seconds: float) -> int:
    least, most = _COPIES
    return int(np.clip(np.ceil(_PROBE_S / seconds), least, most))


# ---- on disk


class _Store:
    """Times by layer in a file of JSON lines that several processes may append to.

    A line is written whole or not at all, under a lock; the first entry for a layer counts, so that all processes agree.
    """

    def __init__(self, path: Path):
        self.path = path
        self.times: dict[Layer, float] = {}
        self._read = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise FileError(f"Cannot keep measured times in {path}: {error.strerror or error}. Set EDGEPRESS_CACHE.") from error
        self.refresh()

    def refresh(self) -> None:
        """Read what has been appended since; a line that is damaged or not whole yet is left out."""
        with self.path.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            entry = _entry(line)
            if entry:
                self.times.setdefault(*entry)

    def add(self, found: dict[Layer, float]) -> None:
        """Append; what another process has written first is kept instead."""
        lines = [json.dumps({**dataclasses.asdict(layer), "ns": round(ns, 1)}) + "\n" for layer, ns in found.items()]
        try:
            with _locked(self.path) as descriptor:
                os.write(descriptor, "".join(lines).encode())
        except OSError as error:
            raise FileError(f"Cannot write measured times to {self.path}: {error.strerror or error}.") from error
        self.refresh()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(ImportError):  # not on every system; one write in append mode is whole there too
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _entry(line: bytes) -> tuple[Layer, float] | None:
    try:
        fields: dict[str, Any] = json.loads(line)
        ns = float(fields.pop("ns"))
        fields["inputs"] = tuple(tuple(shape) for shape in fields["inputs"])
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return Layer(**plain), ns
    except (ValueError, KeyError, TypeError):
        return None
