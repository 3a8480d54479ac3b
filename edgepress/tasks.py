"""Find the task that a user names: a built-in one, or a function in a Python file of theirs."""

from __future__ import annotations

import difflib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgepress.compress.errors import TaskError, UserError

if TYPE_CHECKING:
    from edgepress.compress.task import Task


__all__ = ["BUILT_IN", "load_task"]


def _digits() -> Task:
    from edgepress.models.digits import digits

    return digits()


def _reference(module: str, function: str, *arguments: int, examples: int | None = None) -> Task:
    build: Callable[..., Task] = getattr(importlib.import_module(f"edgepress.models.{module}"), function)
    return build(*arguments, examples=examples)


_REFERENCES = {
    **{
        f"resnet{depth}-cifar10": (
            f"trained ResNet-{depth} on CIFAR-10",
            partial(_reference, "resnet_cifar", "resnet_cifar10", depth),
        )
        for depth in (20, 32, 44, 56)
    },
    "densenet40-cifar10": ("trained DenseNet-40-12 on CIFAR-10", partial(_reference, "densenet_cifar", "densenet40_cifar10")),
    "mobilenetv1-imagenet": (
        "trained MobileNetV1-0.75 on 1,000 ImageNet photos",
        partial(_reference, "mobilenet", "mobilenetv1_imagenet"),
    ),
    "mlperf-resnet8": ("MLPerf Tiny's ResNet-8 on CIFAR-10", partial(_reference, "mlperf_tiny", "mlperf_resnet8")),
    "mlperf-vww": ("MLPerf Tiny's MobileNetV1-0.25, people in sight", partial(_reference, "mlperf_tiny", "mlperf_vww")),
    "mlperf-kws": ("MLPerf Tiny's DS-CNN, keywords", partial(_reference, "mlperf_tiny", "mlperf_kws")),
    "mlperf-ad": ("MLPerf Tiny's autoencoder, strange machine sounds", partial(_reference, "mlperf_tiny", "mlperf_ad")),
    "face-detector": ("trained face detector on 30 photos", partial(_reference, "face_detector", "face_detector")),
    "spoken-digits": ("small LSTM on spoken digits, trained on the spot", partial(_reference, "spoken_digits", "spoken_digits")),
    "sentiment": (
        "small Transformer on film critics' sentences, trained on the spot",
        partial(_reference, "sentiment", "sentiment"),
    ),
}

BUILT_IN: dict[str, tuple[str, Callable[..., Task]]] = {
    "digits": ("small residual CNN on scikit-learn's digits, trained on the spot; needs nothing", _digits),
    **{name: (f"{what}; needs EDGEPRESS_DATA", build) for name, (what, build) in _REFERENCES.items()},
}
"""Name to (what it is, how to build it); all but the digits take ``examples``, how many test examples judge."""


def load_task(name: str) -> Task:
    """The task called ``name``: a built-in one, or ``path/to/file.py:function``.

    Raises:
        TaskError: no such task, file or function, or the function raises or returns something else.

    Example:
        >>> load_task("digit")
        Traceback (most recent call last):
        ...
        edgepress.compress.errors.TaskError: There is no task 'digit'; did you mean 'digits'? Give a name that `edgepress tasks` \
lists, or your own as file.py:function.
    """
    if name in BUILT_IN:
        return BUILT_IN[name][1]()
    file, separator, function = name.rpartition(":")
    if not separator:
        near = difflib.get_close_matches(name, BUILT_IN, 1)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        if name.endswith(".py"):
            hint = f"; name the function in it, as {name}:build."
        raise TaskError(
            f"There is no task '{name}'{hint} Give a name that `edgepress tasks` lists, or your own as file.py:function."
        )
    return _from_file(Path(file), function)


def _from_file(path: Path, function: str) -> Task:
    from edgepress.compress.task import Task

    if path.suffix != ".py":
        raise TaskError(f"{path} is not a Python file: give the task as file.py:function.")
    if not path.is_file():
        raise TaskError(f"There is no file {path}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and torch.export look the module up by name
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskError(f"{path} cannot be read: {_said(error, path)}.") from error
    build = getattr(module, function, None)
    if not callable(build):
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == path.stem]
        raise TaskError(f"{path} has no function '{function}'; it has: {', '.join(own) or 'none'}.")
    try:
        task = build()
    except UserError:
        raise
    except Exception as error:
        raise TaskError(f"{path}:{function} raised {_said(error, path)}.") from error
    if not isinstance(task, Task):
        raise TaskError(f"{path}:{function} returned a {type(task).__name__}, not an edgepress.Task.")
    return task


def _said(error: BaseException, path: Path) -> str:
    """'ValueError: too few (line 12)', the line being the last one in the user's file."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} (line {error.lineno})"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == path.name]
    return f"{type(error).__name__}: {error}" + (f" (line {lines[-1]})" if lines else "")
