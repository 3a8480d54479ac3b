"""An NVIDIA GPU of the computer that edgepress runs on."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from edgepress.compress.errors import DeviceError, UserError

from ..artifact import Artifact
from .base import Failed, Job, Outcome, Taken
from .link import BOOT, Link, Piped, _Far

__all__ = ["Cuda", "cuda"]

_PROBE = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": 0}
if found["cuda"] and torch.cuda.is_available():
    found["gpus"] = torch.cuda.device_count()
    gpu = torch.cuda.get_device_properties(0)
    found.update(gpu=gpu.name, gpu_memory_bytes=gpu.total_memory, gpu_capability=f"{gpu.major}.{gpu.minor}",
                 gpu_processors=gpu.multi_processor_count, uuid=str(getattr(gpu, "uuid", "")),
                 cudnn=torch.backends.cudnn.version(),
                 tf32={"convolutions": torch.backends.cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32})
print("found" + json.dumps(found))
"""
_PROBE_S = 120.0
_LEAST = (2, 11)
_SENSORS = {"driver_version": "gpu_driver", "clocks.sm": "gpu_mhz", "clocks.mem": "gpu_memory_mhz",
            "clocks.max.sm": "gpu_most_mhz", "temperature.gpu": "gpu_celsius", "power.draw": "gpu_watts"}  # fmt: skip


def cuda(name: str) -> Cuda:
    """The GPU of a name: ``'cuda'`` or ``'cuda:0'`` for the first that PyTorch sees, ``'cuda:1'`` for the next.

    Raises:
        DeviceError: the name makes no sense.

    Example:
        >>> cuda("cuda:1").name
        'cuda:1'
    """
    found = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", name)
    if found is None:
        raise DeviceError(f"There is no device '{name}': write cuda for the first NVIDIA GPU, cuda:1 for the second.")
    return Cuda(name, int(found[1] or 0))


class Cuda(Piped):
    """A GPU of this computer: ``.pt2`` files in PyTorch, ``.onnx`` files in ONNX Runtime's CUDA and TensorRT providers.

    Its clocks are left as they are.

    Args:
        name: as the user calls it.
        index: among the GPUs that PyTorch sees.
    """

    def __init__(self, name: str, index: int):
        self._visible = _visible(index)
        self._found: dict[str, Any] = {}
        variables = [f"{key}={value}" for key, value in _variables(self._visible).items()]
        super().__init__(name, ["env", *variables, sys.executable, "-c", BOOT], lambda code, text: _explain(code, text, name))

    @property
    def _link(self) -> Link:
        if self._kept is None:
            self._found = _probe(self.name, self._visible)
        return super()._link

    def environment(self) -> dict[str, Any]:
        """What timings depend on there: the computer, and the GPU with its driver, clocks, temperature and power."""
        here = super().environment()
        known = {key: value for key, value in self._found.items() if key not in ("torch", "gpus", "uuid")}
        return {**here, **known, **_sensors(self._found.get("uuid", ""))}

    def check(self, job: Job, threads: int = 1, timeout_s: float = 120.0) -> Outcome:
        """See `Device.check`."""
        try:
            runtime = _on_gpu(job.artifact, job.runtime)
        except UserError as error:
            return Failed(error)
        outcome = super().check(dataclasses.replace(job, runtime=runtime), threads, timeout_s)
        if isinstance(outcome, Taken) and job.artifact.format == "onnx":  # that was the host's memory, not the GPU's
            return dataclasses.replace(outcome, peak_bytes=None, idle_bytes=None)
        return outcome

    def measure(
        self, jobs: Sequence[Job], threads: int, plan: dict[str, Any], progress: Callable[[float], None] = lambda _: None
    ) -> tuple[list[Outcome], dict[str, Any]]:
        """See `Device.measure`; ``gpu_after`` is what the GPU's sensors said when it was over.

        Energy is not measured: the agent's sensors are the CPU's.
        """
        found, seen = super().measure(jobs, threads, plan, progress)
        outcomes = [dataclasses.replace(taken, joules=None) if isinstance(taken, Taken) else taken for taken in found]
        return outcomes, {**seen, "gpu_after": _sensors(self._found.get("uuid", ""))}

    def open(self, artifact: Artifact, threads: int = 1, runtime: str | None = None) -> _Far:
        """See `Device.open`."""
        return super().open(artifact, threads, _on_gpu(artifact, runtime))


