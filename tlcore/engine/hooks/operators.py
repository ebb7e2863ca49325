"""What the operators give that a chosen module's own code uses, while a selected step runs eagerly.

A mode of PyTorch's hears every function of torch that Python code calls, before any of it runs. It stands
only around calls of chosen modules, and takes no part in what is computed.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn, overrides
from torch.overrides import TorchFunctionMode

from ...hotpath.listening import Hearing
from ...hotpath.native import extension
from ..calls import Call, Operand, Operator
from ..filters.modules import Calls
from .collector import Collector
from .counting import in_backward
from .functions_of_torch import OUT, function_of
from .listeners import ListenerSet
from .module_tree import ModuleTree, Named
from .operands import Operands, as_plain, parts_of
from .operator_uses import Planned, Running, Uses
from .tap_sites import module_at

log = logging.getLogger("tlcore")
_get_ident = threading.get_ident
_compiler = torch.compiler
# Where nothing is compiled, this and a flag are asked for less than `is_compiling`.
_is_traced = torch.compiler.is_dynamo_compiling
_MOST_LINES = 1 << 14
# What hands functions of torch around.
_HANDS_ON = frozenset({overrides.__file__, torch._ops.__file__})
_OURS = __name__.partition(".")[0] + "."
# Results of properties such as `shape`, which come as often as tensors do.
_NO_TENSORS = frozenset({torch.Size, torch.dtype, torch.device, torch.layout, bool, int, float, str})
# What is told of a call's arguments, and of keywords with their names.
Given = tuple[tuple[Operand, ...], tuple[tuple[str, Operand], ...]]
_innermost: Callable[[], Any] = overrides._get_current_function_mode


class Operators:
    """Hands what operators give to the collector; ``select`` says of which calls of a module, by its names.

    ``directory`` gives a call's directory, as for the module's own tensors.
    """

    def __init__(self, collector: Collector, select: Callable[[Sequence[str]], Calls | None]) -> None:
        self.operands = Operands()
        self.depth = 0
        # Modules of which PyTorch's own code wants to know whether anybody watches.
        self.left_out: dict[str, None] = {}
        # The modules of which any was captured.
        self.seen: dict[str, bool] = {}
        self._collector = collector
        self._select = select
        self._of: list[tuple[ListenerSet, Callable[[str, int], str], Hearing]] = []
        self._tree: ModuleTree | None = None
        self._wanted: dict[int, Calls | None] = {}
        self._calls: dict[tuple[int, int, bool], Uses] = {}
        self._lines: dict[tuple[int, int], tuple[CodeType, int]] = {}
        # The call of a module that runs, the innermost one, the code of modules' own, and plain functions'.
        self.running: Running | None = None
        self._codes: dict[int, dict[int, CodeType]] = {}
        self._runs: dict[tuple[int, int], Running] = {}
        self._functions: dict[int, CodeType] = {}
        # Functions of torch that leave their arguments as they are, but for ``out``.
        self._reading: set[Any] = set()
        self._said = False
        # Whether a value certainly has no tensor that is not known: so are most arguments and results.
        self.knows: Callable[[Any], bool] = self.operands.knows_all
        again = self._takes_again
        if collector.walker is not None:
            again, self.knows = self._native_half()
        self._mode = _Mode(self, again)

    def _native_half(self) -> tuple[Callable[..., bool], Callable[[Any], bool]]:
        """The extension's twins of `_takes_again` and of `Operands.knows_all`."""
        operands = self.operands
        tables = operands.known, operands.raw, self._functions
        walker = self._collector.walker
        using = extension.Using(walker, self, self._collector, *tables, operands.of, operands.ASK, _line_of)
        return using.again, using.knows

    def add(self, hooks: ListenerSet, directory: Callable[[str, int], str]) -> None:
        """Take operators of the model that ``hooks`` listen to, too."""
        self._of.append((hooks, directory, hooks.hearing))

    def begin_step(self) -> None:
        """A step begins; modules may be others than in the one before."""
        changed = not self._of or self._of[0][0].tree is not self._tree
        self.operands.begin_step(other_modules=changed)
        self.depth = 0
        self.running = None
        if changed and self._of:
            self._tree = self._of[0][0].tree
            self._wanted.clear()
            self._forget()
        for uses in self._calls.values():
            uses.count = 0

    def close(self) -> None:
        """Forget the models."""
        self._of = []
        self.begin_step()
        self._forget()

    def _forget(self) -> None:
        self._calls.clear()
        self._codes.clear()
        self._runs.clear()

    def runs(self, module: nn.Module, call: int) -> Running | None:
        """A call of a module begins that is listened to; gives the one around it, which goes on behind it."""
        before, key = self.running, (id(module), call)
        running = self._runs.get(key)
        if running is None:
            # Holds the module, so that no other gets its id.
            running = self._runs[key] = Running(module, self._codes.setdefault(id(module), {}))
        self.running = running
        return before

    def within(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call of a chosen module in none of those, heard by the mode."""
        self.depth += 1
        try:
            with self._mode:
                return call(*args, **kwargs)
        finally:
            self.depth -= 1

    def aside(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call that the mode does not hear, where it can step aside."""
        if not self.depth or _innermost() is not self._mode:
            return call(*args, **kwargs)
        depth, self.depth = self.depth, 0
        self._mode.__exit__(None, None, None)
        try:
            return call(*args, **kwargs)
        finally:
            self._mode.__enter__()
            self.depth = depth

    def listens(self) -> bool:
        """Whether this thread's calls are those of a step that is captured now; then they may begin."""
        heard = self._heard()
        if heard is None:
            return False
        if heard[0].model is not self.operands.model:
            self.operands.use(heard[0].model)
        return True

    def _heard(self) -> tuple[ListenerSet, Callable[[str, int], str]] | None:
        ident = _get_ident()
        for hooks, directory, hearing in self._of:
            # What is computed once more in a backward pass has been captured before.
            if hearing.owner == ident:
                return (hooks, directory) if in_backward() < 0 else None
        return None

    def failed(self, error: Exception) -> None:
        """An operator could not be captured, which is said once."""
        if not self._said:
            self._said = True
            log.warning("an operator could not be captured: %s: %s", type(error).__name__, error)

    def _takes_again(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, frame: FrameType | None
    ) -> bool:
        """Take what was used at the same place of the call in an earlier step; False where that is unlike."""
        running, operands = self.running, self.operands
        if running is None or operands.raw:
            return False
        is_own = False
        if not running.known and running.codes and running.is_own(frame, self._functions):
            self._recall(running)
            is_own = True
        uses = running.uses
        if uses is None:
            return False
        planned = uses.planned[uses.count] if uses.count < len(uses.planned) else None
        if planned is None or planned.func is not func or not isinstance(result, torch.Tensor):
            return False
        at = frame
        if at is not None and at.f_code is not planned.code:
            at, is_own = _line_of(frame, planned.function.code), False
        if at is None or not planned.is_used_again(at, operands, args, kwargs):
            return False
        # Most are used by the module's own code.
        if not (is_own or id(at.f_code) in running.codes or running.is_own(at, self._functions)):
            return False
        uses.count += 1
        operands.note_one(result, planned.place)
        self._collector.tapped(uses.call, planned.direction, planned.known, result, planned.make)
        return True

    def _recall(self, running: Running) -> None:
        """A call of a module begins to use operators, whose code is known from a call before."""
        heard = self._heard()
        named = None if heard is None else heard[0].known.get(id(running.module))
        if heard is not None and named is not None and named.module is running.module:
            running.known, running.uses = True, self._uses_of(named, *heard)

    def before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
        """What is told of the arguments of a function that writes to one; None for others. Never raises."""
        try:
            if func in self._reading and OUT not in kwargs:
                return None
            function = function_of(func)
            if function.only_reads and len(self._reading) < _MOST_LINES:
                self._reading.add(func)
            if not function.writes_in(args, kwargs):
                return None
            written = [id(each) for each in function.targets(args, kwargs)]
            of, of_written = self.operands.of, self.operands.of_written
            return _told(args, kwargs, lambda each: (of_written if id(each) in written else of)(each))
        except Exception as error:
            self.failed(error)
            return None

    def take(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        frame: FrameType | None,
        given: Given | None = None,
    ) -> None:
        """An operator has given a result that is not like that of an earlier step.

        ``given`` are its arguments where it has written to one.
        """
        function = function_of(func)
        if given is not None:
            self.operands.wrote(function.targets(args, kwargs), alone=function.alters)
        if function.raw:
            for _, tensor in parts_of(result):
                self.operands.mark_raw(tensor)
            return
        if function.name == "data" and isinstance(result, torch.Tensor):
            # The same values behind another object.
            self.operands.same(result, args[0])
        value = function.given(args, kwargs, result)
        if value is None:
            return
        at = _line_of(frame, function.code)
        uses = self._uses_at(at)
        inputs, keywords = given or _told(args, kwargs, self.operands.of)
        if at is None or uses is None or not self._is_settled(value, args, function.writes_all(args, kwargs)):
            return
        operator = Operator(function.name, function.shown, *self._place(at), inputs, keywords)
        direction, place = uses.next_place(function.name)
        self.operands.note(value, place)
        known, make = uses.sides(direction, operator)
        again = given is None and value is result and function.name != "data"
        uses.plan(
            Planned(
                func, function, at.f_code, at.f_lasti, tuple(map(as_plain, args)), inputs, tuple(kwargs),
                tuple(map(as_plain, kwargs.values())), tuple([each for _, each in keywords]), direction,
                ("from", place), known, make,
            )
            if again and isinstance(value, torch.Tensor)
            else None
        )  # fmt: skip
        self._collector.tapped(uses.call, direction, known, value, make)

    def _place(self, at: FrameType) -> tuple[str, int]:
        """File and line of a frame; finding a line in a long function takes as long as an operator."""
        code = at.f_code
        key = id(code), at.f_lasti
        found = self._lines.get(key)
        if found is None or found[0] is not code:
            if len(self._lines) >= _MOST_LINES:
                self._lines.clear()
            found = self._lines[key] = (code, at.f_lineno)
        return code.co_filename, found[1]

    def _is_settled(self, value: Any, args: tuple[Any, ...], written: bool) -> bool:
        """Whether no part of a value is memory that was not written yet; if ``written``, all of it is now."""
        operands = self.operands
        if not operands.raw:
            return True
        for _, tensor in parts_of(value):
            if written:
                operands.written(tensor)
            elif operands.shows_raw(tensor, args):
                operands.mark_raw(tensor)
                return False
        return True

    def _uses_at(self, frame: FrameType | None) -> Uses | None:
        """Those of the call whose code runs in a frame; None where they are not to be captured."""
        running = self.running
        if running is not None and running.known and running.is_own(frame, self._functions):
            return running.uses
        heard = self._heard()
        if heard is None:
            return None
        hooks, directory = heard
        named, code = module_at(frame, hooks.known)
        if named is None or code is None:
            return None
        uses = self._uses_of(named, hooks, directory)
        if running is not None and running.module is named.module:
            running.learn(code, uses)
        return uses

    def _uses_of(self, named: Named, hooks: ListenerSet, directory: Callable[[str, int], str]) -> Uses | None:
        key = id(named.module)
        if key not in self._wanted:
            self._wanted[key] = self._select(named.names)
        wanted = self._wanted[key]
        if wanted is None:
            return None
        counter = hooks.counter(named)
        call = counter.running if counter.running >= 0 else max(0, counter.count - 1)
        if wanted != "all" and call not in wanted:
            return None
        only = counter.running < 0 or not counter.wants(call)
        uses = self._calls.get((key, call, only))
        if uses is None:
            self.seen[named.name] = True
            made = Call(named.name, call, directory(named.name, call), only)
            uses = self._calls[key, call, only] = Uses(made)
        return uses


class _Mode(TorchFunctionMode):
    """Hears which function of torch gave what; ``again`` takes what is as it was in an earlier step."""

    def __init__(self, operators: Operators, again: Callable[..., bool]) -> None:
        super().__init__()
        self._operators = operators
        self._again = again

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function as it would have been called, and tell of it."""
        kwargs = kwargs or {}
        if _is_traced() or _compiler._is_compiling_flag:
            return func(*args, **kwargs)
        # Afterwards it may be told no more what an argument was that the function writes to.
        given = self._operators.before(func, args, kwargs)
        result = func(*args, **kwargs)
        if type(result) in _NO_TENSORS:
            return result
        frame = sys._getframe(1)
        try:
            if given is not None or not self._again(func, args, kwargs, result, frame):
                self._operators.take(func, args, kwargs, result, frame, given)
        except Exception as error:
            # Whatever goes wrong here is not the model's business.
            self._operators.failed(error)
        return result


def _told(args: tuple[Any, ...], kwargs: dict[str, Any], of: Callable[[Any], Operand]) -> Given:
    return tuple([of(each) for each in args]), tuple([(key, of(each)) for key, each in kwargs.items()])


def _line_of(frame: FrameType | None, own: CodeType | None) -> FrameType | None:
    """The frame that calls a function, behind those by which torch hands it around."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename not in _HANDS_ON and code is not own and code.co_name != "__torch_function__":
            # What this package itself does with tensors is no part of the model.
            return None if str(frame.f_globals.get("__name__", "")).startswith(_OURS) else frame
        frame = frame.f_back
    return None
