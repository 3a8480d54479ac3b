"""What is in a ``.pt2`` file of ``torch.export.save``, and whether PyTorch can be trusted to load it.

``torch.export.load`` unpickles weights and constants that ask for it, calls any function below ``torch`` that a node of the
graph names (``torch.os.system`` is one), and evaluates symbolic sizes as Python. `examine` lets none of that through: it knows
what ``torch.export.save`` writes for tensors and operators, and refuses the rest.
"""

from __future__ import annotations

import io
import json
import re
import zipfile

__all__ = ["NOTES", "describe", "examine"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

_ENTRY = re.compile(
    r"archive_format|archive_version|version|byteorder|\.data/\w+|models/model\.json|data/sample_inputs/model\.pt|extra/[\w.-]+"
    r"|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
)
_TARGET = re.compile(
    # aten.save and aten.from_file write and read files
    r"torch\.ops\.(aten|prims|quantized_decomposed)\.(?!(save|from_file)\b)((?!__)\w+|__(and|or|xor|lshift|rshift)__)"
    r"(\.[A-Za-z]\w*)?"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|associative_scan|map_impl|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|torch\._?sym_\w+|math\.[a-z]\w*"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|xor|not_|lshift|rshift)"
)
_LITERAL = re.compile(r"'[\w.]+'|\d+\.\d+(e[+-]?\d+)?")
_SIGNS = re.compile(r"[\w\s*/%+\-(),=<>]*")  # no quotes and no dots: nothing is looked up in anything
_WORDS = {
    "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Abs", "Eq", "Ne", "Lt", "Le", "Gt",
    "Ge", "And", "Or", "Not", "Equality", "Unequality", "LessThan", "StrictLessThan", "GreaterThan", "StrictGreaterThan",
    "Half", "One", "Zero", "NegativeOne", "true", "false", "positive", "negative", "nonnegative", "integer", "real",
    "zero", "evaluate", "precision", "True", "False", "None", "FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod",
    "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv",
    "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal",
    "ToFloat", "Identity",
}  # fmt: skip
_SPECS = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64", 12: "bool"}
_PRECISIONS = {6: "fp16", 7: "fp32", 8: "fp64", 13: "bf16"}  # numbers of torch._export.serde.schema.ScalarType

NOTES = "edgepress.json"
"""The extra file that holds edgepress's metadata."""


def describe(data: bytes) -> dict[str, Any]:
    """Inputs, outputs and precision of a program, without PyTorch and without unpickling.

    Returns:
        ``inputs`` and ``outputs`` as lists of ``(name, shape, dtype)``, None where a size is open; ``precision`` of the
        weights; ``notes``, the JSON that edgepress wrote into the file, empty where it did not.

    Raises:
        ValueError: it is no such file, or `examine` refuses it; the message says what is wrong.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise ValueError("it is truncated or not an archive of torch.export.save") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, which torch.export.save never does")
    sizes = {entry.filename.partition("/")[2]: entry for entry in entries}
    try:
        found = examine(list(sizes), lambda name: archive.read(sizes[name]))
        notes = archive.read(sizes["extra/" + NOTES]) if "extra/" + NOTES in sizes else b""
        weights = {name: entry["tensor_meta"] for name, entry in found["weights"].items()}
        _check_weights(found["weights"], {name: entry.file_size for name, entry in sizes.items()})
        program = found["program"]["graph_module"]
        inputs, outputs = _ports(program)
        kinds = {_PRECISIONS[meta["dtype"]] for meta in weights.values() if meta["dtype"] in _PRECISIONS}
        if "quantize" in json.dumps([node["target"] for node in program["graph"]["nodes"]]):
            kinds = {"int8"}
    except (zipfile.BadZipFile, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError("it is truncated or damaged") from error
    precision = kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "fp32"
    return {"inputs": inputs, "outputs": outputs, "precision": precision, "notes": notes}


def examine(names: Sequence[str], read: Callable[[str], bytes]) -> dict[str, Any]:
    """Look through a program's entries for whatever PyTorch would unpickle, evaluate or call.

    Args:
        names: of the entries, without the archive's root folder.
        read: an entry's bytes by its name.

    Returns:
        ``program``, as its JSON says, and ``weights``, what is said of each.

    Raises:
        ValueError: why it is refused.
    """
    if "models/model.json" not in names:
        kind = "a compiled AOTInductor package" if any("aotinductor" in name for name in names) else "no exported program"
        raise ValueError(f"it is {kind}; edgepress runs what torch.export.save writes")
    for name in names:
        if not _ENTRY.fullmatch(name):
            raise ValueError(f"it holds the entry '{name}', which edgepress does not know")
    if len(set(names)) != len(names):
        raise ValueError("it holds two entries of one name")
    weights = _payloads(json.loads(read("data/weights/model_weights_config.json")))
    _payloads(json.loads(read("data/constants/model_constants_config.json")))
    program = json.loads(read("models/model.json"))
    for key, value in _walk(program):
        _check_value(key, value)
    return {"program": program, "weights": weights}


def _payloads(config: dict[str, Any]) -> dict[str, Any]:
    for name, entry in config["config"].items():
        if entry["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
            raise ValueError(f"its tensor '{name}' is a pickle, which could run code when it is read")
    return dict(config["config"])


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


def _check_value(key: str, value: Any) -> None:
    if key in ("target", "as_operator") and isinstance(value, str) and not _TARGET.fullmatch(value):
        raise ValueError(f"its graph calls '{value[:80]}', which edgepress does not know as an operator")
    if key == "expr_str":
        rest = _LITERAL.sub("0", value)
        words = set(re.findall(r"(?<!\w)[A-Za-z_]\w*", rest)) - _WORDS
        if not _SIGNS.fullmatch(rest) or not all(re.fullmatch(r"z?[suf]+\d+", word) for word in words):
            raise ValueError(f"a size in it is no plain expression: '{value[:80]}'")
    if key in ("in_spec", "out_spec") and isinstance(value, str):
        _check_spec(json.loads(value)[1])


def _check_spec(spec: dict[str, Any]) -> None:
    """How inputs and outputs are nested; types other than Python's own would be imported by name."""
    if spec["type"] not in _SPECS:
        raise ValueError(f"its inputs or outputs are a '{str(spec['type'])[:80]}': export a network that takes and gives tensors")
    context = json.loads(spec["context"]) if spec["context"] else None
    if not (context is None or (isinstance(context, list) and all(isinstance(key, (str, int)) for key in context))):
        raise ValueError("its inputs or outputs are nested in a way that edgepress does not know")
    for child in spec["children_spec"]:
        _check_spec(child)


def _check_weights(weights: dict[str, Any], sizes: dict[str, int]) -> None:
    for name, entry in weights.items():
        elements = 1
        for size in entry["tensor_meta"]["sizes"]:
            elements *= size["as_int"]
        if elements and not sizes.get(f"data/weights/{entry['path_name']}"):
            raise ValueError(f"it holds no numbers for the weight '{name}'")


def _ports(program: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    values, signature = program["graph"]["tensor_values"], program["signature"]
    inputs = [_tensor(spec["user_input"]["arg"]) for spec in signature["input_specs"] if "user_input" in spec]
    outputs = [_tensor(spec["user_output"]["arg"]) for spec in signature["output_specs"] if "user_output" in spec]
    named = [_identifier(name) for name in inputs]
    called = ["output"] if len(outputs) == 1 else [f"output_{i}" for i in range(len(outputs))]
    called = [name if name not in named else f"{name}_" for name in called]
    return [_port(n, values[v]) for n, v in zip(named, inputs)], [_port(n, values[v]) for n, v in zip(called, outputs)]


def _tensor(argument: dict[str, Any]) -> str:
    if "as_tensor" not in argument:
        raise ValueError("one of its inputs or outputs is not a tensor; edgepress runs files where all of them are")
    return str(argument["as_tensor"]["name"])


def _port(name: str, meta: dict[str, Any]) -> tuple[str, tuple[int | None, ...], str]:
    if meta["dtype"] not in _DTYPES:
        raise ValueError(f"its '{name}' has a type that numpy lacks: let the network take and give float32")
    return name, tuple(size.get("as_int") for size in meta["sizes"]), _DTYPES[meta["dtype"]]


def _identifier(name: str) -> str:
    name = re.sub(r"\W", "_", name)
    return name if name.isidentifier() else f"_{name}"
