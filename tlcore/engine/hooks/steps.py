"""What a step is: a call of the model, of any of its modules or of a method, or a bracket around any code."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ...hotpath.intercept import WHOLE_CALL, StandIn, without_dead
from .module_tree import ModuleTree
from .stack_room import StackRoom
from .step_methods import method_of
from .tracing import COMPILED, PassedBy, compiles, key_of, why_not_real

log = logging.getLogger("tlcore")
_compiler = torch.compiler
_is_traced = torch.compiler.is_dynamo_compiling
_get_ident = threading.get_ident
# Which backward this thread is in; -1 for none. What it calls, it computes once more.
_backward = torch._C._current_graph_task_id
# The brackets within which code runs.
_within: ContextVar[tuple[object, ...]] = ContextVar("brackets", default=())


Around = Callable[[nn.Module], Callable[..., Any] | None]


def _nothing(module: nn.Module) -> None:
    return None


class StepCalls:
    """Calls ``begin`` before and ``end`` after whatever is a step of a model, on one thread at a time.

    ``kind`` is the configuration's ``step``. ``around`` is asked what ``begin`` has put in place of a
    module's call, which a step that is that call still has to go through. ``begin`` tells whether the step is
    captured; ``end`` gets the exception that ended the step, or None. What they raise is logged, not raised:
    the model's call goes on. Calls in other threads meanwhile, and calls that compute nothing real, pass by.
    What lies inside a step that is open belongs to it.
    """

    def __init__(
        self,
        begin: Callable[[], bool],
        end: Callable[[BaseException | None], object],
        kind: str = "root",
        around: Around = _nothing,
        watches: bool = True,
    ) -> None:
        self.around = around
        self._watches = watches
        # The steps that graphs have begun, by whom, and whether they did begin one.
        self._in_graphs: list[tuple[object, bool]] = []
        self._begin = begin
        self._end = end
        self._kind = kind
        self._owner = 0
        self._captured = False
        self._lock = threading.Lock()
        self._said: set[str] = set()
        self._steps: list[StandIn] = []
        self._strays: list[_Stray] = []
        self._watching = False
        self._tree: ModuleTree | None = None
        self._room = StackRoom()
        # Of the bracket that is open: known to the task that runs within it, and to those that it starts.
        self._token: object | None = None
        # Steps and calls of other tasks meanwhile.
        self.mixed = 0
        # Those of other threads, which pass by.
        self.in_other_threads = 0
        # How many calls of listeners that stay have begun outside any step, one in another.
        self._astray = 0
        self.calls = 0
        # Of the step that is open: whether code runs in it that is none of a module's.
        self.more_than_a_call = False
        # Outermost calls of modules outside any step, where somebody listens for them.
        self.outside: Counter[str] = Counter()
        self.passed_by = PassedBy()

    def install(self, tree: ModuleTree) -> None:
        """Begin to listen to a model."""
        self._follow(tree)
        self._watch()

    def remove(self) -> None:
        """Leave the model as it was."""
        self._unwatch()
        for each in reversed(self._steps):
            each.take_away()
            each.dead = True
        self._steps, self._strays, self._tree = [], [], None
        # Whoever keeps this need not keep a model.
        self.around = _nothing

    def follow(self, tree: ModuleTree) -> None:
        """The model's modules have changed."""
        if self._tree is not None and tree is not self._tree:
            self._follow(tree)

    def _follow(self, tree: ModuleTree) -> None:
        self._unwatch()
        self._tree = tree
        root = tree.modules[0].module
        if self._kind == "outermost":
            has = {id(each.module) for each in self._steps}
            left = {id(each.module) for each in tree.modules}
            for each in self._steps:
                if id(each.module) not in left:
                    each.take_away()
                    each.dead = True
            self._steps = [each for each in self._steps if id(each.module) in left]
            for named in tree.modules:
                if id(named.module) not in has:
                    self._put(named.module, WHOLE_CALL, named.name)
            return
        key = WHOLE_CALL if self._kind == "root" else method_of(root, self._kind)
        if not self._steps:
            self._put(root, key)
        parts = {id(part) for part in root._modules.values()}
        self._strays = [
            _Stray(named.module, named.name, self)
            for named in tree.modules
            if (named.module._modules or id(named.module) in parts)
            and not (named.module is root and self._kind == "root")
        ]

    def _put(self, module: nn.Module, key: str, name: str = "") -> None:
        each = StepCall(module, key, self, name)
        each.put()
        self._steps.append(each)

    def _watch(self) -> None:
        """Hear calls outside any step, until the next one."""
        if self._watches and not self._watching:
            self._watching = True
            for each in self._strays:
                each.put_again()

    def _unwatch(self) -> None:
        if self._watching:
            self._watching = False
            # One that something else lies upon stays inside that for ever: another takes its place.
            for place, each in enumerate(self._strays):
                if not each.take_away():
                    self._strays[place] = each.successor()

    def strays(self, name: str) -> bool:
        """Whether a module's call that begins is outside any step, and counted; `strays_no_more` is its end.

        The calls inside it are not listened to: they belong to it, and may be nested very deep.
        """
        if self._owner or not self._watching or _backward() >= 0 or why_not_real() is not None:
            return False
        self.outside[name] += 1
        self._unwatch()
        return True

    def strays_no_more(self) -> None:
        """The end of a call that `strays` has counted."""
        if self._steps and not self._owner:
            self._watch()

    def goes_astray(self, name: str) -> bool:
        """Whether a call that a listener hears which stays between steps is in none; `comes_back` is its end.

        Only the outermost one is counted.
        """
        if self._owner or _backward() >= 0 or why_not_real() is not None:
            self._astray = 0
            return False
        if not self._astray:
            self.outside[name] += 1
        self._astray += 1
        return True

    def comes_back(self) -> None:
        """The end of a call that `goes_astray` has counted."""
        self._astray = max(0, self._astray - 1)

    def enters(self, bracket: bool = False, name: str = "") -> bool:
        """Whether what comes now, a call or ``bracket``, is a step that begins; `leaves` is its end."""
        thread = _get_ident()
        if self._owner == thread:
            self._note_mixed()
            return False
        if _backward() >= 0:
            return False
        reason = why_not_real()
        if reason is not None:
            self._say_once(f"a call of the model within {reason} is not captured")
            self.is_traced(name, reason)
            return False
        with self._lock:
            if self._owner:
                self._say_once("the model runs in several threads at once; only one of them is captured")
                self.in_other_threads += not name
                return False
            self._owner = thread
        self.calls += 1
        self.more_than_a_call = bracket or self._kind.startswith("method:")
        self._token = object() if bracket else None
        if bracket:
            _within.set((*_within.get(), self._token))
        self._unwatch()
        self._captured = False
        if self._kind == "outermost" and self._tree is not None:
            self._room.take(self._tree.depth)
        try:
            self._captured = self._begin()
        except Exception as error:
            self._say_failed(error)
        return True

    def _note_mixed(self) -> None:
        """Note what another task, as of asyncio, does while the step that is open waits for something."""
        if self._token is not None and self._captured and self._token not in _within.get():
            self.mixed += 1
            self._say_once(
                "several tasks of one thread are in steps at once; all that they call is in one step"
            )

    def heard(self) -> int | None:
        """How many calls were steps or outside any; None within a step."""
        return None if self._owner else self.calls + self.outside.total()

    def is_traced(self, name: str, reason: str) -> None:
        """A module's call is only traced; where nobody watches, what is compiled tells of itself."""
        if self._watches or reason != COMPILED:
            self.passed_by.note(name, reason)

    def leaves(self, error: BaseException | None) -> None:
        """The end of a step that `enters` began."""
        try:
            self._end(error)
        except Exception as failed:
            self._say_failed(failed)
        # Only after a captured step: one that is not captured must cost nothing.
        if self._captured and self._steps:
            self._watch()
        if self._kind == "outermost":
            self._room.give_back()
        if self._token is not None:
            _within.set(tuple(each for each in _within.get() if each is not self._token))
            self._token = None
        self._owner = 0

    def is_step(self, name: str) -> bool:
        """Whether a call of the module with a name may be a step by itself."""
        return self._kind == "outermost" or (self._kind == "root" and not name)

    def graph_begins(self, who: object) -> None:
        """Compiled code of ``who`` begins, and may be a step."""
        if any(each is who for each, _ in self._in_graphs):
            # It ended by an error, which nobody tells.
            self._leave_graphs(RuntimeError("compiled code did not come to its end"))
        self._in_graphs.append((who, self.enters()))

    def graph_ends(self, who: object) -> None:
        """Compiled code of ``who`` ends."""
        if not any(each is who for each, _ in self._in_graphs):
            return
        while self._in_graphs:
            each, mine = self._in_graphs.pop()
            if mine:
                self.leaves(None)
            if each is who:
                return

    def _leave_graphs(self, error: BaseException) -> None:
        mine = any(mine for _, mine in self._in_graphs)
        self._in_graphs.clear()
        if mine:
            self.leaves(error)

    def _say_failed(self, error: Exception) -> None:
        self._say_once(f"a step could not be captured: {type(error).__name__}: {error}")

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)


