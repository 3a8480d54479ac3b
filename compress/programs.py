"""Whether a ``.pt2`` file may be loaded: ``torch.export.load`` unpickles, calls and evaluates what the file asks for.

A tensor may ask to be unpickled, a node of the graph may name any function below ``torch`` (``torch.os.system`` is one), and
sizes are evaluated as Python. `check_program` knows what ``torch.export.save`` writes for tensors and operators, and refuses
the rest. The agent that runs on devices holds the same rules for itself: it imports nothing of ours.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import FileError

__all__ = ["check_program"]

_ENTRY = re.compile(
    r"archive_format|archive_version|version|byteorder|\.data/\w+|models/model\.json|data/sample_inputs/model\.pt|extra/[\w.-]+"
    r"|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
)
_OPERATOR = re.compile(
    # aten.save and aten.from_file write and read files
    r"torch\.ops\.(aten|prims|quantized_decomposed)\.(?!(save|from_file)\b)((?!__)\w+|__(and|or|xor|lshift|rshift)__)"
    r"(\.[A-Za-z]\w*)?"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|associative_scan|map_impl|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|torch\._?sym_\w+|math\.[a-z]\w*"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|xor|not_|lshift|rshift)"
)
_WORDS = {
    "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Abs", "Eq", "Ne", "Lt", "Le", "Gt",
    "Ge", "And", "Or", "Not", "Equality", "Unequality", "LessThan", "StrictLessThan", "GreaterThan", "StrictGreaterThan",
    "Half", "One", "Zero", "NegativeOne", "true", "false", "positive", "negative", "nonnegative", "integer", "real",
    "zero", "evaluate", "precision", "True", "False", "None", "FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod",
    "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv",
    "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal",
    "ToFloat", "Identity",
}  # fmt: skip
_LITERAL = re.compile(r"'[\w.]+'|\d+\.\d+(e[+-]?\d+)?")
_SIGNS = re.compile(r"[\w\s*/%+\-(),=<>]*")  # no quotes and no dots: nothing is looked up in anything
_NESTS = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


def check_program(path: Path) -> None:
    """Refuse a ``.pt2`` file in which anything would be unpickled, evaluated or called that is no tensor operator.

    Raises:
        FileError: no such file, a damaged one, or what is in it that has no place there.

    Example:
        >>> check_program(Path("missing.pt2"))
        Traceback (most recent call last):
        ...
        edgepress.compress.errors.FileError: There is no file missing.pt2.
    """
    if not path.is_file():
        raise FileError(f"There is no file {path}.")
    try:
        reader = torch._C.PyTorchFileReader(str(path))  # PyTorch's own: another would see other entries in a made-up archive
        names = reader.get_all_records()
        problem = next(_problems(names, reader), "")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise FileError(f"{path} is no program of torch.export.save, or damaged ({type(error).__name__}).") from error
    if problem:
        raise FileError(f"{path} is not loaded: {problem}.")


def _problems(names: list[str], reader: Any) -> Iterator[str]:
    for name in names:
        if not _ENTRY.fullmatch(name):
            yield f"it holds the entry '{name[:80]}', which torch.export.save does not write for tensors"
    if len(set(names)) != len(names):
        yield "it holds two entries of one name"
    for name in ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json"):
        for tensor, entry in json.loads(reader.get_record(name))["config"].items():
            if entry["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
                yield f"its tensor '{tensor[:80]}' is a pickle, which could run code when it is read"
    if "data/sample_inputs/model.pt" in names and (content := reader.get_record("data/sample_inputs/model.pt")):
        try:
            torch.load(io.BytesIO(content), weights_only=True)
        except Exception:  # torch.export.load would go on and read it as any pickle
            yield "its sample inputs are a pickle, which could run code when it is read"
    for key, value in _walk(json.loads(reader.get_record("models/model.json"))):
        yield from _value(key, value)


def _value(key: str, value: Any) -> Iterator[str]:
    if key in ("target", "as_operator") and isinstance(value, str) and not _OPERATOR.fullmatch(value):
        yield f"its graph calls '{value[:80]}', which is no operator on tensors"
    if key == "expr_str" and not _plain(value):
        yield f"a size in it is no plain expression: '{value[:80]}'"
    if key in ("in_spec", "out_spec") and isinstance(value, str):
        for inner, kind in _walk(json.loads(value)[1]):
            if inner == "type" and kind not in _NESTS:
                yield f"its inputs or outputs are a '{str(kind)[:80]}': export a network that takes and gives tensors"


def _plain(expression: str) -> bool:
    """Whether evaluating a size as Python only computes."""
    rest = _LITERAL.sub("0", expression)
    words = set(re.findall(r"(?<!\w)[A-Za-z_]\w*", rest)) - _WORDS
    return bool(_SIGNS.fullmatch(rest)) and all(re.fullmatch(r"z?[suf]+\d+", word) for word in words)


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Each key with its value, at any depth."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from item.items()
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
