"""Comparisons between options, such as `queue.size <= data.size / 4`: read, never executed."""

import ast
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from isd_ray.errors import UserError, shown

COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
LONGEST = 500  # characters: Python's own reader gives up on some thousand operators
ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


@dataclass(frozen=True)
class Constraint:
    """A chain of comparisons over options by dotted name, numbers and + - * /."""

    text: str
    tree: ast.Compare
    names: tuple[str, ...]

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Tell whether it holds; one that speaks of an option without a value (None) has nothing to say and holds.

        Raises UserError where what it compares is no number.
        """
        if any(values[name] is None for name in self.names):
            return True
        try:
            sides = [_value(side, values) for side in (self.tree.left, *self.tree.comparators)]
            pairs = zip(self.tree.ops, sides[:-1], sides[1:], strict=True)
            return all(COMPARISONS[type(op)](left, right) for op, left, right in pairs)
        except (TypeError, ArithmeticError) as error:
            raise UserError(f"constraint {shown(self.text)}: {error}") from None


def parse_constraint(text: str) -> Constraint:
    """Read one; raises UserError for anything but comparisons of sums and products of options and numbers."""
    if len(text) > LONGEST:
        raise UserError(f"constraint {shown(text)}: {len(text):,} characters, {LONGEST} are enough")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python, about texts with a backslash
            tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: of nesting
        raise UserError(
            f"constraint {shown(text)}: not an expression like queue.size <= data.size / 4"
        ) from None
    if not isinstance(tree, ast.Compare) or any(type(op) not in COMPARISONS for op in tree.ops):
        raise UserError(f"constraint {shown(text)}: no comparison with <, <=, >, >=, == or !=")
    names: list[str] = []
    for side in (tree.left, *tree.comparators):
        _collect(side, text, names)
    return Constraint(text, tree, tuple(names))


def _collect(node: ast.expr, text: str, names: list[str]) -> None:
    """Gather the names below a node and refuse everything that is not arithmetic."""
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        _collect(node.left, text, names)
        _collect(node.right, text, names)
    elif isinstance(node, ast.Attribute | ast.Name):
        names.append(_dotted(node, text))
    elif not (isinstance(node, ast.Constant) and isinstance(node.value, int | float | str)):
        raise UserError(
            f"constraint {shown(text)}: {shown(ast.unparse(node))} is neither an option, a number "
            "nor + - * / of them"
        )


def _dotted(node: ast.expr, text: str) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, text)}.{node.attr}"
    raise UserError(f"constraint {shown(text)}: {shown(ast.unparse(node))} is no name of an option")


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.BinOp):
        sides = _value(node.left, values), _value(node.right, values)
        if not all(isinstance(side, int | float) for side in sides):
            # A text times a number would be a longer text.
            raise TypeError("only numbers can be added or multiplied")
        return ARITHMETIC[type(node.op)](*sides)
    return values[_dotted(node, "")]