def _on_gpu(artifact: Artifact, runtime: str | None) -> str:
    """The runtime, if it uses the GPU: a time of the CPU must not be taken for the GPU's."""
    if artifact.format == "pt2":
        return runtime or "torch"
    if artifact.format == "onnx":
        if runtime in (None, "onnxruntime:cuda", "onnxruntime:tensorrt"):
            return runtime or "onnxruntime:cuda"
        raise UserError(f"'{runtime}' runs no {artifact.path.name} on a GPU: ask for onnxruntime:cuda or onnxruntime:tensorrt.")
    raise UserError(f"No runtime puts {artifact.path.name} on an NVIDIA GPU: give a .pt2 or an .onnx file.")


def _visible(index: int) -> str:
    """The one GPU that the agent shall see, in the words of CUDA_VISIBLE_DEVICES; the user may have set that already."""
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (given[index] if index < len(given) else "-1") if given else str(index)


def _variables(visible: str) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": visible, "EDGEPRESS_TORCH_DEVICE": "cuda"}


def _probe(name: str, visible: str) -> dict[str, Any]:
    """Ask PyTorch for the GPU, in a process of its own: it would hold the GPU's memory in this one.

    Raises:
        DeviceError: there is no GPU, or no PyTorch that uses it.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], env={**os.environ, **_variables(visible)}, capture_output=True, text=True,
            timeout=_PROBE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"{name} does not answer: PyTorch did not say within {_PROBE_S:.0f} s which GPU there is.") from error
    line = next((line for line in done.stdout.splitlines() if line.startswith("found{")), None)
    if line is None:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise DeviceError(f"{name} cannot be used: PyTorch does not start here ({said[:200].rstrip('.')}).")
    found: dict[str, Any] = json.loads(line.removeprefix("found"))
    if problem := _problem(found):
        raise DeviceError(f"{name} cannot be used: {problem}.")
    return found


def _problem(found: dict[str, Any]) -> str | None:
    """Why there is no GPU to measure on; None where there is."""
    version = found["torch"]
    if not found["cuda"]:
        return f"the PyTorch here ({version}) is built without CUDA; install one that has it, from https://pytorch.org"
    if tuple(int(part) for part in version.split(".")[:2]) < _LEAST:
        return f"the PyTorch here ({version}) is older than {_LEAST[0]}.{_LEAST[1]}; install a newer one"
    if not found["gpus"]:
        return f"PyTorch {version} finds no such NVIDIA GPU here; nvidia-smi lists those that the driver knows"
    return None


def _sensors(uuid: str) -> dict[str, Any]:
    """What nvidia-smi says of a GPU; nothing where there is no such program."""
    which = ["-i", uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"] if uuid else []
    command = ["nvidia-smi", f"--query-gpu={','.join(_SENSORS)}", "--format=csv,noheader,nounits", *which]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return _readings(done.stdout)


def _readings(text: str) -> dict[str, Any]:
    """A line of nvidia-smi's table as values; sensors that a GPU lacks are left out."""
    row = next(csv.reader(text.splitlines()), [])
    if len(row) != len(_SENSORS):
        return {}
    found: dict[str, Any] = {}
    for (sensor, name), value in zip(_SENSORS.items(), (value.strip() for value in row), strict=True):
        if sensor == "driver_version":
            found[name] = value
        elif re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
            found[name] = float(value)
    return found


def _explain(code: int, text: str, name: str) -> str:
    last = (text.splitlines() or ["it said nothing"])[-1]
    return f"The process that runs the files on {name} was ended (exit code {code}): {last}."
