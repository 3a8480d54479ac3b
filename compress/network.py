"""A traced network: a ``torch.export`` graph with its weights, its example inputs and a history of passes."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from .composites import split_composites
from .counting import count_macs, count_node_macs
from .errors import FileError, TraceError, UserError
from .modes import set_mode
from .programs import check_program
from .refusals import advice, first_line, given_inputs, user_line
from .regions import inline_regions
from .surgery import Plan
from .task import misfit

__all__ = ["EXPORT_BATCH", "Network", "export_program", "retrace", "trace"]

EXPORT_BATCH = 13
"""The batch size that graphs are exported with: a prime that no dimension uses, so that a symbolic size is never ambiguous."""


class Network:
    """A network as edgepress works on it: whatever ``torch.export`` can see, without the user's class.

    It is called, trained, copied and moved like a module; a pass returns a new one and leaves its input as it was.

    Attributes:
        module: the graph and its weights; parameter names are those of the original module.
        example_inputs: the inputs as the user gave them, batch first, on the CPU.
        history: one dict for each pass that made the network, ``{"pass": "Prune", ...configuration and findings}``.
        kept: what passes recorded of the original's weights as they sliced them; `plan` is what to ask.

    Example:
        >>> import torch
        >>> network = trace(torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU()), torch.zeros(1, 4))
        >>> network.parameter_count, network.macs()
        (10, 8)
        >>> network.predict(torch.zeros(5, 4).numpy()).shape
        (5, 2)
    """

    def __init__(
        self,
        module: fx.GraphModule,
        example_inputs: tuple[Tensor, ...],
        history: tuple[dict[str, Any], ...] = (),
        kept: Plan | None = None,
    ):
        self.module = module
        self.example_inputs = example_inputs
        self.history = history
        self.kept = kept if kept is not None else Plan({name: tuple(t.shape) for name, t in module.state_dict().items()})

    # ---- running

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the graph: tensors in, what the original module returns out."""
        return self.module(*inputs)

    def predict(self, *inputs: np.ndarray) -> Any:
        """Run in evaluation mode on numpy arrays ``[N, ...]``: one array, or a tuple where there are several outputs."""
        if problem := misfit(inputs, self.example_inputs):
            raise UserError(f"{problem}.")
        was_training, device = self.training, self.device
        if was_training:
            self.eval()
        tensors = [torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in inputs]
        try:
            with torch.inference_mode():
                outputs = self.module(*tensors)
        finally:
            if was_training:
                self.train()
        leaves = tuple(t.float().cpu().numpy() if t.dtype == torch.bfloat16 else t.cpu().numpy() for t in _leaves(outputs))
        return leaves[0] if len(leaves) == 1 else leaves

    # ---- the module's ways

    @property
    def training(self) -> bool:
        """Whether dropout and batch normalisation act as in training."""
        return self.module.training

    def train(self) -> Network:
        """Switch to training mode, in place."""
        set_mode(self.module, True)
        return self

    def eval(self) -> Network:
        """Switch to evaluation mode, in place."""
        set_mode(self.module, False)
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((t.device for t in self.tensors()), torch.device("cpu"))

    def to(self, device: torch.device | str | None = None, memory_format: torch.memory_format | None = None) -> Network:
        """Move the weights, in place; sizes and constants that the export baked a device into follow."""
        if memory_format is not None:
            self.module.to(memory_format=memory_format)  # type: ignore[call-overload]
        if device is not None:
            self.module.to(device)
            for node in self.module.graph.nodes:
                if node.op == "call_function" and node.kwargs.get("device") is not None:
                    node.update_kwarg("device", torch.device(device))
                if node.op == "get_attr":
                    owner, leaf = _owner(self.module, node.target)
                    value = getattr(owner, leaf)
                    if isinstance(value, Tensor) and value.device != torch.device(device):
                        setattr(owner, leaf, value.to(device))
            self.module.recompile()
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable weights."""
        return self.module.parameters()

    def tensors(self) -> Iterator[Tensor]:
        """Parameters and buffers, each once."""
        yield from self.module.parameters()
        yield from self.module.buffers()

    def state_dict(self) -> dict[str, Tensor]:
        """Names and weights, named as in the original module."""
        return dict(self.module.state_dict())

    def copy(self) -> Network:
        """An independent copy: graph, weights and history."""
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        with warnings.catch_warnings():  # torch's own tree specification warns about itself when it is copied
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
            module = copy.deepcopy(self.module, memo)
        return Network(module, self.example_inputs, copy.deepcopy(self.history, memo), self.kept)

    def then(self, **entry: Any) -> Network:
        """The same network with one more line of history."""
        return Network(self.module, self.example_inputs, (*self.history, entry), self.kept)

    def plan(self) -> Plan:
        """Which positions of the original's weights are left: to write, or to replay on the user's own class and checkpoints.

        Raises:
            UserError: a pass sliced weights without recording it.
        """
        return self.kept.of(self.state_dict())

    # ---- size

    @property
    def parameter_count(self) -> int:
        """How many trainable numbers there are; tied weights count once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def bytes(self) -> int:
        """Bytes of all weights and buffers in memory."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def macs(self) -> int:
        """Multiply-accumulates for one example, of convolutions, matrix products, recurrent layers and attention."""
        return count_macs(self.module, self._one())

    def node_macs(self) -> dict[str, int]:
        """Multiply-accumulates of one example by graph node; nodes without any are left out."""
        return count_node_macs(self.module, self._one())

    def _one(self) -> list[Tensor]:
        device = self.device
        return [x[:1].to(device) for x in self.example_inputs]

    # ---- on disk

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a folder with ``program.pt2`` (torch.export's format, without weights), ``weights.safetensors`` and
        ``network.json``. Nothing in it is a pickle.

        Raises:
            FileError: the folder cannot be written.
        """
        path = Path(path)
        network = self.copy().to("cpu").eval()
        program = _export(network.module, network.example_inputs)
        weights = {k: v.detach() for k, v in program.state_dict.items()}
        for name, value in weights.items():
            meta = value.to("meta")
            program.state_dict[name] = nn.Parameter(meta, False) if isinstance(program.state_dict[name], nn.Parameter) else meta
        program._example_inputs = None
        described = {
            "inputs": [{"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")} for x in self.example_inputs],
            "parameters": [name for name, _ in network.module.named_parameters(remove_duplicate=False)],
            "history": list(self.history),
            "surgery": self.kept.json(),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
                folder = Path(scratch) / "network"
                folder.mkdir()
                _save_program(program, folder / "program.pt2")
                shared = {k: weights[k].clone().contiguous() for k in weights}
                save_file(
                    {**shared, **{f"example.{i}": x.contiguous() for i, x in enumerate(self.example_inputs)}},
                    folder / "weights.safetensors",
                )
                (folder / "network.json").write_text(json.dumps(described, indent=1, default=str) + "\n")
                old = Path(scratch) / "old"
                if path.exists():
                    path.rename(old)
                folder.rename(path)
                shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            raise FileError(f"Cannot write the network to {path}: {getattr(error, 'strerror', None) or error}.") from error
        return path

    def save_weights(self, path: str | os.PathLike[str]) -> Path:
        """Write the weights alone, named as in the original module: `safetensors.torch.load_file` reads them.

        Raises:
            FileError: the file cannot be written.
        """
        path = Path(path)
        weights = {name: value.detach().cpu().clone().contiguous() for name, value in self.state_dict().items()}
        try:
            save_file(weights, path)
        except (OSError, SafetensorError) as error:
            raise FileError(f"Cannot write the weights to {path}: {getattr(error, 'strerror', None) or error}.") from error
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Network:
        """Read a folder that `save` wrote. No pickle is ever read.

        Raises:
            FileError: not such a folder, a damaged file, or a program that asks for a pickle.
        """
        path = Path(path)
        missing = [n for n in ("program.pt2", "weights.safetensors", "network.json") if not (path / n).is_file()]
        if missing:
            raise FileError(f"{path} is not a saved network: {', '.join(missing)} is missing.")
        try:
            described = json.loads((path / "network.json").read_text())
            weights = load_file(path / "weights.safetensors")
            _refuse_pickles(path / "program.pt2")
            check_program(path / "program.pt2")
            with _quiet():
                program = torch.export.load(path / "program.pt2")
        except FileError:
            raise
        except Exception as error:
            raise FileError(f"{path} is damaged ({type(error).__name__}: {str(error).splitlines()[0][:200]}).") from error
        inputs = tuple(weights.pop(f"example.{i}") for i in range(len(described["inputs"])))
        module = _module(program)
        ties: dict[int, Any] = {}
        for name, old in [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]:
            if name in program.graph_signature.non_persistent_buffers:  # no weight: it came with the program
                continue
            owner, leaf = _owner(module, name)
            if id(old) not in ties:
                value = weights[name]
                ties[id(old)] = nn.Parameter(value, value.is_floating_point()) if name in described["parameters"] else value
            setattr(owner, leaf, ties[id(old)])
        kept = Plan.from_json(described["surgery"]) if "surgery" in described else None
        return cls(module, inputs, tuple(described["history"]), kept)


