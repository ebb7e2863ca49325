"""Who listens to which module of the attached model, as the configuration selects."""

from __future__ import annotations

import functools
import logging
from collections.abc import Container
from typing import TYPE_CHECKING, Any

from torch import nn

from ..config.configuration import Config
from ..hotpath.listening import Hearing
from ..layout import names
from . import remarks
from .filters.modules import Calls, ModuleFilter, may_be_tap
from .hooks.collector import Collector
from .hooks.injecting import InjectListener
from .hooks.listeners import ListenerSet
from .hooks.listening import Listener, ModulesOf, Rename, Source
from .hooks.module_tree import ModuleTree, Named
from .hooks.operator_listener import OperatorListener, may_ask
from .hooks.operators import Operators
from .hooks.steps import StepCalls
from .hooks.traced import TracedListener
from .hooks.tracing import PassedBy

if TYPE_CHECKING:
    # It loads the reader, which a capture that only writes does not need.
    from .injection import Injection

log = logging.getLogger("tlcore")


class Audience:
    """Makes the listeners of a session's modules, and says of whom nobody heard.

    ``source`` captures its modules by itself; nobody else listens to them. ``injection`` has results that
    stand in for those of modules.
    """

    def __init__(self, config: Config, collector: Collector, injection: Injection | None = None) -> None:
        self.selector = ModuleFilter(config.module_call_match)
        self.source: Source | None = None
        self._collector = collector
        self._post_inputs = config.log_post_fwd_inputs
        self._chooser = ModuleFilter(config.ops, "ops")
        self.operators = Operators(collector, self._chooser.calls_of_any) if config.ops else None
        self.injection = injection
        self._injected = ModuleFilter(config.inject.modules if config.inject else (), "inject.modules")

    def listener(self, each: Named, module_names: frozenset[str], hearing: Hearing) -> Listener | None:
        """Who listens to a module; nobody where it is not selected, or captured in another way."""
        return self._made(each, module_names, hearing, self.injection)

    def draft_listener(self, each: Named, module_names: frozenset[str], hearing: Hearing) -> Listener | None:
        """Who listens to a draft model's module, into which nothing is injected."""
        return self._made(each, module_names, hearing, None)

    def _made(
        self, each: Named, module_names: frozenset[str], hearing: Hearing, injection: Injection | None
    ) -> Listener | None:
        wanted = self.selector.calls_of_any(each.names)
        operators = self.operators
        chosen = operators is not None and self._chooser.calls_of_any(each.names) is not None
        watched = chosen or (operators is not None and (may_ask(each.module) or self._is_within(each)))
        injected = None if injection is None else self._injected.calls_of_any(each.names)
        # What the model itself is given tells whether anything may be injected.
        injects = injection is not None and (injected is not None or not each.name)
        if each.module in self._elsewhere or not (wanted is not None or watched or injects):
            return None
        given = self._given(each, wanted, module_names, hearing)
        if injection is not None:
            among = functools.partial(_is_among, injected)
            return InjectListener(injection, among, operators, chosen, *given)
        return Listener(*given) if operators is None else OperatorListener(operators, chosen, *given)

    def _is_within(self, each: Named) -> bool:
        """Whether a module lies in one whose operators are chosen, whose calls tell its own code apart."""
        around = {name[:end] for name in each.names for end in [*_dots_in(name), 0] if name}
        return any(self._chooser.calls_of_any((name,)) is not None for name in around)

    def _given(
        self, each: Named, wanted: Calls | None, module_names: frozenset[str], hearing: Hearing
    ) -> tuple[Any, ...]:
        """What every kind of listener is made with."""
        directory = functools.partial(call_directory, module_names)
        of_module = each.name, each.module, wanted or frozenset()
        return (*of_module, self._collector, hearing, directory, self._post_inputs)

    def traced_listener(
        self, steps: StepCalls, each: Named, module_names: frozenset[str], hearing: Hearing
    ) -> Listener:
        """Who listens to a module that may be compiled: also to one that is not selected, for its taps."""
        wanted = self.selector.calls_of_any(each.names)
        made = TracedListener(*self._given(each, wanted, module_names, hearing))
        made.all_steps = steps
        made.steps = steps if steps.is_step(each.name) else None
        return made

    def counts(self, each: Named) -> bool:
        """Whether calls of a module that is not listened to are to be counted, for the sake of its taps."""
        return each.module not in self._elsewhere and self.selector.may_find_taps(each.names)

    @property
    def _elsewhere(self) -> Container[nn.Module]:
        return () if self.source is None else self.source.modules

    def say_what_nobody_is_called(self, hooks: ListenerSet, model: str) -> None:
        """Warn of patterns that no module has, where all modules are there to tell."""
        found = [name for each in hooks.named(hooks.tree) for name in each.names]
        for chooser, key in ((self._chooser, "ops"), (self._injected, "inject.modules")):
            for text in chooser.unmatched(found):
                log.warning("%s", remarks.unmatched(text, found, key=key))
        unmatched = self.selector.unmatched(found)
        # Whether there is such a tap is known when the model has run.
        for text in unmatched:
            if not may_be_tap(text):
                log.warning("%s", remarks.unmatched(text, found))
        if not hooks and self.source is None and not any(map(may_be_tap, unmatched)):
            log.warning("no module of %s matches module_call_match; nothing will be stored", model)

    def unheard(self, hooks: ListenerSet, passed_by: PassedBy) -> list[str]:
        """What is to be said at the end of modules that were selected and never called, or ``passed_by``."""
        now_there = hooks.named(ModuleTree(hooks.model))
        silent = self.selector.silent(hooks.heard, hooks.names)
        told = {name for names in passed_by.by.values() for name in names}
        said = remarks.unheard(hooks, silent, now_there, self.selector.calls_of_any, told)
        said += remarks.own_calls(now_there, hooks.heard)
        return said + ([] if self.operators is None else self._unwatched(hooks, self.operators))

    def _unwatched(self, hooks: ListenerSet, operators: Operators) -> list[str]:
        known = {**operators.seen, **dict.fromkeys(operators.left_out, True)}
        chosen = {name: name in known for name in hooks.names}
        return remarks.without_operators(self._chooser.silent(chosen, hooks.names), operators.left_out)

    def listen_within(self, hooks: ListenerSet) -> None:
        """Also hear the operators in chosen modules among those that ``hooks`` listen to."""

        def directory(module: str, call: int) -> str:
            names = frozenset(each.name for each in hooks.named(hooks.tree))
            return call_directory(names - {""}, module, call)

        if self.operators is not None:
            self.operators.add(hooks, directory)


def _dots_in(name: str) -> list[int]:
    return [place for place, letter in enumerate(name) if letter == "."]


def _is_among(calls: Calls | None, call: int) -> bool:
    return calls == "all" or (calls is not None and call in calls)


def as_draft(each: Named) -> Named:
    """A draft model's module, by a name that the attached model's have not."""
    return Named(f"draft.{each.name}".rstrip("."), each.module, ())


def as_drafts(tree: ModuleTree) -> list[Named]:
    """A draft model's modules by such names."""
    return list(map(as_draft, tree.modules))


def renaming(modules_of: ModulesOf) -> Rename:
    """Modules by the names that they are given for the model; the others are left out."""

    def renamed(tree: ModuleTree) -> list[Named]:
        root, *parts = tree.modules
        names = {id(module): name for name, module in modules_of(root.module).items()}
        known = [each for each in parts if id(each.module) in names]
        found = [Named(names[id(each.module)], each.module, ()) for each in known]
        return [root._replace(aliases=()), *found]

    return renamed


def call_directory(module_names: frozenset[str], module: str, call: int) -> str:
    """The directory of a module's call among modules of these names."""
    return names.call_dir(module, call, module_names)
