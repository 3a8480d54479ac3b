"""Which operators of an fp32 TFLite file are quantized how: a description, said as a recipe of ai-edge-quantizer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgepress.compress.errors import RecipeError, UserError
from edgepress.compress.quantization import PRECISIONS, Numbers, Quantization, operator_kind

from .silence import silence
from .tflite_tensors import BODY, tensor_name

__all__ = ["Operator", "activation_bits", "described", "tflite_operators", "tflite_recipe"]

_WEIGHTED = {"conv_2d", "depthwise_conv_2d", "transpose_conv", "fully_connected", "batch_matmul", "embedding_lookup"}
_BLOCKS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Operator:
    """An operator of a file's main graph.

    Args:
        kind: what ``'op:...'`` patterns call it, see `operator_kind`.
        module: the user's name of where it comes from, ``layer1.0.conv1``.
        code: TFLite's name for it, ``CONV_2D``.
        inputs: names of the float tensors that it takes, weights left out.
        outputs: names of all that it gives.
        weights: shape of its weights; empty where it has none.
        constant: name of the tensor that holds them.
    """

    kind: str
    module: str
    code: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[int, ...] = ()
    constant: str = ""


def tflite_operators(model: Any) -> list[Operator]:
    """The operators of a model that edgepress wrote, in the order in which they run.

    Args:
        model: of `edgepress.targets.tflite_tensors.read_model`; its tensors are named after the user's modules.
    """
    from ai_edge_litert import schema_py_generated as schema

    kinds = {number: name.lower() for name, number in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    graph = model.subgraphs[0]
    made = {int(i) for i in graph.inputs} | {int(i) for operator in graph.operators for i in operator.outputs}

    def read(operator: Any) -> Operator:
        code = model.operatorCodes[operator.opcodeIndex]
        kind = kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]
        inputs = [int(i) for i in (operator.inputs if operator.inputs is not None else ()) if i >= 0]
        outputs = [int(i) for i in operator.outputs]
        constants = [i for i in inputs if i not in made]
        names = [tensor_name(graph.tensors[i]) for i in (*outputs, *constants)]
        weights = graph.tensors[constants[0]] if constants and kind in _WEIGHTED else None
        return Operator(
            operator_kind(kind),
            next((name.rpartition("#")[0] for name in names if "#" in name), ""),
            kind.upper(),
            tuple(tensor_name(graph.tensors[i]) for i in inputs if i in made),
            tuple(names[: len(outputs)]),
            tuple(int(n) for n in weights.shape) if weights is not None else (),
            tensor_name(weights) if weights is not None else "",
        )

    return [read(operator) for operator in graph.operators]


def described(operator: Operator, how: Quantization) -> Quantization:
    """What holds for an operator: of weights in blocks, those that do not come out even share a scale in each channel; the
    constant side of a matrix product has one scale.

    Raises:
        UserError: numbers that LiteRT has no kernels for.
    """
    chosen = how.of(operator.module, operator.kind)
    _check(chosen)
    weights = chosen.weights
    if weights is not None and weights.per == "channel" and operator.kind == "matmul":
        return replace(chosen, weights=replace(weights, per="tensor"))  # its kernel reads no other scale, and gives zeros
    if weights is None or not isinstance(weights.per, int):
        return chosen
    if operator.kind not in ("linear", "embedding") or len(operator.weights) < 2:
        return PRECISIONS["fp32"]
    if operator.weights[1] % weights.per:
        return Quantization(chosen.name, Numbers(weights.bits, per="channel"))
    return chosen


def _check(how: Quantization) -> None:
    numbers, activations = how.weights, how.activations
    if numbers and numbers.kind == "bfloat":
        raise UserError(
            "LiteRT has no bf16 numbers: take fp16, which is as small, or a .pt2 file, which PyTorch runs in bf16 (torch:bf16)."
        )
    if numbers and isinstance(numbers.per, int) and numbers.per not in _BLOCKS:
        raise RecipeError(f"LiteRT takes weights in blocks of {', '.join(map(str, _BLOCKS))}, not of {numbers.per}.")
    if numbers and numbers.kind == "int" and numbers.bits not in (4, 8):
        raise RecipeError(f"LiteRT takes weights of 4 or 8 bits, not of {numbers.bits}.")
    if activations and activations.bits not in (8, 16):
        raise RecipeError(f"LiteRT takes activations of 8 or 16 bits, not of {activations.bits}.")


def tflite_recipe(
    operators: Sequence[Operator], how: Quantization, left: Collection[int] = (), ports: tuple[bool, bool] = (True, True)
) -> list[dict[str, Any]]:
    """The recipe: the description of most operators, then exceptions by the names of what they give.

    Args:
        operators: of the file.
        how: the description.
        left: numbers of operators that stay float whatever it says.
        ports: whether the file's inputs, and whether its outputs, are quantized as the operators beside them are.
    """
    with silence():
        from ai_edge_quantizer.qtyping import TFLOperationName
        from ai_edge_quantizer.recipe_manager import RecipeManager

    general = replace(how, layers={})
    others: dict[tuple[Any, ...], tuple[Quantization, list[Operator]]] = {}
    for number, operator in enumerate(operators):
        chosen = PRECISIONS["fp32"] if number in left else described(operator, how)
        if _numbers(chosen) != _numbers(general):
            others.setdefault(_numbers(chosen), (chosen, []))[1].append(operator)
    manager = RecipeManager()
    _add(manager, ".*", general)
    for chosen, group in others.values():
        _add(manager, _scope(group), chosen)
    manager.add_quantization_config(f"^{BODY}", TFLOperationName.ALL_SUPPORTED, None, "no_quantize")
    for wanted, name in zip(ports, (TFLOperationName.INPUT, TFLOperationName.OUTPUT), strict=True):
        if not wanted:
            manager.add_quantization_config("", name, None, "no_quantize")
    return list(manager.get_quantization_recipe())


def _numbers(how: Quantization) -> tuple[Any, ...]:
    return how.weights, how.activations, how.dynamic


def _scope(operators: Iterable[Operator]) -> str:
    """A pattern of what these operators give, as the quantizer joins it."""
    return f"^(?:{'|'.join(re.escape(_joined(operator)) for operator in operators)})$"


def _joined(operator: Operator) -> str:
    return "".join(f"{name};" for name in operator.outputs)


def _add(manager: Any, scope: str, how: Quantization) -> None:
    """Say it of all operators in a scope; with less than 8 bits, operators that cannot have so few keep 8."""
    with silence():
        from ai_edge_quantizer.qtyping import OpQuantizationConfig, TFLOperationName

    everything = TFLOperationName.ALL_SUPPORTED
    manager.add_quantization_config(scope, everything, None, "no_quantize")
    weights = how.weights
    if weights is None:
        return
    steps = [weights]
    if weights.bits < 8 and how.calibrated:
        steps.insert(0, replace(weights, bits=8))
    for number, step in enumerate(steps):
        algorithm = "float_casting" if step.kind == "float" else "min_max_uniform_quantize"
        config = OpQuantizationConfig.from_dict(_config(step, how))
        manager.add_quantization_config(scope + "(?:)" * (number + 1), everything, config, algorithm)  # each needs its own scope
    if how.calibrated:  # an embedding has no input to calibrate: its rows are stored in integers and looked up as floats
        config = OpQuantizationConfig.from_dict(_config(weights, replace(how, dynamic=True)))
        manager.add_quantization_config(f"(?:){scope}", TFLOperationName.EMBEDDING_LOOKUP, config)


def _config(weights: Numbers, how: Quantization) -> dict[str, Any]:
    per = {"tensor": "TENSORWISE", "channel": "CHANNELWISE"}.get(str(weights.per), f"BLOCKWISE_{weights.per}")
    kind = "FLOAT" if weights.kind == "float" else "INT"
    config: dict[str, Any] = {
        "weight_tensor_config": {"num_bits": weights.bits, "symmetric": True, "granularity": per, "dtype": kind},
        "compute_precision": "INTEGER" if how.activations or isinstance(weights.per, int) else "FLOAT",
        "explicit_dequantize": not (how.activations or isinstance(weights.per, int)),
        "min_weight_elements": 0,
    }
    if how.calibrated and how.activations:
        numbers = how.activations
        config["activation_tensor_config"] = {
            "num_bits": numbers.bits,
            "symmetric": numbers.symmetric or numbers.bits == 16,
            "granularity": "TENSORWISE",
            "dtype": "INT",
        }
    return config


def activation_bits(operators: Sequence[Operator], recipe: list[dict[str, Any]]) -> list[int]:
    """The integers that each operator will compute with, where LiteRT and the quantizer can; 0 for floats."""
    with silence():
        from ai_edge_litert import schema_py_generated as schema
        from ai_edge_quantizer.recipe_manager import RecipeManager
        from ai_edge_quantizer.utils.tfl_flatbuffer_utils import TFL_OP_CODE_TO_NAME

    manager = RecipeManager()
    manager.load_quantization_recipe(recipe)

    def bits(operator: Operator) -> int:
        name = TFL_OP_CODE_TO_NAME.get(getattr(schema.BuiltinOperator, operator.code))
        if name is None:
            return 0
        algorithm, config = manager.get_quantization_configs(name, _joined(operator))
        numbers = config.activation_tensor_config
        return 0 if algorithm == "no_quantize" or numbers is None else int(numbers.num_bits)

    return [bits(operator) for operator in operators]
