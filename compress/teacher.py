"""Teachers: whatever can be asked for the outputs that a student is to give.

A network as edgepress traces it, a module, a ``torch.export`` program, a file (``.pt2``, ``.onnx``, TorchScript, a saved
network), or several of these as an ensemble.
"""

from __future__ import annotations

import copy
import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from .errors import DeviceError, EdgepressError, FileError, RecipeError
from .losses import floats
from .network import Network
from .programs import check_program
from .regions import inline_regions

__all__ = ["Teacher", "TeacherSource", "check_teacher", "fingerprint", "open_teacher", "teacher_network"]

Teacher = Callable[[tuple[Tensor, ...]], Any]
"""A batch's inputs to outputs, as the student gives them."""

TeacherSource = Network | nn.Module | ExportedProgram | str | os.PathLike[str] | Sequence[Any]
"""What `open_teacher` takes; a sequence of them is an ensemble."""


def open_teacher(source: TeacherSource, device: torch.device | str) -> Teacher:
    """A function that gives the teacher's outputs, in evaluation mode, without gradients.

    An ensemble gives the mean of its members' outputs. Of logits that is the geometric mean of their probabilities (one of the
    two means that Hinton, Vinyals and Dean 2015 name): unlike the logarithm of the mean probability it stays the same mean at
    every temperature, and it serves boxes and regressions alike.

    Args:
        source: a `Network`, a module (TorchScript ones too), an ``ExportedProgram``, the path of a ``.pt2``, ``.onnx`` or
            TorchScript file or of a folder that `Network.save` wrote, or several of these in a list. **A TorchScript file runs
            what its author wrote: open those you trust.** A ``.pt2`` file is checked first and holds operators alone.
        device: where the student is.

    Raises:
        FileError: no such file, a damaged one, or one that is refused.
        RecipeError: a source of another kind.
        DeviceError: ONNX Runtime is not installed.

    Example:
        >>> import torch
        >>> one, two = torch.nn.Identity(), torch.nn.Threshold(0.0, 3.0)
        >>> open_teacher([one, two], "cpu")((torch.tensor([[2.0, -1.0]]),))
        tensor([[2., 1.]])
    """
    device = torch.device(device)
    if isinstance(source, list | tuple):
        if not source:
            raise RecipeError("An ensemble of teachers needs at least one: the list is empty.")
        members = [open_teacher(member, device) for member in source]
        return lambda inputs: _mean([member(inputs) for member in members])
    network = teacher_network(source)
    if network is not None:
        network = network.to(device).eval()
        return lambda inputs: network(*inputs)
    if isinstance(source, nn.Module):
        return _module(copy.deepcopy(source), device)
    if not isinstance(source, str | os.PathLike):
        raise RecipeError(
            f"A teacher cannot be a {type(source).__name__}: give a network, a module, an ExportedProgram, a file, or a list."
        )
    path = Path(source)
    if not path.is_file():
        raise FileError(f"There is no teacher {path}.")
    return _onnx(path, device) if path.suffix == ".onnx" else _module(_torchscript(path), device)


def teacher_network(source: Any) -> Network | None:
    """The teacher as a network of its own, whose inner tensors can be seen; None where there is only a function of it."""
    if isinstance(source, Network):
        return source.copy()
    if isinstance(source, ExportedProgram):
        return _from_program(source)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            return Network.load(path)
        if path.suffix == ".pt2":
            check_program(path)
            try:
                return _from_program(torch.export.load(path))
            except EdgepressError:
                raise
            except Exception as error:
                raise FileError(f"PyTorch cannot load the teacher {path}: {_first_line(error)}.") from error
    return None


def check_teacher(teacher: Teacher, inputs: tuple[Tensor, ...], outputs: Any) -> Any:
    """Ask for one batch and compare with the student's outputs before training starts.

    Args:
        teacher: from `open_teacher`.
        inputs: a batch.
        outputs: the student's for it.

    Returns:
        The teacher's outputs.

    Raises:
        RecipeError: it does not run on these inputs, or its outputs have other shapes.

    Example:
        >>> import torch
        >>> check_teacher(lambda inputs: torch.zeros(2, 1000), (torch.zeros(2, 3),), torch.zeros(2, 10))
        Traceback (most recent call last):
        ...
        edgepress.compress.errors.RecipeError: The teacher gives [2, 1000] where the student gives [2, 10]: take a teacher of \
the same task.
    """
    try:
        wanted = teacher(inputs)
    except EdgepressError:
        raise
    except Exception as error:
        shapes = ", ".join(str(list(x.shape)) for x in inputs)
        raise RecipeError(f"The teacher does not run on the student's inputs {shapes}: {_first_line(error)}.") from error
    theirs, ours = ([list(x.shape) for x in floats(y)] for y in (wanted, outputs))
    if theirs != ours:
        said = [", ".join(map(str, shapes)) or "no real numbers" for shapes in (theirs, ours)]
        raise RecipeError(f"The teacher gives {said[0]} where the student gives {said[1]}: take a teacher of the same task.")
    return wanted


