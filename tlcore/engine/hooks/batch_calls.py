"""Listening to the calls of modules that take a batch, to know whose the rows are of what they call."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ...hotpath.intercept import WHOLE_CALL, StandIn, without_dead
from ..filters.batches import is_no_batch, opened
from ..filters.rows import StepRows
from ..filters.samples import Samples, Scope
from ..filters.sequences import Taker, Whole, token_numbers
from .axis_order import packs, swaps_in_code
from .module_tree import ModuleTree, Named
from .steps import StepCall
from .tracing import why_traced

log = logging.getLogger("tlcore")
_compiler = torch.compiler
_is_traced = torch.compiler.is_dynamo_compiling
_get_ident = threading.get_ident
_TOKENS = {"input_ids", "inputs_embeds"}
# Of calls with no samples; nobody adds any.
_NO_BATCH = Scope()


class BatchCalls:
    """Tells a step's `StepRows` whose the rows are of the calls that run, as `Samples` knows it.

    The model's own call says so, and within it each call of a module that takes tokens and a mask: what
    lies in an encoder has other rows than what lies in a decoder. ``counts`` are asked how often modules have
    been called in the step. Nothing of this can break a call.
    """

    def __init__(self, rows: StepRows, samples: Samples, counts: Callable[[], Mapping[str, int]]) -> None:
        self._rows = rows
        self._samples = samples
        self._counts = counts
        self._tree: ModuleTree | None = None
        self._calls: list[_BatchCall] = []
        self._scope: Scope | None = None
        self._said: set[str] = set()
        self.owner = 0

    def install(self, tree: ModuleTree) -> None:
        """A step begins: listen to the modules that the model has now."""
        self._scope = None
        if tree is not self._tree:
            # What is not initialized has no shape yet: the next step looks again.
            unfinished = any(is_lazy(each) for each in tree.modules[0].module.parameters())
            self._tree = None if unfinished else tree
            self._calls = [_BatchCall(named.module, taker, self) for named, taker in _takers(tree)]
        for each in self._calls:
            each.put_again()
        self.owner = _get_ident()

    def remove(self) -> None:
        """The step is over."""
        if not self.owner:
            return
        self.owner = 0
        for place, each in enumerate(self._calls):
            if not each.take_away():
                self._calls[place] = _BatchCall(each.module, each.taker, self)

    def around(self, module: nn.Module) -> Callable[..., Any] | None:
        """What stands in for a module's call, where its call has begun before this listened."""
        found = vars(module).get(WHOLE_CALL)
        return found.within if type(found) is _BatchCall and found.calls is self and self.owner else None

    def enter(self, taker: Taker, given: Mapping[str, Any]) -> tuple[Scope | None, Any]:
        """A call begins; what `leave` needs at its end."""
        before = self._scope, self._rows.sets, self._rows.first
        scope: Scope | None = None
        try:
            if not taker.name and self._samples.named is None and is_no_batch(given):
                scope = _NO_BATCH
            else:
                scope = self._samples.scope(taker, opened(given), self._scope)
            if scope.sets and self._scope is None:
                self._rows.first = self._counts()
            self._rows.told |= bool(scope.sets)
            if self._rows.told:
                self._rows.enter(scope.sets)
        except Exception as error:
            self._warn(error)
            self._rows.enter(())
        self._scope = scope or Scope()
        return scope, before

    def leave(self, entered: tuple[Scope | None, Any], result: Any = None) -> None:
        """The call is over."""
        scope, (self._scope, sets, first) = entered
        try:
            if scope is not None and scope.known and result is not None:
                self._samples.returned(scope, result)
            if self._rows.told:
                self._rows.note()
                self._rows.first = first
                self._rows.enter(sets)
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        if text not in self._said:
            self._said.add(text)
            log.warning("whose the rows of a call are could not be told: %s", text)


class _BatchCall(StandIn):
    """Stands in for the call of a module that takes a batch."""

    __slots__ = ("calls", "taker")

    def __init__(self, module: nn.Module, taker: Taker, calls: BatchCalls) -> None:
        super().__init__(module, WHOLE_CALL, without_dead(vars(module).get(WHOLE_CALL)))
        self.taker = taker
        self.calls = calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_traced() or _compiler._is_compiling_flag:
            return self.original(*args, **kwargs)
        if self.dead or _get_ident() != self.calls.owner or why_traced() is not None:
            return self.now()(*args, **kwargs)
        return self.within(*args, **kwargs)

    def within(self, *args: Any, **kwargs: Any) -> Any:
        """A call that is known to be the step's, and to compute."""
        given = {**dict(zip(self.taker.parameters, args, strict=False)), **kwargs}
        entered = self.calls.enter(self.taker, given)
        result = None
        try:
            found = self.now()
            # What stands for a step's call only passes on within the step.
            result = (found.now() if type(found) is StepCall else found)(*args, **kwargs)
        finally:
            self.calls.leave(entered, result)
        return result


def _takers(tree: ModuleTree) -> list[tuple[Named, Taker]]:
    """The model itself, and its modules that take tokens and a mask."""
    root = tree.modules[0].module
    known = {cls: _parameters(cls) for cls in tree.classes}
    parameters = {named.name: known[type(named.module)] for named in tree.modules}
    takes = {
        name
        for name, each in parameters.items()
        if not name or ("attention_mask" in each and _TOKENS & {*each})
    }
    configs = [getattr(root, name, None) for name in ("generation_config", "config")]
    configs.append(getattr(configs[-1], "text_config", None))
    whole = Whole(
        two_part=any("decoder_input_ids" in each for each in known.values()),
        channels=any(isinstance(named.module, nn.Conv1d) for named in tree.modules),
        weights=frozenset(extent for each in root.parameters() if not is_lazy(each) for extent in each.shape),
        ends=frozenset(token_numbers(*configs, key="eos_token_id")),
        padding=frozenset(token_numbers(*configs, key="pad_token_id")),
        starts=frozenset(token_numbers(*configs, key="decoder_start_token_id")),
        packs=packs(named.module for named in tree.modules),
        swaps=functools.cache(functools.partial(swaps_in_code, tree.classes)),
    )
    found = [named for named in tree.modules if not named.name or named.name in takes]
    return [(named, Taker(named.name, parameters[named.name], whole)) for named in found]


def _parameters(cls: type) -> tuple[str, ...]:
    """The names of the parameters of a class's ``forward``, without ``self``."""
    try:
        signature = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    except (TypeError, ValueError, AttributeError):
        return ()
    named = [
        each.name
        for each in signature.parameters.values()
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    ]
    return tuple(named[1:])
