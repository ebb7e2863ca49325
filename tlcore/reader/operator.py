"""What an operator gave within a captured call, and where its inputs came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import ReadError
from ..layout.checks import LARGEST_SIZE, is_whole
from ..record import Json

_KINDS = ("from", "parameter", "buffer", "value", "unknown")
_DEEPEST = 8


@dataclass(frozen=True, slots=True)
class Operator:
    """One use of a function of torch by a module's own code.

    ``function`` is its whole name, such as ``torch.nn.functional.silu``, ``file`` and ``line`` are where it
    is called. Each of ``inputs``, and of the values of ``kwargs``, is a JSON object with one of the keys
    ``from`` (the name of an earlier tensor of the step, without its device), ``parameter`` or ``buffer``
    (its name in the model), ``value`` (as text), ``unknown`` (dtype and shape of a tensor from elsewhere) or
    ``items``; a tensor that was changed in place since it got that name has ``changed_since``.
    """

    direction: str
    name: str
    function: str
    file: str
    line: int
    inputs: tuple[Json, ...]
    kwargs: Json

    def operands(self) -> Iterator[Json]:
        """Every input that is no container, keywords too."""
        waiting: list[Json] = [*self.inputs, *self.kwargs.values()]
        while waiting:
            each = waiting.pop(0)
            if "items" in each:
                waiting = [*each["items"], *waiting]
            else:
                yield each

    def __str__(self) -> str:
        return f"{self.name} at {self.file}:{self.line}"


def operator_in(structure: Json, direction: str, where: str) -> Operator:
    """The operator of a structure document. Raises ReadError where that is damaged."""
    found = structure.get("operator")
    if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in _TEXTS):
        raise ReadError(f"{where}: damaged, it has no operator")
    inputs, kwargs, line = found.get("inputs"), found.get("kwargs", {}), found.get("line")
    if not isinstance(inputs, list) or not isinstance(kwargs, dict) or not is_whole(line, 1, LARGEST_SIZE):
        raise ReadError(f"{where}: damaged, the operator's inputs or line make no sense")
    if not all(_is_operand(each, 0) for each in (*inputs, *kwargs.values())):
        raise ReadError(f"{where}: damaged, an input of the operator makes no sense")
    name, function, file = (str(found[key]) for key in _TEXTS)
    return Operator(direction, name, function, file, int(found["line"]), tuple(inputs), kwargs)


_TEXTS = ("name", "function", "file")


def _is_operand(value: Any, depth: int) -> bool:
    if not isinstance(value, dict) or depth > _DEEPEST:
        return False
    if "items" in value:
        items = value["items"]
        return isinstance(items, list) and all(_is_operand(each, depth + 1) for each in items)
    return sum(isinstance(value.get(kind), str) for kind in _KINDS) == 1