def fingerprint(source: Any) -> str:
    """A hash by which a teacher's outputs can be found again; empty where nothing tells two teachers apart.

    Example:
        >>> fingerprint(torch.nn.Identity())
        ''
    """
    if isinstance(source, list | tuple):
        parts = [fingerprint(member) for member in source]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest() if all(parts) else ""
    if isinstance(source, str | os.PathLike) and Path(source).is_file():
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()
    if isinstance(source, str | os.PathLike | ExportedProgram):
        source = teacher_network(source)
    if not isinstance(source, Network):
        return ""
    digest = hashlib.sha256(str(source.module.graph).encode())
    for tensor in source.tensors():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---- kinds


def _from_program(program: ExportedProgram) -> Network:
    module = program.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    inline_regions(module)
    shapes = [node.meta["val"].shape for node in module.graph.find_nodes(op="placeholder")]
    if any(shape and isinstance(shape[0], int) for shape in shapes):
        raise RecipeError(
            f"The teacher's program takes batches of {shapes[0][0]} alone: export it with an open batch, "
            "torch.export.export(..., dynamic_shapes=...)."
        )
    inputs = program.example_inputs[0] if program.example_inputs else ()
    return Network(module, tuple(x for x in inputs if isinstance(x, Tensor)))


def _module(module: nn.Module, device: torch.device) -> Teacher:
    module = module.to(device).eval()
    return lambda inputs: module(*inputs)


def _torchscript(path: Path) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch.export is newer
            return torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-any-return]
    except Exception as error:
        raise FileError(
            f"{path} is no TorchScript file that PyTorch can load: {_first_line(error)}. A teacher's file is TorchScript, .pt2, "
            ".onnx or a folder of Network.save; of a checkpoint with weights alone, pass the module that they belong to."
        ) from error


def _onnx(path: Path, device: torch.device) -> Teacher:
    """Through ONNX Runtime; a file of a fixed batch size runs in pieces."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise DeviceError("An .onnx teacher needs ONNX Runtime: pip install onnxruntime") from error
    ort.disable_telemetry_events()
    wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    providers = [p for p in (*wanted, "CPUExecutionProvider") if p in ort.get_available_providers()]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = ort.InferenceSession(str(path), options, providers)
    except Exception as error:
        raise FileError(f"ONNX Runtime cannot load the teacher {path}: {_first_line(error)}.") from error
    ports = session.get_inputs()
    fixed = next((port.shape[0] for port in ports if port.shape and isinstance(port.shape[0], int)), 0)

    def ask(inputs: tuple[Tensor, ...]) -> Any:
        arrays = [x.detach().cpu().contiguous().numpy() for x in inputs]
        if len(arrays) != len(ports):
            raise RecipeError(f"The teacher {path} takes {len(ports)} inputs, the student {len(arrays)}.")
        count = len(arrays[0])
        if fixed and count % fixed:
            raise RecipeError(f"The teacher {path} takes batches of {fixed}, not of {count}: export it with an open batch.")
        size = fixed or count
        parts = [
            session.run(None, {p.name: a[i : i + size] for p, a in zip(ports, arrays, strict=True)})
            for i in range(0, count, size)
        ]
        joined = tuple(torch.from_numpy(np.concatenate(outputs)).to(device) for outputs in zip(*parts, strict=True))
        return joined[0] if len(joined) == 1 else joined

    return ask


def _mean(outputs: list[Any]) -> Any:
    shapes = [[list(x.shape) for x in floats(y)] for y in outputs]
    if any(s != shapes[0] for s in shapes):
        raise RecipeError(f"The teachers of the ensemble give outputs of different shapes: {shapes}.")
    means = iter([torch.stack(list(same)).mean(0) for same in zip(*(floats(y) for y in outputs), strict=True)])
    return pytree.tree_map(lambda x: next(means) if isinstance(x, Tensor) and x.is_floating_point() else x, outputs[0])


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0].rstrip(".") if lines else type(error).__name__
