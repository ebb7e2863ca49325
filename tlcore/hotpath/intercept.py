"""Standing in for what a module calls: its ``forward``, its whole call, or another method of it.

A stand-in lies in the module's ``__dict__`` and is called instead. Whoever copies, pickles or inspects the
module meanwhile gets what stood there before.
"""

from __future__ import annotations

import copy
import copyreg
import inspect
import operator
import sys
import threading
from collections.abc import Callable, Container, Iterable
from types import CodeType, FrameType
from typing import Any

from torch import nn

# `Module.__call__` goes there first, around all hooks; PyTorch itself leaves it out of copies.
WHOLE_CALL = "_compiled_call_impl"
FORWARD = "forward"
_CALL = nn.Module._call_impl.__code__
_HOOKED_CALL = next(
    (each for each in _CALL.co_consts if isinstance(each, CodeType) and each.co_name == "inner"), None
)


class StandIn:
    """Stands in for ``module.<key>`` from `put` until `take_away`; subclasses say what its call does.

    ``original`` is what it stands for, ``replaced`` what the module's own ``__dict__`` had under that name
    (None for nothing). One that is ``dead`` only passes on: somebody may still hold it. There are slots and
    no ``__dict__``, since `functools.update_wrapper` copies that into whatever wraps a ``forward``.
    """

    __slots__ = (
        "__weakref__",
        "_by_class",
        "_of_class",
        "dead",
        "key",
        "module",
        "original",
        "own",
        "replaced",
    )

    def __init__(self, module: nn.Module, key: str, found: Any) -> None:
        self.module = module
        self.key = key
        self.own = vars(module)
        self.dead = False
        self.replaced = found
        # By which name the module's class gives what stands there without anybody's doing.
        self._of_class = "_call_impl" if key == WHOLE_CALL else key
        self._by_class = self._given_by_class()
        self.original: Callable[..., Any] = self._without_us() if found is None else found

    def _without_us(self) -> Any:
        return getattr(self.module, self._of_class)

    def _given_by_class(self) -> Any:
        return getattr(type(self.module), self._of_class, None)

    def now(self) -> Callable[..., Any]:
        """What it stands for: what the module's class gives it, which others may exchange at any time."""
        if self.replaced is None:
            given = getattr(type(self.module), self._of_class, None)
            if given is not self._by_class and given != self._by_class:
                self._by_class = given
                cls = type(self.module)
                found = inspect.getattr_static(cls, self._of_class)
                bind = getattr(type(found), "__get__", None)
                self.original = found if bind is None else bind(found, self.module, cls)
        return self.original

    def put_again(self) -> None:
        """Begin to stand in once more, for what is there now."""
        found: Any = self.own.get(self.key)
        # As `without_dead`, which would be another call of Python's, of many in each step.
        while issubclass(type(found), StandIn) and found.dead:
            found = found.replaced
        if found is not self.replaced:
            self.replaced = found
            self._by_class = self._given_by_class()
            self.original = self._without_us() if found is None else found
        self.own[self.key] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Pass on, with whatever a subclass adds."""
        return self.now()(*args, **kwargs)

    def put(self) -> None:
        """Begin to stand in."""
        self.own[self.key] = self

    def take_away(self) -> bool:
        """Leave the module as it was. False, and dead, where somebody else's lies in our place meanwhile."""
        if self.own.get(self.key) is not self:
            self.dead = True
            return False
        before: Any = self.replaced
        while issubclass(type(before), StandIn) and before.dead:
            before = before.replaced
        if before is None:
            del self.own[self.key]
        else:
            self.own[self.key] = before
        return True

    def __bool__(self) -> bool:
        """False for a whole call: "is this module compiled" must read as without us."""
        return self.key != WHOLE_CALL or bool(self.replaced)

    # Seen as what it stands for, by `isinstance` and `inspect` too.
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self.original)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.original

    def __getattr__(self, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return getattr(object.__getattribute__(self, "original"), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._seen_by_copies(), memo)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (operator.itemgetter(0), ((self._seen_by_copies(),),))

    def _seen_by_copies(self) -> Any:
        return self.replaced if self.key == WHOLE_CALL else self.original


def is_stand_in(found: Any) -> bool:
    """Whether ``found`` is one, whatever it passes for."""
    return issubclass(type(found), StandIn)


def without_dead(found: Any) -> Any:
    """What lies in a module's ``__dict__``, without stand-ins that were left behind there."""
    while is_stand_in(found) and found.dead:
        found = found.replaced
    return found


def lies_in(found: Any, listener: StandIn) -> bool:
    """Whether ``listener`` is ``found``, or lies right below stand-ins of others there."""
    while found is not listener and is_stand_in(found) and not found.dead:
        found = found.replaced
    return found is listener


def put_back(found: Any) -> Any:
    """What somebody has put into a module's ``__dict__``, with what a stand-in that he had kept stood for."""
    while is_stand_in(found) and found.dead:
        found = found.original if found.replaced is None else found.replaced
    return found


def hooks_follow(frame: FrameType | None, module: nn.Module, ours: Container[CodeType]) -> bool:
    """Whether what ``module``'s ``forward`` returns to ``frame`` will go through its forward hooks.

    They are passed by where ``forward`` is called directly, or by a class's own ``__call__``. Frames of
    ``ours`` are other stand-ins.
    """
    while frame is not None and frame.f_code in ours:
        frame = frame.f_back
    if frame is None or frame.f_code is not (_HOOKED_CALL or _CALL):
        return False
    seen = frame.f_locals
    return seen.get("self") is module and (_HOOKED_CALL is not None or "called_always_called_hooks" in seen)


def raised_through(frame: FrameType | None) -> BaseException | None:
    """The exception that has ended a module's call, seen from a hook of it called by ``frame``; else None.

    While a caller handles some older exception, that one is the interpreter's current one, too.
    """
    if frame is None or frame.f_code is _HOOKED_CALL:
        return None
    error = sys.exc_info()[1]
    trace = error.__traceback__ if error is not None else None
    while trace is not None:
        if trace.tb_frame is frame:
            return error
        trace = trace.tb_next
    return None


class _Watched:
    __slots__ = ("before", "count")

    def __init__(self, before: Any) -> None:
        self.before = before
        self.count = 0


_watched: dict[type, _Watched] = {}
_lock = threading.Lock()


def keep_out_of_copies(classes: Iterable[type]) -> None:
    """Copies and pickles of modules of these classes have no stand-ins, until `forget`."""
    with _lock:
        for cls in classes:
            known = _watched.get(cls)
            if known is None:
                known = _watched[cls] = _Watched(copyreg.dispatch_table.get(cls))
                copyreg.dispatch_table[cls] = _reduce
            known.count += 1


def forget(classes: Iterable[type]) -> None:
    """Undo one `keep_out_of_copies`."""
    with _lock:
        for cls in classes:
            known = _watched[cls]
            known.count -= 1
            if known.count:
                continue
            del _watched[cls]
            if copyreg.dispatch_table.get(cls) is _reduce:
                if known.before is None:
                    del copyreg.dispatch_table[cls]
                else:
                    copyreg.dispatch_table[cls] = known.before


def _reduce(module: Any) -> Any:
    known = _watched.get(type(module))
    before = known.before if known is not None else None
    made = before(module) if before is not None else module.__reduce_ex__(4)
    if not isinstance(made, tuple):
        return made
    return tuple(_without_stand_ins(part, module) for part in made)


def _without_stand_ins(part: Any, module: nn.Module) -> Any:
    if type(part) is tuple:
        return tuple(_without_stand_ins(each, module) for each in part)
    if not isinstance(part, dict) or not any(is_stand_in(value) for value in part.values()):
        return part
    clean = part.copy()
    for key, value in part.items():
        while is_stand_in(value) and value.key == key and value.module is module:
            value = value.replaced
        if value is None and part[key] is not None:
            del clean[key]
        else:
            clean[key] = value
    return clean
