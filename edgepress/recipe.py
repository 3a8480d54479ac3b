"""Recipes: an ordered list of passes and what to export, in YAML.

```yaml
passes:
  - shorten: {macs: 0.6}
  - prune: {macs: 0.7, criterion: taylor}
  - distill: {epochs: 10, lr: 0.05}
export:
  formats: [onnx, tflite]
  precisions: [fp32, int8]
  calibrator: mse
  layers: {head.*: fp32}
```
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from edgepress.compress import pruning
from edgepress.compress.distill import Distill
from edgepress.compress.equalize import Equalize
from edgepress.compress.errors import FileError, RecipeError
from edgepress.compress.passes import Pass, describe
from edgepress.compress.quantization import CALIBRATORS, PRECISIONS, Quantization, quantization
from edgepress.compress.quantize import Quantize
from edgepress.compress.rounding import Round
from edgepress.compress.schedule import Schedule
from edgepress.compress.shorten import Shorten
from edgepress.compress.sparsify import Sparsify
from edgepress.targets.export import FORMATS as SUFFIXES

__all__ = ["FORMATS", "Recipe", "default_recipe", "read_recipe"]

FORMATS = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
_PASSES: dict[str, Any] = {
    "prune": pruning.Prune,
    "shorten": Shorten,
    "sparsify": Sparsify,
    "distill": Distill,
    "equalize": Equalize,
    "round": Round,
    "quantize": Quantize,
}
_CRITERIA: dict[str, Any] = {
    kind.__name__.lower(): kind
    for kind in (
        pruning.Taylor,
        pruning.Activation,
        pruning.Fisher,
        pruning.OBD,
        pruning.Magnitude,
        pruning.Lamp,
        pruning.BatchNormScale,
        pruning.GeometricMedian,
        pruning.Random,
    )
}
_NOT_IN_FILES = {"checkpoint", "clock"}


@dataclass(frozen=True)
class Recipe:
    """What `press` does to a network.

    Args:
        passes: run in this order; may be empty.
        formats: of the files, among 'onnx' and 'tflite'.
        precisions: of the files, see `edgepress.compress.quantization.PRECISIONS`; fp32 is always written: what quantized files
            are compared with.
        calibrator: how the ranges of activations are taken from the calibration data: 'minmax', 'average', 'percentile', 'mse'
            or 'entropy'.
        layers: patterns of module names or operators to another precision of those in the quantized files, see
            `Quantization`.

    Example:
        >>> from edgepress.compress.distill import Distill
        >>> print(Recipe((Distill(epochs=2),), formats=("onnx",)).yaml().splitlines()[1])
        - distill:
    """

    passes: tuple[Pass, ...] = ()
    formats: tuple[str, ...] = FORMATS
    precisions: tuple[str, ...] = ("fp32", "int8")
    calibrator: str = "mse"
    layers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = (
            ("format", self.formats, FORMATS),
            ("precision", self.precisions, tuple(PRECISIONS)),
            ("calibrator", (self.calibrator,), CALIBRATORS),
        )
        for kind, chosen, known in kinds:
            if not chosen:
                raise RecipeError(f"The recipe names no {kind}: take some of {', '.join(known)}.")
            for item in chosen:
                _known(item, known, kind)
        for pattern, precision in self.layers.items():
            _known(precision, tuple(PRECISIONS), f"precision (of {pattern})")

    def quantization(self, precision: str) -> Quantization:
        """What a file in a precision is written by."""
        settings = {"calibrator": self.calibrator, "layers": dict(self.layers)} if precision != "fp32" else {}
        return quantization(precision, **settings)

    def within(self, minutes: float) -> Recipe:
        """The same recipe with its training in so many minutes, shared out by the epochs that each pass would train.

        Example:
            >>> from edgepress.compress.distill import Distill
            >>> [p.minutes for p in Recipe((Distill(epochs=1), Distill(epochs=3))).within(20).passes]
            [5.0, 15.0]
        """
        if not 0 < minutes < float("inf"):
            raise RecipeError(f"A time budget of {minutes:g} minutes makes no sense: it is above 0.")
        epochs = sum(_epochs(item) for item in self.passes)
        return replace(self, passes=tuple(_within(item, minutes / epochs) if _epochs(item) else item for item in self.passes))

    def yaml(self) -> str:
        """The recipe as `read_recipe` reads it."""
        passes = []
        for item in self.passes:
            passes.append({type(item).__name__.lower(): _written(item)})
        export: dict[str, Any] = {"formats": list(self.formats), "precisions": list(self.precisions)}
        if self.calibrator != "mse":
            export["calibrator"] = self.calibrator
        if self.layers:
            export["layers"] = dict(self.layers)
        return yaml.safe_dump({"passes": passes, "export": export}, sort_keys=False)


def _epochs(item: Pass) -> float:
    """Epochs of training in a pass."""
    if isinstance(item, pruning.Prune) and item.recover is not None:
        return item.rounds * item.recover.epochs
    return item.epochs if isinstance(item, Schedule) else 0.0


def _within(item: Any, minutes: float) -> Any:
    """A pass that trains for so many minutes an epoch."""
    if isinstance(item, pruning.Prune) and item.recover is not None:
        return replace(item, recover=replace(item.recover, minutes=minutes * item.recover.epochs))
    return replace(item, minutes=minutes * item.epochs)


def _written(item: Any) -> dict[str, Any]:
    """The settings of a pass as a file has them."""
    settings = {k: v for k, v in describe(item).items() if k not in _not_in_files(type(item))}
    nested = {k: _written(getattr(item, k)) for k in settings if is_dataclass(getattr(item, k)) and k != "criterion"}
    return settings | nested


def _not_in_files(kind: Any) -> set[str]:
    """Settings that only Python can give: where a run stands, and what was found out about the machine."""
    return _NOT_IN_FILES | ({"precision"} if issubclass(kind, Distill) else set())


def default_recipe() -> Recipe:
    """Prune to 60 % of the MACs in four rounds, recover for ten epochs, write everything.

    Example:
        >>> [type(p).__name__ for p in default_recipe().passes]
        ['Prune', 'Distill']
    """
    return Recipe((pruning.Prune(macs=0.6), Distill(epochs=10.0)))


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        FileError: no such file, or not YAML.
        RecipeError: an unknown key (the nearest known one is named), a wrong kind of value, or a value out of range.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"Cannot read the recipe {path}: {error}.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {str(error).splitlines()[0]}.") from error
    try:
        return _recipe(content)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def _recipe(content: Any) -> Recipe:
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = {"passes": content}
    if not isinstance(content, Mapping):
        raise RecipeError("a recipe is a list of passes, or a mapping with the keys passes and export.")
    for key in content:
        _known(key, ("passes", "export"), "key")
    export = content.get("export") or {}
    if not isinstance(export, Mapping):
        raise RecipeError("export is a mapping with the keys formats, precisions, calibrator and layers.")
    for key in export:
        _known(key, ("formats", "precisions", "calibrator", "layers"), "key")
    passes = content.get("passes") or []
    if not isinstance(passes, Sequence) or isinstance(passes, str):
        raise RecipeError("passes is a list, one pass each.")
    chosen: dict[str, Any] = dict(export)
    for key in {"formats", "precisions"} & export.keys():
        chosen[key] = tuple(export[key]) if isinstance(export[key], list) else (export[key],)
    if not isinstance(chosen.get("layers", {}), Mapping):
        raise RecipeError("layers is a mapping from patterns of module names to precisions.")
    return Recipe(tuple(_pass(item) for item in passes), **chosen)


def _pass(item: Any) -> Pass:
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, Mapping) or len(item) != 1:
        raise RecipeError(f"a pass is written as `name: {{settings}}`, not {item!r}.")
    ((name, settings),) = item.items()
    _known(name, tuple(_PASSES), "pass")
    return typing.cast(Pass, _build(_PASSES[name], settings or {}, str(name)))


def _build(kind: Any, settings: Any, name: str) -> Any:
    """A dataclass from a mapping; every key and every kind of value is checked."""
    if not isinstance(settings, Mapping):
        raise RecipeError(f"the settings of {name} are a mapping, not {settings!r}.")
    known = {f.name for f in fields(kind)} - _not_in_files(kind)
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in settings.items():
        _known(key, tuple(sorted(known)), f"setting of {name}")
        special = {"criterion": _criterion, "teacher": _teacher}.get(key)
        values[key] = special(value) if special else _typed(value, hints[key], f"{name}.{key}")
    return kind(**values)


def _teacher(value: Any) -> Any:
    """Files or folders, each of which is there now: training may come hours later."""
    files = [value] if isinstance(value, str) else value
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise RecipeError(f"a teacher is the path of a file, or a list of them, not {value!r}.")
    for file in files:
        if not Path(file).exists():
            raise RecipeError(f"there is no teacher {file}: paths count from the folder where edgepress is started.")
    return value


def _criterion(value: Any) -> Any:
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise RecipeError(f"a criterion is a name or `name: {{settings}}`, not {value!r}.")
    ((name, settings),) = value.items()
    _known(name, tuple(_CRITERIA), "criterion")
    kind = _CRITERIA[name]
    return _build(kind, settings or {}, str(name)) if is_dataclass(kind) else kind()


def _typed(value: Any, hint: Any, name: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if typing.get_origin(hint) is typing.Literal:
        _known(value, typing.get_args(hint), f"value of {name}")
        return value
    if typing.get_origin(hint) is Mapping and isinstance(value, Mapping):
        return {str(k): _typed(v, typing.get_args(hint)[1], f"{name}.{k}") for k, v in value.items()}
    for option in options:
        if is_dataclass(option) and isinstance(value, Mapping):
            return _build(option, value, name)
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(option, type) and isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    wanted = " or ".join("nothing" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise RecipeError(f"{name} is {value!r}; it must be {wanted}.")


def _known(value: Any, known: Sequence[Any], kind: str) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), [str(k) for k in known], 1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(map(str, known))}."
        raise RecipeError(f"'{value}' is no known {kind}; {hint}")