def trace(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> Network:
    """Capture a module with ``torch.export``, the batch dimension left open.

    Args:
        model: the trained module; it is left as it was.
        example_inputs: one tensor or a tuple, batch first; the batch size does not matter.

    Raises:
        TraceError: torch.export refuses the network, the inputs do not fit it or are no tensors, or a weight is NaN or
            infinite. The message names the line of the model's code where it is known, and what to change.

    Example:
        >>> import torch
        >>> trace(torch.nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8)).macs()
        7776
    """
    inputs = given_inputs(model, example_inputs)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and not _sound(value):
            raise TraceError(f"The weight '{name}' holds NaN or infinite values: load a sound checkpoint.")
    model = _plain(_copied(model).cpu().eval())
    inputs = tuple(x.detach().cpu() for x in inputs)
    try:
        with torch.no_grad():
            outputs = model(*inputs)
    except Exception as error:
        shapes = ", ".join(str(list(x.shape)) for x in inputs)
        raise TraceError(
            f"The network does not run on the example inputs of shape {shapes}: {first_line(error)}{user_line(error)}. "
            "Give example_inputs as the network takes them, batch first."
        ) from error
    _check_outputs(outputs)
    kept = Plan({name: tuple(value.shape) for name, value in model.state_dict().items()})
    return Network(_module(_export(model, inputs)), inputs, kept=kept)


def _check_outputs(outputs: Any) -> None:
    """Containers and leaves that a graph can return and a saved network can hold."""
    leaves, spec = pytree.tree_flatten(outputs)
    strange = [x for x in leaves if not isinstance(x, Tensor | int | float | str | None)]
    try:
        pytree.treespec_dumps(spec)
    except NotImplementedError:  # a named tuple
        strange = [outputs]
    if strange:
        kind = type(strange[0]).__name__
        cache = " (of a transformers model: set model.config.use_cache = False)" if "Cache" in kind else ""
        raise TraceError(f"The network returns a {kind}: return tensors, or tuples, lists or dicts of tensors{cache}.")


def _sound(value: Tensor) -> bool:
    """Whether a parameter is finite; a buffer may be a mask, which holds -inf."""
    masked = value.isneginf() if not isinstance(value, nn.Parameter) else torch.zeros_like(value, dtype=torch.bool)
    return bool((value.isfinite() | masked).all())


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy; weights that a hook has computed, which torch refuses to copy, come detached."""
    held = [t for m in model.modules() for t in _leaves(vars(m))]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in held if t.grad_fn is not None})


def _plain(model: nn.Module) -> nn.Module:
    """Fold weight normalisation, spectral normalisation, pruning masks and every other parametrization into plain weights, in
    place.

    Slicing the factors of such a weight would change what is left of it, and a deployed file holds the product anyway.
    """
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            module.__class__ = _twin(type(module))  # torch takes the property from the class, which the user's module shares
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        for hook in list(module._forward_pre_hooks.values()):  # the older way
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
            elif isinstance(hook, BasePruningMethod):
                prune.remove(module, hook._tensor_name)
    return model


def _twin(kind: type) -> type:
    return type(kind.__name__, kind.__bases__, {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")})


def retrace(network: Network) -> Network:
    """The same network exported again: shapes and constants in its graph's metadata become those of the present weights."""
    fresh = network.copy().to("cpu").eval()
    return Network(_module(_export(fresh.module, fresh.example_inputs)), fresh.example_inputs, fresh.history, fresh.kept)


def export_program(network: Network) -> torch.export.ExportedProgram:
    """The network as an ``ExportedProgram`` in evaluation mode on the CPU, for exporters; its batch is dynamic."""
    fresh = network.copy().to("cpu").eval()
    return _contiguous_attention(_export(fresh.module, fresh.example_inputs))


def _contiguous_attention(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Fix the strides of what attention gives, in place: torch's kernel gives others than the products that a converter puts in
    its place, and the reshapes behind it would be decomposed for the wrong ones."""
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default):
        with program.graph.inserting_after(node):
            fixed = program.graph.call_function(torch.ops.aten.contiguous.default, (node,))
        fixed.meta = {**node.meta, "val": node.meta["val"].contiguous()}
        node.replace_all_uses_with(fixed, lambda user, fixed=fixed: user is not fixed and user.op != "output")
    program.graph_module.recompile()
    return program


def _export(module: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    examples = _batch(inputs, EXPORT_BATCH)
    shapes = _open_batch(module, batch, len(examples))
    first: Exception | None = None
    for strict in (False, True):
        try:
            with _quiet():
                return _any_strides(torch.export.export(module, examples, dynamic_shapes=shapes, strict=strict))
        except Exception as error:
            if first is not None:
                line = user_line(error) or user_line(first)
                raise TraceError(
                    f"torch.export cannot capture the network{line}: {advice(first, error, lambda: module(*examples))}"
                ) from error
            first = error
    raise AssertionError("unreachable")


def _any_strides(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Make every view a reshape, in place.

    ``torch.export`` writes a reshape as a view where the strides at hand allow one; another attention kernel, on another device
    or after a converter's decomposition, gives other strides.
    """
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    program.graph_module.recompile()
    return program


def _open_batch(module: nn.Module, batch: Any, count: int) -> tuple[Any, ...]:
    """The dynamic shapes of ``count`` inputs; those that ``forward`` takes as ``*args`` stand in a tuple of their own."""
    shapes = [{0: batch}] * count
    if isinstance(module, fx.GraphModule):  # its inputs are flat, whatever forward says
        return tuple(shapes)
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    named = next((i for i, kind in enumerate(kinds) if kind is inspect.Parameter.VAR_POSITIONAL), count)
    return tuple(shapes) if named >= count else (*shapes[:named], tuple(shapes[named:]))


def _module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program as a graph module that knows it is in evaluation mode, as it was exported."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    inline_regions(module)
    split_composites(module)
    module.training = False
    return module


def _batch(inputs: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    """Inputs repeated along dim 0 to a batch of ``size``."""
    return tuple(x.repeat(-(-size // x.shape[0]), *([1] * (x.dim() - 1)))[:size].contiguous() for x in inputs)


def _leaves(outputs: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return (module.get_submodule(path) if path else module), leaf


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's own log lines off the terminal: what went wrong is said once, by us."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink), contextlib.redirect_stdout(sink):
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    buffer = io.BytesIO()  # torch reports a full disk as a RuntimeError of many lines; Python's own writing says it plainly
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getvalue())


# all that a program of ours holds; torch.export.load unpickles what other names stand for
_ENTRY = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|\.data/\w+|models/\w+\.json|data/sample_inputs/\w+\.pt"
    r"|data/weights/(weight_\d+|\w+_config\.json)|data/constants/(tensor_\d+|\w+_config\.json))"
)


def _refuse_pickles(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if not _ENTRY.fullmatch(entry.filename):
                raise FileError(f"{path} holds the unknown entry '{entry.filename}': it was not made by edgepress.")
            if "/sample_inputs/" in entry.filename and entry.file_size:
                raise FileError(f"{path} holds pickled sample inputs: it was not made by edgepress.")
            if entry.filename.endswith("_config.json"):
                for payload in json.loads(archive.read(entry))["config"].values():
                    if payload["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
                        raise FileError(f"{path} asks for a pickle, which could run code: it was not made by edgepress.")
