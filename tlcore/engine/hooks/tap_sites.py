"""Where taps are: of which module, in which of its calls, for the how many'th time, and whether wanted."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any

from torch import nn

from ...hotpath.intercept import FORWARD
from ...layout.directions import tap_direction, tap_name
from ...layout.structure import TreeSpec, describe
from ..calls import Call, CallSide, Sides
from ..filters.modules import Calls, ModuleFilter, may_be_tap
from . import tap_point
from .collector import Collector
from .counting import in_backward
from .listeners import ListenerSet
from .module_tree import ModuleTree, Named
from .tracing import why_traced

# Names that a model makes up anew in each step must not fill the memory.
_MOST_SITES = 1 << 14
_get_ident = threading.get_ident


class CallTaps:
    """The taps of one call of a module, and the names that they have taken in its directory."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self._known: dict[tuple[str, int], Sides] = {}
        self._taken: dict[str, tuple[str, int]] = {}

    def sides(self, name: str, number: int) -> Sides:
        """The sides of a tap that shows ``name`` for the ``number``-th time in the call, by structure."""
        return self._known.setdefault((name, number), {})

    def direction(self, name: str, number: int, treespec: TreeSpec) -> str:
        """By what that tap goes, so that it takes no name that another one has: they get a ``~2``."""
        paths: list[str] = []

        def note(path: tuple[Any, ...]) -> dict[str, Any]:
            paths.append("".join(f"_{key}" for key in path))
            return {}

        describe(treespec, (), note, itertools.repeat(0))
        plain = tap_direction(name, number)
        for again in itertools.count(1):
            direction = plain if again == 1 else f"{plain}~{again}"
            names = {direction, *(direction + path for path in paths)}
            if all(self._taken.get(each, (name, number)) == (name, number) for each in names):
                break
        self._taken.update(dict.fromkeys(names, (name, number)))
        return direction

    def side(self, name: str, number: int, treespec: TreeSpec) -> CallSide:
        """A new side of that tap."""
        direction = self.direction(name, number, treespec)
        return self.call.add(self.sides(name, number), treespec, direction, treespec, None)


class _Site:
    """One tap of one module in the step that runs: ``wanted`` are the selected of its values, from 0."""

    __slots__ = ("count", "in_call", "name", "named", "wanted")

    def __init__(self, named: Named, name: str, wanted: Calls | None) -> None:
        self.named = named
        self.name = name
        self.wanted = wanted
        self.count = 0
        self.in_call: Counter[int] = Counter()

    def begin_step(self) -> None:
        self.count = 0
        self.in_call.clear()


class TapSites:
    """Hands what taps show to the collector while ``hooks`` listen to a step; `tap_point.Receiver`.

    ``select`` says which values of a tap with certain names are wanted, ``directory`` gives a call's
    directory, both as for modules. ``shown`` and ``elsewhere`` are those of `Taps`, to be filled in.
    """

    def __init__(
        self,
        hooks: ListenerSet,
        collector: Collector,
        select: Callable[[Sequence[str]], Calls | None],
        directory: Callable[[str, int], str],
        shown: dict[str, bool],
        elsewhere: Counter[str],
    ) -> None:
        self._hooks = hooks
        self._collector = collector
        self._select = select
        self._directory = directory
        self._tree: ModuleTree | None = None
        self._sites: dict[tuple[int, str], _Site] = {}
        self._calls: dict[tuple[int, int, bool], CallTaps] = {}
        self._elsewhere = elsewhere
        self._shown = shown

    def begin_step(self) -> None:
        """A step begins; modules may be others than in the one before."""
        if self._hooks.tree is not self._tree or len(self._sites) > _MOST_SITES:
            self._tree = None
            self._sites.clear()
            self._calls.clear()
        for site in self._sites.values():
            site.begin_step()

    def tapped_in(self, name: str, value: Any, module: nn.Module) -> None:
        """Take a value that a module's compiled code shows."""
        named = self._hooks.known.get(id(module))
        if named is not None and self._hooks.owner == _get_ident() and in_backward() < 0:
            self._tree = self._hooks.tree
            self.take(self._site(named, name), value)

    def tapped(self, name: str, value: Any, frame: FrameType | None) -> bool:
        """Take a value for the module whose code runs in ``frame``, the model's own where that is none's."""
        self._tapped(name, value, frame)
        return False

    def _tapped(self, name: str, value: Any, frame: FrameType | None) -> None:
        owner = self._hooks.owner
        # What is recomputed for the backward pass was there before, and what is traced is nothing yet.
        if not owner or in_backward() >= 0 or why_traced() is not None:
            return
        self._tree = self._hooks.tree
        modules = self._hooks.known
        named = module_of(frame, modules) or modules[id(self._hooks.model)]
        site = self._site(named, name)
        if _get_ident() != owner:
            if site.wanted is not None:
                self._elsewhere[tap_name(named.name, name)] += 1
            return
        self.take(site, value)

    def _site(self, named: Named, name: str) -> _Site:
        key = id(named.module), name
        site = self._sites.get(key)
        if site is None or site.named is not named:
            names = [tap_name(each, name) for each in named.names]
            site = self._sites[key] = _Site(named, name, self._select(names))
            for each in names:
                self._shown.setdefault(each, False)
        return site

    def take(self, site: _Site, value: Any) -> None:
        """Capture one value of a tap, if it is selected."""
        count, wanted = site.count, site.wanted
        site.count = count + 1
        if wanted is None:
            return
        counter = self._hooks.counter(site.named)
        call = counter.running if counter.running >= 0 else max(0, counter.count - 1)
        number = site.in_call[call]
        site.in_call[call] = number + 1
        if wanted != "all" and count not in wanted:
            return
        # Of a method that is called directly there are no arguments, either.
        only_taps = counter.running < 0 or not counter.wants(call)
        key = id(site.named.module), call, only_taps
        taps = self._calls.get(key)
        if taps is None:
            named = site.named
            directory = self._directory(named.name, call)
            taps = CallTaps(Call(named.name, call, directory, only_taps))
            self._calls[key] = taps
        if not count or wanted != "all":
            self._shown.update((tap_name(each, site.name), True) for each in site.named.names)
        name = site.name
        known = taps.sides(name, number)
        direction = tap_direction(name, number)
        self._collector.tapped(taps.call, direction, known, value, lambda spec: taps.side(name, number, spec))


