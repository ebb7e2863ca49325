"""Everything that listens to a session's models: there while a step runs, and told of at the end."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from ..config.configuration import Config
from ..errors import CaptureError
from ..layout.names import MISREAD, ROOT_DIR
from ..layout.structure import class_name
from ..record import Json
from . import remarks
from .audience import Audience, as_drafts, call_directory, renaming
from .filters.rows import StepRows
from .filters.samples import Samples
from .hooks.batch_calls import BatchCalls
from .hooks.collector import Collector
from .hooks.compiled_parts import refuse_compiled
from .hooks.listeners import ListenerSet
from .hooks.listening import ModulesOf, Source
from .hooks.module_tree import ModuleTree
from .hooks.steps import StepCalls
from .hooks.tap_sites import Taps
from .hooks.traced import TracedListeners

if TYPE_CHECKING:
    # It loads the reader, which a capture that only writes does not need.
    from .injection import Injection

log = logging.getLogger("tlcore")


class Hookup:
    """The listeners of one model, perhaps of the draft model beside it, with their taps and operators.

    ``one_rank`` says that this process has all modules there are.
    """

    def __init__(
        self, config: Config, collector: Collector, one_rank: bool, injection: Injection | None
    ) -> None:
        self.hooks: ListenerSet | None = None
        self._draft: ListenerSet | None = None
        self._source: Source | None = None
        self._batches: BatchCalls | None = None
        self._tree: ModuleTree | None = None
        self._follow: Callable[[ModuleTree], object] | None = None
        self._collector = collector
        self._one_rank = one_rank
        # Calls of modules in other threads, in all steps.
        self._elsewhere: Counter[str] = Counter()
        self._audience = Audience(config, collector, injection)
        self._taps = Taps(collector, self._audience.selector, call_directory)

    def attach(
        self,
        model: nn.Module,
        source: Source | None = None,
        modules_of: ModulesOf | None = None,
        may_change_within: bool = False,
        traced: StepCalls | None = None,
        follow: Callable[[ModuleTree], object] | None = None,
    ) -> None:
        """Plan the hooks, as `Session.attach` describes. Raises CaptureError for a compiled model."""
        refuse_compiled(model)
        audience = self._audience
        self._source = audience.source = source
        rename = None if modules_of is None else renaming(modules_of)
        if traced is not None:
            select = functools.partial(audience.traced_listener, traced)
            self.hooks = TracedListeners(model, select, rename)
        else:
            self.hooks = ListenerSet(model, audience.listener, rename, may_change_within, audience.counts)
        self._tree, self._follow = self.hooks.tree, follow
        self._listen_within(self.hooks)
        # A rank has not all modules to tell.
        if self._one_rank:
            audience.say_what_nobody_is_called(self.hooks, class_name(model))

    def counts(self) -> Mapping[str, int]:
        """How often which module of the attached model has been called in the step so far."""
        return {} if self.hooks is None else self.hooks.counts()

    def attach_draft(self, model: nn.Module) -> None:
        """Also listen to a draft model's modules, by names behind ``draft``, in its `turn`."""
        audience = self._audience
        self._draft = ListenerSet(model, audience.draft_listener, as_drafts, counts=audience.counts)
        self._listen_within(self._draft)

    def _listen_within(self, hooks: ListenerSet) -> None:
        self._taps.add(hooks)
        self._audience.listen_within(hooks)

    @property
    def modules(self) -> list[str]:
        """The modules that are listened to, the draft model's, too; none where a source knows of more."""
        sets = (self.hooks, self._draft) if self._source is None else ()
        return [name or ROOT_DIR for each in sets if each is not None for name in each.names]

    def listen_to_batches(self, rows: StepRows, samples: Samples) -> BatchCalls:
        """Let ``samples`` tell whose a step's rows are. Raises CaptureError where no model is attached."""
        if self.hooks is None:
            raise CaptureError("no model is attached")
        self._batches = BatchCalls(rows, samples, self.hooks.counts)
        return self._batches

    def install(self, step: int, more_than_a_call: bool, samples: Samples) -> None:
        """A step begins, which may be ``more_than_a_call`` of the model: listen."""
        if self.hooks is None:
            return
        self.hooks.install(more_than_a_call)
        if self._batches is not None:
            if samples.asked:
                samples.begin_step()
            self._batches.install(self.hooks.tree)
        if self._draft is not None:
            # Around the attached model's listeners on modules that both share.
            self._draft.install()
            self._draft.rest()
        if self._taps.shown or not self._taps.receives:
            self._taps.begin_step()
        if self._audience.operators is not None:
            self._audience.operators.begin_step()
        if self._audience.injection is not None:
            self._audience.injection.begin_step(step)
        if self._source is not None:
            self._source.begin_step(self._collector)
        if self.hooks.tree is not self._tree and self._follow is not None:
            self._tree = self.hooks.tree
            self._follow(self._tree)

    def turn(self, draft: bool) -> None:
        """Listen to the draft model's calls from now on, or again to the attached model's."""
        if self.hooks is None or self._draft is None:
            return
        listening, resting = (self._draft, self.hooks) if draft else (self.hooks, self._draft)
        resting.rest()
        listening.resume()

    def remove(self) -> None:
        """Listen no more, until the next step. Taps are passed over then, and given up by `rest`."""
        if self._batches is not None:
            self._batches.remove()
        if self._draft is not None:
            self._draft.remove()
        if self.hooks is not None:
            self.hooks.remove()

    def rest(self) -> None:
        """What comes now is not captured: let it cost nothing."""
        if self._taps.receives:
            self._taps.rest()

    def end_source(self) -> str | None:
        """Let the source of a step add what is missing; what went wrong there, if anything."""
        return None if self._source is None else self._source.end_step()

    def told(self) -> Json:
        """What `step.json` says of a step's calls, beside what was captured of them."""
        injection = self._audience.injection
        told = {} if injection is None else injection.end_step()
        for hooks in (self.hooks, self._draft):
            if hooks is not None and hooks.misread:
                told[MISREAD] = {**told.get(MISREAD, {}), **hooks.misread}
        calls = {} if self.hooks is None else self.hooks.elsewhere
        if self._taps.elsewhere:
            calls = calls | self._taps.elsewhere
        return self._calls_elsewhere(calls) | told if calls else told

    def _calls_elsewhere(self, calls: dict[str, int]) -> Json:
        """Of calls in other threads; the log says it of the first step, and of all at the end."""
        if not self._elsewhere:
            log.warning("%s", remarks.elsewhere(calls))
        self._elsewhere.update(calls)
        return {"calls_in_other_threads": calls}

    def close(self, captured_any: bool) -> list[str]:
        """Take the listeners away for good; what is to be said of that which they did not hear."""
        hooks, self.hooks = self.hooks, None
        draft, self._draft = self._draft, None
        self._batches = self._tree = self._follow = None
        if draft is not None:
            draft.close()
        if hooks is None:
            return []
        hooks.close()
        said = remarks.quietly(lambda: self._missed(hooks, captured_any))
        self._taps.close()
        if self._audience.operators is not None:
            self._audience.operators.close()
        return said

    def _missed(self, hooks: ListenerSet, captured_any: bool) -> list[str]:
        passed_by = self._collector.passed_by
        said = [remarks.elsewhere(self._elsewhere)] if self._elsewhere else []
        if self._audience.injection is not None:
            said += self._audience.injection.remarks()
        said += remarks.traced(passed_by.by, ModuleTree(hooks.model).modules)
        # A source tells by itself what it missed.
        if self._source is not None or not self._one_rank:
            return said
        if captured_any:
            said += self._audience.unheard(hooks, passed_by)
            said += remarks.missed_taps(*self._taps.missed(hooks), self._taps.shown)
        return said + remarks.replaced_within(list(hooks.replaced_within))
