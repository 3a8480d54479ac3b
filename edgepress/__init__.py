"""edgepress: a trained PyTorch network into the smallest, fastest file that still does the job.

>>> import edgepress as ep
>>> ep.Distill(epochs=3).epochs
3

Names are imported when they are first used, so that importing the package is quick and loads no runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edgepress.compress.distill import Distill as Distill
    from edgepress.compress.equalize import Equalize as Equalize
    from edgepress.compress.errors import DeviceError as DeviceError
    from edgepress.compress.errors import EdgepressError as EdgepressError
    from edgepress.compress.errors import FileError as FileError
    from edgepress.compress.errors import RecipeError as RecipeError
    from edgepress.compress.errors import TaskError as TaskError
    from edgepress.compress.errors import TraceError as TraceError
    from edgepress.compress.errors import UserError as UserError
    from edgepress.compress.network import Network as Network
    from edgepress.compress.network import trace as trace
    from edgepress.compress.pruning import OBD as OBD
    from edgepress.compress.pruning import Activation as Activation
    from edgepress.compress.pruning import BatchNormScale as BatchNormScale
    from edgepress.compress.pruning import Fisher as Fisher
    from edgepress.compress.pruning import GeometricMedian as GeometricMedian
    from edgepress.compress.pruning import Lamp as Lamp
    from edgepress.compress.pruning import Magnitude as Magnitude
    from edgepress.compress.pruning import Prune as Prune
    from edgepress.compress.pruning import Random as Random
    from edgepress.compress.pruning import Taylor as Taylor
    from edgepress.compress.pruning import inspect as inspect
    from edgepress.compress.quantization import Quantization as Quantization
    from edgepress.compress.quantization import quantization as quantization
    from edgepress.compress.quantize import Quantize as Quantize
    from edgepress.compress.quantize import fake_quantized as fake_quantized
    from edgepress.compress.rounding import Round as Round
    from edgepress.compress.shorten import Shorten as Shorten
    from edgepress.compress.sparsify import Sparsify as Sparsify
    from edgepress.compress.surgery import transplant as transplant
    from edgepress.compress.task import Task as Task
    from edgepress.targets.artifact import Artifact as Artifact
    from edgepress.targets.artifact import read_artifact as read_artifact
    from edgepress.targets.devices import find_device as find_device
    from edgepress.targets.devices.count import count_instructions as count_instructions
    from edgepress.targets.export import export as export
    from edgepress.targets.latency import LatencyTable as LatencyTable
    from edgepress.targets.measure import Measurement as Measurement
    from edgepress.targets.measure import Plan as Plan
    from edgepress.targets.measure import measure as measure
    from edgepress.targets.measure import ratio as ratio
    from edgepress.targets.microcontroller import check_microcontroller as check_microcontroller
    from edgepress.targets.microcontroller import write_c_array as write_c_array
    from edgepress.targets.profile import profile as profile
    from edgepress.targets.runtimes import open_runtime as open_runtime
    from edgepress.targets.sensitivity import sensitivity as sensitivity
    from edgepress.targets.verify import Parity as Parity
    from edgepress.targets.verify import verify as verify

    from .compare import bench as bench
    from .pipeline import press as press
    from .recipe import Recipe as Recipe
    from .recipe import default_recipe as default_recipe
    from .recipe import read_recipe as read_recipe
    from .report import Report as Report
    from .tasks import load_task as load_task

_NAMES = {
    "Distill": "compress.distill",
    "Equalize": "compress.equalize",
    "DeviceError": "compress.errors",
    "EdgepressError": "compress.errors",
    "FileError": "compress.errors",
    "RecipeError": "compress.errors",
    "TaskError": "compress.errors",
    "TraceError": "compress.errors",
    "UserError": "compress.errors",
    "Network": "compress.network",
    "trace": "compress.network",
    "Activation": "compress.pruning",
    "BatchNormScale": "compress.pruning",
    "Fisher": "compress.pruning",
    "GeometricMedian": "compress.pruning",
    "Lamp": "compress.pruning",
    "OBD": "compress.pruning",
    "Magnitude": "compress.pruning",
    "Prune": "compress.pruning",
    "Random": "compress.pruning",
    "Taylor": "compress.pruning",
    "inspect": "compress.pruning",
    "Quantization": "compress.quantization",
    "quantization": "compress.quantization",
    "Quantize": "compress.quantize",
    "fake_quantized": "compress.quantize",
    "Round": "compress.rounding",
    "Shorten": "compress.shorten",
    "Sparsify": "compress.sparsify",
    "transplant": "compress.surgery",
    "Task": "compress.task",
    "Artifact": "targets.artifact",
    "read_artifact": "targets.artifact",
    "export": "targets.export",
    "LatencyTable": "targets.latency",
    "Measurement": "targets.measure",
    "Plan": "targets.measure",
    "measure": "targets.measure",
    "ratio": "targets.measure",
    "find_device": "targets.devices",
    "count_instructions": "targets.devices.count",
    "profile": "targets.profile",
    "check_microcontroller": "targets.microcontroller",
    "write_c_array": "targets.microcontroller",
    "open_runtime": "targets.runtimes",
    "sensitivity": "targets.sensitivity",
    "Parity": "targets.verify",
    "verify": "targets.verify",
    "bench": "compare",
    "press": "pipeline",
    "Recipe": "recipe",
    "default_recipe": "recipe",
    "read_recipe": "recipe",
    "Report": "report",
    "load_task": "tasks",
}

__all__ = [*_NAMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'edgepress' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"edgepress.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
