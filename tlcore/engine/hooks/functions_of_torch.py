"""Functions of torch as a mode hears of them: how they are called, and which arguments they write."""

from __future__ import annotations

from types import CodeType
from typing import Any

import torch

from .operands import parts_of

_MOST_FUNCTIONS = 1 << 14
_RAW = frozenset({"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"})
_WRITING_NOTHING = frozenset(
    {
        *("requires_grad_", "share_memory_", "detach_", "resize_", "resize_as_", "set_", "rename_"),
        *("t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "as_strided_"),
    }
)
# Properties that give a tensor and compute nothing.
_HELD = frozenset({"grad", "_grad", "_base", "data"})


class Function:
    """What is to be known of a function of torch: its names, and what of its arguments it writes."""

    __slots__ = ("code", "name", "raw", "shown", "writes", "written")

    def __init__(self, func: Any) -> None:
        name, self.shown = _names_of(func)
        self.name = name
        self.raw = name in _RAW
        self.code: CodeType | None = getattr(func, "__code__", None)
        self.written = _written_by(func)
        # Names of what works in place end in one underscore.
        in_place = name in ("setitem", "set_data") or (name.endswith("_") and name not in _WRITING_NOTHING)
        self.writes = bool(self.written) or in_place

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """What it has given: its result, or what it wrote to; None where there is no tensor in that."""
        if self.name in _HELD:
            return None
        if isinstance(result, torch.Tensor):
            return result
        if result is None and self.written:
            names = [each for _, each in self.written]
            places = [args[at] if at < len(args) else kwargs.get(name) for at, name in self.written]
            found = dict(zip(names, places, strict=True))
            value: Any = places[0] if len(places) == 1 else found
        elif result is None and self.writes:
            value = args[0] if args else None
        else:
            value = result
        return value if next(parts_of(value), None) is not None else None

    def writes_all(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call of it has written the whole of what it gives, which is one of its arguments."""
        if self.name == "setitem":
            return isinstance(args[1], (slice, type(Ellipsis))) and args[1] in (slice(None), Ellipsis)
        return self.writes or kwargs.get("out") is not None


_known: dict[Any, Function] = {}


def function_of(func: Any) -> Function:
    """What is known of a function; looked up once."""
    try:
        found = _known.get(func)
    except TypeError:
        return Function(func)
    if found is None:
        if len(_known) >= _MOST_FUNCTIONS:
            _known.clear()
        found = _known[func] = Function(func)
    return found


def _names_of(func: Any) -> tuple[str, str]:
    """A function's short name, and the one by which documentation knows it."""
    packet = getattr(func, "_qualified_op_name", None) or getattr(func, "_name", None)
    if isinstance(packet, str):
        qualified = packet.replace("::", ".")
        return qualified.partition(".")[2] or qualified, f"torch.ops.{qualified}"
    name = str(getattr(func, "__name__", type(func).__name__))
    owner: Any = getattr(func, "__self__", None)
    if name in ("__get__", "__set__") and hasattr(owner, "__name__"):
        held = str(owner.__name__)
        return ("set_" if name == "__set__" else "") + held, f"torch.Tensor.{held}"
    short = name[2:-2] if name.startswith("__") and name.endswith("__") else name
    if hasattr(func, "__objclass__"):
        return short, f"torch.Tensor.{name}"
    module = str(getattr(func, "__module__", None) or "torch")
    module = "torch.nn.functional" if module == "torch._C._nn" else module
    if module.startswith(("torch._tensor", "torch._C")):
        return short, f"torch.Tensor.{name}" if module == "torch._tensor" else f"torch.{name}"
    return short, f"{'torch' if module == 'torch.functional' else module}.{name}"


def _written_by(func: Any) -> tuple[tuple[int, str], ...]:
    """Which arguments the schema of an operator says that it writes to."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        schemas = getattr(func, "_schemas", None)
        schema = next(iter(schemas.values()), None) if isinstance(schemas, dict) else None
    if schema is None:
        return ()
    written = [(at, each.name) for at, each in enumerate(schema.arguments) if _is_written(each)]
    return tuple(written)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