class Step:
    """What `capture.step` returns: a ``with`` block that is one step, or part of the one that is open.

    ``name`` is told which sequences the batches in the block have, and gives back what was said before.
    """

    def __init__(
        self, calls: StepCalls | None, rows: Any = None, name: Callable[[Any], Any] = lambda rows: None
    ) -> None:
        self._calls = calls
        self._mine = False
        self._rows = rows
        self._name = name
        self._named: Any = None

    def __enter__(self) -> Step:
        self._mine = self._calls is not None and self._calls.enters(bracket=True)
        if self._rows is not None:
            self._named = self._name(self._rows)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rows is not None:
            self._name(self._named)
        if self._mine and self._calls is not None:
            self._mine = False
            self._calls.leaves(error)


class StepCall(StandIn):
    """Stands in for a call that is a step, with all hooks of others inside."""

    __slots__ = ("_calls", "_known_as", "_name")

    def __init__(self, module: nn.Module, key: str, calls: StepCalls, name: str) -> None:
        super().__init__(module, key, without_dead(vars(module).get(key)))
        self._calls = calls
        self._name = name
        self._known_as = key_of(self)

    def is_traced(self, reason: str) -> None:
        """The call is only traced."""
        if not self.dead:
            self._calls.is_traced(self._name, reason)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The call, which begins a step unless one is open."""
        # Asked first, and alone: torch.compile traces this and must not meet anything else.
        if _is_traced() or _compiler._is_compiling_flag:
            compiles(self._known_as)
            return self.original(*args, **kwargs)
        if self.dead or not self._calls.enters(name=self._name):
            return self.now()(*args, **kwargs)
        around = self._calls.around(self.module) if self.key == WHOLE_CALL else None
        try:
            result = (self.now() if around is None else around)(*args, **kwargs)
        except BaseException as error:
            self._calls.leaves(error)
            raise
        self._calls.leaves(None)
        return result


class _Stray(StandIn):
    """Stands in for a module's call between steps, to tell that it is in none."""

    __slots__ = ("_calls", "_known_as", "_name")

    def __init__(self, module: nn.Module, name: str, calls: StepCalls) -> None:
        super().__init__(module, WHOLE_CALL, None)
        self._name = name
        self._calls = calls
        self._known_as = key_of(self)

    def is_traced(self, reason: str) -> None:
        """The call is only traced."""
        if not self.dead:
            self._calls.is_traced(self._name, reason)

    def successor(self) -> _Stray:
        """Another one for the module."""
        return _Stray(self.module, self._name, self._calls)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_traced() or _compiler._is_compiling_flag:
            compiles(self._known_as)
            return self.original(*args, **kwargs)
        if self.dead or not self._calls.strays(self._name):
            return self.now()(*args, **kwargs)
        try:
            return self.now()(*args, **kwargs)
        finally:
            self._calls.strays_no_more()
