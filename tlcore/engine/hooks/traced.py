"""Calls inside compiled code: a compiler traces along what shows them, and the graph tells of them.

A module's stand-in is traced as part of the model. What structure its arguments have is known then, and gets
a number, the *slot*; which module it is stands in a tensor.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ...hotpath.intercept import FORWARD, lies_in
from ...hotpath.listening import Hearing
from ...layout.structure import NO_ITEMS, NONE, SCALAR, TENSOR, Branch, Opaque, Scalar, TreeSpec
from ..calls import Call
from . import tap_op, tap_point
from .compiled_parts import is_compiled
from .counting import in_backward
from .listeners import ListenerSet
from .listening import OURS, Listener, Rename, Select
from .module_tree import Named
from .steps import StepCalls
from .tracing import compiles, is_exporting

log = logging.getLogger("tlcore")
_is_compiling = torch.compiler.is_compiling
_get_ident = threading.get_ident
_UNTAPPABLE = "a compiled model's taps do not reach into this structure"
_HOOKED = "compiled, and forward hooks come after what can be shown of it"
_BEGIN, _END, _TAP = "begin", "end", "tap."
_PLAIN = (bool, str)


class _Slot(NamedTuple):
    """What a graph shows under one number: a direction and its structure, or a step's begin or end.

    ``scalars`` has None where one of the numbers belongs that come with each call. ``unopened`` is how many
    values are not looked into.
    """

    what: str
    treespec: TreeSpec
    keywords: TreeSpec | None
    scalars: tuple[Scalar | None, ...]
    unopened: int


_slots: list[_Slot] = []
_numbers: dict[Any, int] = {}
_owners: weakref.WeakValueDictionary[int, TracedListener] = weakref.WeakValueDictionary()
_next_owner = itertools.count(1)
# On the host, which also keeps such graphs out of CUDA graphs: those replay without telling anybody.
_anchor = torch.zeros(1)
# While a compiler traces: of which modules the code is that it is in, by the tensors that name them.
_inside: list[torch.Tensor] = []
_nobody = torch.zeros(1, dtype=torch.int64)


def _slot_of(what: str, value: Any, keywords: Any, scalars: Any) -> int:
    """The slot of a structure, whose number the compiler takes for a constant."""
    key = what, value, keywords, tuple((type(each), each) for each in scalars)
    number = _numbers.get(key)
    if number is None:
        treespec, unopened = _treespec(value)
        more, also = (None, 0) if keywords is None else _treespec(keywords)
        number = _numbers[key] = len(_slots)
        _slots.append(_Slot(what, treespec, more, tuple(scalars), unopened + also))
    return number


# Called when the code is compiled, and not when it runs.
_slot_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Hooked:
    """Stands for a result that forward hooks may still change: what a module hands on is behind these."""


_hooked = Hooked()


# Read where a call is traced, so that another graph is made when there are others.
_global_hooks = nn.modules.module._global_forward_hooks


def _treespec(shape: Any) -> tuple[TreeSpec, int]:
    """The tree spec of what `_shape` says, and how many values in it are not looked into."""
    if isinstance(shape, str):
        return shape, 0
    kind, cls, keys, items = shape
    if kind == "object":
        named = f"{cls.__module__}.{cls.__qualname__}"
        if cls is Hooked:
            return Opaque(named, _HOOKED), 1
        plain = issubclass(cls, (int, float, complex, torch.dtype, torch.device))
        return Opaque(named, None if plain else _UNTAPPABLE), int(not plain)
    found = [_treespec(item) for item in items]
    parts, unopened = tuple(each for each, _ in found), sum(count for _, count in found)
    if cls is dict:
        return (NO_ITEMS if not keys else (kind, keys, parts)), unopened
    if cls in (tuple, list):
        return (kind, parts), unopened
    fields = keys if kind == "tuple" else None
    named = f"{cls.__module__}.{cls.__qualname__}"
    return Branch(kind, named, None if kind == "tuple" else keys, parts, fields), unopened


def _shape(value: Any, tensors: list[Any], scalars: list[Any], numbers: list[Any]) -> Any:
    """What a value is made of, in constants; its leaves go into the lists. Traced: plain code only."""
    if isinstance(value, torch.Tensor):
        tensors.append(value.detach() if value.requires_grad else value)
        return TENSOR
    if value is None:
        return NONE
    if isinstance(value, _PLAIN):
        scalars.append(value)
        return SCALAR
    if type(value) is int:
        scalars.append(None)
        numbers.append(value)
        return SCALAR
    if isinstance(value, (tuple, list)):
        items = []
        for item in value:
            items.append(_shape(item, tensors, scalars, numbers))
        fields = tuple(value._fields) if hasattr(value, "_fields") else None
        return ("tuple" if isinstance(value, tuple) else "list", type(value), fields, tuple(items))
    if isinstance(value, dict):
        keys, items = [], []
        for key, item in value.items():
            keys.append(str(key))
            items.append(_shape(item, tensors, scalars, numbers))
        return ("dict", type(value), tuple(keys), tuple(items))
    return ("object", type(value), None, ())


def _show(what: str, value: Any, keywords: Any, who: torch.Tensor) -> None:
    """Let the graph show one side."""
    tensors: list[Any] = []
    scalars: list[Any] = []
    numbers: list[Any] = []
    shape = _shape(value, tensors, scalars, numbers)
    more = None if keywords is None else _shape(keywords, tensors, scalars, numbers)
    tap_op.side(tensors, _anchor, who, _slot_of(what, shape, more, tuple(scalars)), numbers)


class TracedListener(Listener):
    """A listener that stays between steps and is compiled into what calls it.

    ``steps`` is told where its calls are steps, ``all_steps`` where they are in none. ``selected`` says
    whether any of them are captured.
    """

    __slots__ = ("all_steps", "ended", "hooks", "opened", "selected", "steps", "who")

    def __init__(self, *given: Any) -> None:
        self.steps: StepCalls | None = None
        self.all_steps: StepCalls | None = None
        super().__init__(*given)
        self.selected = self._wanted == "all" or bool(self._wanted)
        # The calls that a graph has begun and not ended, the innermost last, each with the one before.
        self.opened: list[tuple[int, Call | None]] = []
        self.ended: Call | None = None
        self.hooks = self.module._forward_hooks
        number = next(_next_owner)
        self.who = torch.tensor([number])
        _owners[number] = self

    def goes_on_from(self, other: Listener) -> None:
        """Count on where another listener ends, which hears nothing any more."""
        super().goes_on_from(other)
        if isinstance(other, TracedListener):
            self.steps, other.steps = other.steps, None
            self.all_steps, other.all_steps = other.all_steps, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's ``forward``."""
        if _is_compiling():
            if not is_exporting():
                return self._traced(args, kwargs)
            compiles(self.known_as)
            return self.original(*args, **kwargs)
        steps = self.steps
        if steps is None or not steps.enters():
            all_steps = self.all_steps
            if all_steps is None or not all_steps.goes_astray(self.name):
                return self._hear(self, args, kwargs)
            try:
                return self._hear(self, args, kwargs)
            finally:
                all_steps.comes_back()
        try:
            output = self._hear(self, args, kwargs)
        except BaseException as error:
            steps.leaves(error)
            raise
        steps.leaves(None)
        return output

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        who, steps, selected, post = self.who, self.steps is not None, self.selected, self._post
        if steps:
            _show(_BEGIN, None, None, who)
        if selected:
            _show("inputs", args, kwargs, who)
        _inside.append(who)
        output = self.original(*args, **kwargs)
        _inside.pop()
        if selected:
            _show("outputs", _hooked if len(self.hooks) + len(_global_hooks) else output, None, who)
        if selected and post:
            _show("post_fwd_inputs", args, kwargs, who)
        if steps:
            _show(_END, None, None, who)
        return output

    def shown(self, slot: _Slot, tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> None:
        """Take one side of a call that a graph shows, as a call heard would be."""
        if slot.what == "inputs":
            mine = self.listening
            call = mine.count
            mine.count = call + 1
            before, mine.running = mine.running, call
            sides = self._sites[call] if call < len(self._sites) else self._new_call()
            self.opened.append((before, sides))
        elif slot.what == "outputs" and self.opened:
            before, self.ended = self.opened.pop()
            self.listening.running = before
            sides = self.ended
        else:
            sides = self.ended
        if sides is None:
            return
        rest = iter(numbers)
        scalars = [next(rest) if each is None else each for each in slot.scalars]
        for number in range(slot.unopened):
            reason = slot.treespec.skipped if isinstance(slot.treespec, Opaque) else None
            self._collector.unopened((slot, number), reason or _UNTAPPABLE)
        self._collector.shown(sides, slot.what, slot.treespec, slot.keywords, tensors, scalars)

    def begin_step(self) -> None:
        """A step begins, or ends: nothing is left of the one before."""
        self.listening.count = self.listening.elsewhere = 0
        self.listening.running = -1
        self.opened.clear()
        self.ended = None

    @property
    def heard_now(self) -> bool:
        """Whether what this thread does belongs to a step that is captured."""
        return _get_ident() == self._hearing.owner and in_backward() < 0


class TracedListeners(ListenerSet):
    """Listeners that stay from the capture's begin to its end, so that nothing is compiled anew meanwhile."""

    def __init__(self, model: nn.Module, select: Select, rename: Rename | None = None) -> None:
        self._mine: dict[int, TracedListener] = {}
        self._make = select
        super().__init__(model, self._same_or_new, rename)
        self._put_them()
        _trace(1)

    def _same_or_new(self, each: Named, names: frozenset[str], hearing: Hearing) -> Listener | None:
        old = self._mine.get(id(each.module))
        return old if old is not None and old.name == each.name else self._make(each, names, hearing)

    @property
    def traced(self) -> list[TracedListener]:
        """All listeners."""
        return [each for each in self._listeners if isinstance(each, TracedListener)]

    def __len__(self) -> int:
        return sum(each.selected for each in self.traced)

    def _plan(self) -> None:
        super()._plan()
        gone, self._mine = self._mine, {id(each.module): each for each in _traced(self._listeners)}
        for key, each in gone.items():
            if self._mine.get(key) is not each:
                each.take_away()
                each.retire()

    def _note_heard(self) -> None:
        for each in _traced(self._listeners):
            if each.selected:
                self._heard[each.name] = self._heard.get(each.name, False) or each.heard
                self._called[each.name] = self._called.get(each.name, False) or each.called

    def _put_them(self) -> None:
        for index, each in enumerate(_traced(self._listeners)):
            found = each.own.get(FORWARD)
            # What was compiled of the module's forward has this in it.
            if not (lies_in(found, each) or is_compiled(found)):
                if not each.follow(found):
                    each = self._mine[id(each.module)] = each.successor()
                    self._listeners[index], self._listening[index] = each, each.listening
                each.put()
            each.begin_step()

    def _take_them(self) -> None:
        for each in _traced(self._listeners):
            while each.handles:
                each.handles.pop().remove()

    def close(self) -> None:
        """Take every listener away, for good."""
        super().close()
        for each in _traced(self._listeners):
            if not (each.take_away() or is_compiled(each.own.get(FORWARD))):
                self.replaced_within[each.name] = None
            each.retire()
            each.steps = each.all_steps = None
        _trace(-1)


def _traced(listeners: Sequence[Listener]) -> list[TracedListener]:
    return [each for each in listeners if type(each) is TracedListener]


def _trace_tap(name: str, value: Any) -> bool:
    """Let the graph show a tap, of the module whose code is traced or else of the one that runs then."""
    if is_exporting():
        return False
    _show(_TAP + name, value, None, _inside[-1] if _inside else _nobody)
    return True


_captures = 0
_LIMITS = ("recompile_limit", "accumulated_recompile_limit")
_MOST_COMPILED = 1 << 16
_limits: dict[str, int] = {}


def _trace(more: int) -> None:
    """A capture begins, or ends: taps are traced along meanwhile, and all of the layers that are alike."""
    global _captures
    _captures += more
    (tap_point.trace_with if _captures else tap_point.trace_no_more)(_trace_tap)
    # It tells modules apart by what stands in for them, and gives up on code that it has compiled too often.
    import torch._dynamo.config as dynamo

    for name in _LIMITS:
        now = getattr(dynamo, name, None)
        if now is None:
            continue
        if _captures and name not in _limits:
            _limits[name] = now
            setattr(dynamo, name, max(now, _MOST_COMPILED))
        elif not _captures and name in _limits:
            before = _limits.pop(name)
            if now == max(before, _MOST_COMPILED):
                setattr(dynamo, name, before)


_said: set[str] = set()


def _shown(tensors: Sequence[torch.Tensor], who: int, slot: int, numbers: Sequence[int]) -> None:
    """What the operator calls when a graph runs."""
    try:
        found, listener = _slots[slot], _owners.get(who)
        if found.what.startswith(_TAP):
            value = tensors[0] if found.treespec == TENSOR else tuple(tensors) or None
            module = None if listener is None else listener.module
            tap_point.show_traced(found.what[len(_TAP) :], value, module)
        elif listener is None:
            return
        elif found.what in (_BEGIN, _END):
            if listener.steps is not None:
                (listener.steps.graph_begins if found.what == _BEGIN else listener.steps.graph_ends)(listener)
        elif listener.heard_now:
            listener.shown(found, tensors, numbers)
        elif listener.all_steps is not None and found.what == "inputs":
            listener.all_steps.goes_astray(listener.name)
        elif listener.all_steps is not None and found.what == "outputs":
            listener.all_steps.comes_back()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if text not in _said:
            _said.add(text)
            log.warning("what compiled code computes could not be captured (said once): %s", text)


tap_op.side_shown = _shown
OURS.add(TracedListener.__call__.__code__)
