"""Functions of torch as a mode hears of them: how they are called, and which arguments they write."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch

from .operands import parts_of

_MOST_FUNCTIONS = 1 << 14
OUT, _INPLACE = "out", "inplace"
_RAW = frozenset(
    {
        *("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"),
        # Perhaps some of what they show.
        *("resize_", "resize_as_"),
    }
)
# What `&=` and its like are called; others are heard as `add_` and so on.
_WRITING = frozenset({"setitem", "set_data", "iand", "ior", "ixor", "ilshift", "irshift"})
_WRITING_NOTHING = frozenset(
    {
        *("requires_grad_", "share_memory_", "detach_", "resize_", "resize_as_", "set_", "rename_"),
        *("t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "as_strided_"),
    }
)
# Of these, what gives a tensor other memory or another shape: others that show what it did do not change.
_ALTERING = _WRITING_NOTHING - {"requires_grad_", "share_memory_", "detach_", "rename_"} | {"set_data"}
# Properties that give a tensor and compute nothing.
_HELD = frozenset({"grad", "_grad", "_base", "data"})


class Function:
    """What is to be known of a function of torch: its names, and what of its arguments it writes."""

    __slots__ = ("alters", "code", "inplace", "name", "raw", "shown", "writes", "written")

    def __init__(self, func: Any) -> None:
        name, self.shown = _names_of(func)
        self.name = name
        self.raw = name in _RAW
        self.code: CodeType | None = getattr(func, "__code__", None)
        self.written = _written_by(func)
        # Names of what works in place end in one underscore.
        in_place = name in _WRITING or (name.endswith("_") and name not in _WRITING_NOTHING)
        self.writes = bool(self.written) or in_place
        self.alters = name in _ALTERING
        # At which place, or by which name, a call asks to write in place.
        self.inplace = _place_of(_INPLACE, self.code)

    @property
    def only_reads(self) -> bool:
        """Whether it leaves its arguments as they are, whatever it is given, but what is its ``out``."""
        return not self.writes and not self.alters and self.inplace is None

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """What it has given: its result, or what it wrote to; None where there is no tensor in that."""
        if self.name in _HELD:
            return None
        if isinstance(result, torch.Tensor) and not self.written:
            return result
        if self.written:
            value: Any = self._given_in(self._places(args, kwargs), result)
        elif result is None and self.writes:
            value = args[0] if args else None
        else:
            value = result
        return value if next(parts_of(value), None) is not None else None

    def _given_in(self, places: dict[str, Any], result: Any) -> Any:
        """What it wrote to, with the result where that is something else."""
        written = [id(tensor) for _, tensor in parts_of(places)]
        own = [tensor for _, tensor in parts_of(result)]
        if all(id(each) in written for each in own):
            return result if own else next(iter(places.values())) if len(places) == 1 else places
        return {"result": result, **places}

    def _places(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {name: args[at] if at < len(args) else kwargs.get(name) for at, name in self.written}

    def writes_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call of it leaves what it is given as something else."""
        if self.writes or self.alters or kwargs.get(OUT) is not None:
            return True
        at = self.inplace
        return at is not None and bool(args[at] if at < len(args) else kwargs.get(_INPLACE))

    def targets(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
        """The tensors that a call of it writes to."""
        places = [*self._places(args, kwargs).values(), kwargs.get(OUT)]
        if not self.written and kwargs.get(OUT) is None:
            places = [args[0] if args else kwargs.get("input", kwargs.get("self"))]
        for _, tensor in parts_of(places):
            yield tensor

    def writes_all(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call of it has written the whole of what it gives, which is one of its arguments."""
        if self.name == "setitem":
            return isinstance(args[1], (slice, type(Ellipsis))) and args[1] in (slice(None), Ellipsis)
        return self.writes or (not self.alters and self.writes_in(args, kwargs))


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


def _place_of(name: str, code: CodeType | None) -> int | None:
    """The place of an argument of this name in a function of Python's; None where there is none."""
    names = () if code is None else code.co_varnames[: code.co_argcount]
    return names.index(name) if name in names else None


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