class Taps:
    """What the taps of a session's models show, while a step runs.

    ``directory`` gives a call's directory among those of a model's modules.
    """

    def __init__(
        self,
        collector: Collector,
        selector: ModuleFilter,
        directory: Callable[[frozenset[str], str, int], str],
    ) -> None:
        self._collector = collector
        self._selector = selector
        self._directory = directory
        self._of: list[TapSites] = []
        # How many values of which tap were shown in threads other than the step's own, in this step.
        self.elsewhere: Counter[str] = Counter()
        # Every tap that was ever shown, by all names that patterns find, and whether a value was captured.
        self.shown: dict[str, bool] = {}
        self.receives = False

    def add(self, hooks: ListenerSet) -> None:
        """Take the taps of the model that ``hooks`` listen to, too."""

        def directory(module: str, call: int) -> str:
            names = frozenset(each.name for each in hooks.named(hooks.tree))
            return self._directory(names - {""}, module, call)

        select = self._selector.calls_of_any
        self._of.append(TapSites(hooks, self._collector, select, directory, self.shown, self.elsewhere))
        self.receives = False

    def begin_step(self) -> None:
        """Take what is shown from now on, while modules are listened to.

        Whoever ``receives`` and has been ``shown`` nothing need not begin again.
        """
        self.elsewhere.clear()
        for each in self._of:
            each.begin_step()
            tap_point.receive(each)
        self.receives = True

    def rest(self) -> None:
        """Take nothing until the next step, so that taps cost nothing either."""
        for each in self._of:
            tap_point.receive_no_more(each)
        self.receives = False

    def close(self) -> None:
        """Forget the models."""
        self.rest()
        self._of = []

    def missed(self, hooks: ListenerSet) -> tuple[list[str], list[str]]:
        """The patterns that find no module of ``hooks``, and no tap although they may mean one, either.

        And those that do find one, of which nothing was captured.
        """
        modules = [name for names in hooks.names.values() for name in names]
        alone = self._selector.unmatched(modules)
        unmatched = [text for text in self._selector.unmatched([*modules, *self.shown]) if may_be_tap(text)]
        silent = self._selector.silent(self.shown, {name: (name,) for name in self.shown})
        return unmatched, [text for text in silent if text in alone]


def module_of(frame: FrameType | None, modules: Mapping[int, Named]) -> Named | None:
    """The module whose code runs in a frame or nearest around it."""
    return module_at(frame, modules)[0]


def module_at(
    frame: FrameType | None, modules: Mapping[int, Named]
) -> tuple[Named, CodeType] | tuple[None, None]:
    """The module whose code runs in a frame or nearest around it, and that code."""
    while frame is not None:
        code = frame.f_code
        if code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            named = modules.get(id(first))
            if named is not None and named.module is first and _is_method(code, first):
                return named, code
        frame = frame.f_back
    return None, None


def _is_method(code: CodeType, module: nn.Module) -> bool:
    """Whether it is the module's own code, and not a function that is just given it."""
    if code.co_varnames[0] == "self":
        return True
    found = vars(module).get(FORWARD) if code.co_name == FORWARD else None
    found = getattr(type(module), code.co_name, None) if found is None else found
    return getattr(found, "__code__", None) is code
