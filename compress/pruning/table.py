"""The form of the operator table: a rule relates labels, and says beside it how the call's constants are rewritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from .call import Call
from .labels import Axes

if TYPE_CHECKING:
    from .analysis import Analysis
    from .rewrite import Cut

__all__ = ["Relate", "Replacement", "Rewrite", "Rule", "Table", "Unsupported", "Value"]

Value: TypeAlias = "Axes | list[Axes | None] | None"
"""What a call gives: one tensor's axes, a list for several tensors, None where it gives no tensor."""

Relate: TypeAlias = "Callable[[Analysis, Call], Value]"
Rewrite: TypeAlias = "Callable[[Cut, Call], dict[str, Any] | Replacement]"


class Unsupported(Exception):
    """Raised by a rule that knows its operator but not this use of it: the call is frozen and the reason reported."""


@dataclass(frozen=True)
class Replacement:
    """Another operator in place of the call's."""

    target: Any
    arguments: tuple[Any, ...]


@dataclass
class Rule:
    """What pruning knows of an operator.

    Attributes:
        relate: joins the labels of what the call takes and gives, and returns what it gives.
        rewrite: the arguments that change once positions are gone, by name; None where there are no such constants.
    """

    relate: Relate
    rewrite: Rewrite | None = None

    def rewrites(self, function: Rewrite) -> Rewrite:
        """Decorator: the function that rewrites this operator's constants."""
        self.rewrite = function
        return function


@dataclass
class Table:
    """Operator name to `Rule`.

    Example:
        >>> table = Table()
        >>> @table.rule("relu", "gelu")
        ... def elementwise(a, c):
        ...     return a.axes(c["self"])
        >>> sorted(name for name, rule in table)
        ['gelu', 'relu']
    """

    rules: dict[str, Rule] = field(default_factory=dict)

    def rule(self, *names: str) -> Callable[[Relate], Rule]:
        """Decorator: the rule for some operators."""

        def add(relate: Relate) -> Rule:
            rule = Rule(relate)
            for name in names:
                assert name not in self.rules, f"two rules for {name}"
                self.rules[name] = rule
            return rule

        return add

    def __iter__(self) -> Iterator[tuple[str, Rule]]:
        return iter(self.rules.items())
