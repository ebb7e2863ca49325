"""`tlcore.capture`: a ``with`` block in which each call of a model is one step of a run."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..config.configuration import Config, given_keys, load_config
from ..errors import CaptureError, ConfigError
from ..layout.structure import class_name
from ..ledger import Counts
from ..protocols import Sink
from . import remarks
from .environment import environment
from .filters.modules import may_be_tap
from .filters.named_rows import Named, named_rows
from .hooks.compiled_functions import CompiledFunctions
from .hooks.compiled_parts import compiled_parts, refuse_unreachable, shown
from .hooks.compiled_versions import CompiledVersions
from .hooks.module_tree import ModuleTree
from .hooks.step_methods import method_of
from .hooks.steps import Step, StepCalls
from .hooks.tracing import COMPILED, TRACES
from .new_run import run_of_group
from .session import Session

log = logging.getLogger("tlcore")
_BRACKET = "Put `with capture.step():` around forward and backward."


def _may_select_taps(config: Config) -> bool:
    patterns = config.module_call_match
    return patterns is None or any(map(may_be_tap, patterns))


class capture:  # noqa: N801 - a context manager reads like a function
    """Capture the submodules of a model while the ``with`` block runs; one call of it is one step.

    ``config`` and ``keys`` are the configuration (`tlcore.config.configuration.Config`); ``backend`` may
    also be an object with the `Sink` protocol. The processes of a ``torch.distributed`` ``group`` write one
    run together, and each of them has to enter the block; without it each writes its own. Raises ConfigError,
    BackendError or CaptureError before the block.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Mapping[str, Any] | str | None = None,
        *,
        inline: bool = False,
        group: Any = None,
        **keys: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            what = f"the class {model.__name__}" if isinstance(model, type) else class_name(model)
            raise CaptureError(f"{what} is no model; give the torch.nn.Module whose calls are to be captured")
        backend = keys.get("backend")
        sink = None
        if backend is not None and not isinstance(backend, (str, Mapping)):
            if isinstance(backend, type):
                raise CaptureError(f"backend={backend.__name__} is a class; give an instance of it")
            if not isinstance(backend, Sink):
                raise CaptureError(
                    f"backend={class_name(backend)} lacks open, write, commit_step or close (tlcore.Sink)"
                )
            sink = keys.pop("backend")
        self.config = load_config(config, **keys)
        self._chose_steps = "log_step_ids" in given_keys(config, **keys)
        if self.config.log_gradients and self.config.cuts_rows:
            problem = "which rows of a gradient are whose is not known."
            raise ConfigError("$.log_gradients", problem, "Leave out rows, request_ids and sample_rate.")
        if self.config.requests_ask:
            key = "request_overrides" if self.config.request_overrides else "delivery"
            problem = "only vLLM has requests that choose for themselves."
            raise ConfigError(f"$.{key}", problem, "Leave the key out.")
        self._model = model
        self._known_as = weakref.ref(model)
        self._inline = inline
        self._group = group
        self._sink = sink
        self._session: Session | None = None
        self._traced = self.config.compiled == "taps"
        if self._traced and not TRACES:
            problem = f"compiled models cannot be tapped with torch {torch.__version__}, which is too old."
            raise ConfigError("$.compiled", problem, "Use a newer torch, or leave it out.")
        if self._traced and self.config.log_gradients:
            problem = 'what "compiled": "taps" shows of compiled code has no gradients.'
            raise ConfigError("$.log_gradients", problem, "Leave one of the two out.")
        given = (self._begin_step, self._end_step, self.config.step)
        self._steps = StepCalls(*given, watches=not self._traced)
        self._versions = CompiledVersions(self._steps.heard)
        self._functions = CompiledFunctions(self._steps.heard, self._modules_by_id)
        self._entered = False
        # Steps that were a call of the model alone, although gradients are wanted.
        self._without_backward = 0

    @property
    def session(self) -> Session:
        """The session behind this capture; CaptureError before the block or when not enabled."""
        if self._session is None:
            raise CaptureError("nothing is captured: the capture is not entered, or `enabled` is false")
        return self._session

    @property
    def url(self) -> str:
        """The run's directory, a path or URL that `tlcore.open_run` takes; empty when not enabled."""
        return self.session.url if self.config.enabled else ""

    @property
    def ledger(self) -> Counts:
        """What became of every captured tensor; final after the block."""
        return self.session.ledger if self.config.enabled else Counts()

    @property
    def remarks(self) -> list[str]:
        """What is not in the run although it might be expected there, and why; complete after the block."""
        return list(self.session.remarks) if self.config.enabled else []

    def __enter__(self) -> capture:
        if self._entered:
            raise CaptureError("this capture is active already; make another one to capture the model twice")
        if not self.config.enabled:
            return self
        model = self._known_as()
        if model is None:
            raise CaptureError("the model of this capture is gone; make another capture for another model")
        self._model = model
        refuse_unreachable(model)
        if self.config.step.startswith("method:"):
            method_of(model, self.config.step)
        backend = class_name(self._sink) if self._sink is not None else None
        run = run_of_group(self.config, self._group, backend)
        run.document["environment"] = environment(model)
        self._session = Session(self.config, run, self._sink, self._inline)
        if self._traced:
            self._session.attach(model, traced=self._steps, follow=self._steps.follow)
        else:
            self._session.attach(model, may_change_within=True, follow=self._steps.follow)
        self._steps.around = self._session.listen_to_batches().around
        tree = self._session.tree
        assert tree is not None
        self._steps.install(tree)
        if not self._traced:
            self._versions.install()
            self._functions.install()
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered = False
        self._steps.remove()
        self._versions.remove()
        self._functions.remove()
        if self._session is None:
            return
        self._session.remarks += remarks.quietly(lambda: self._passed_by(self._model))
        # Whoever keeps the capture, for its ledger, need not keep a model.
        del self._model
        try:
            self._session.close()
        except CaptureError:
            # The block's own exception must not be hidden behind ours.
            if error is None:
                raise
            log.warning("the run could not be stored whole", exc_info=True)
        if error is None and self._without_backward:
            raise CaptureError(
                f"log_gradients: {self._without_backward} steps were calls of the model alone, with no"
                f" backward in them, so that gradients are missing. {_BRACKET}"
            )

    def step(self, rows: Sequence[str | Mapping[str, Any] | None] | None = None) -> Step:
        """A ``with`` block that is one step, whatever code and however many calls of modules are in it.

        Inside a step that is open it is part of that one. ``rows`` names the sequences of the batches that
        the model gets in the block: for each of them its id, or a dictionary with ``request_id`` and the
        range of its positions in the batch, ``first`` and ``rows`` (how many), where no ``attention_mask``
        tells it, or None for one that is all padding. ``first_position`` says where in its sample the range
        begins (0). Raises CaptureError for other ``rows``, and where the capture's own block is not entered.
        """
        named = None if rows is None else named_rows(rows)
        if self.config.enabled and not self._entered:
            raise CaptureError("no step without a capture: use it inside the capture's own `with` block")
        return Step(self._steps if self.config.enabled else None, named, self._name)

    def _name(self, rows: list[Named | None] | None) -> list[Named | None] | None:
        """Say which sequences the batches have from now on; what was said before."""
        if self._session is None:
            return None
        samples = self._session.samples
        before, samples.named = samples.named, rows
        return before

    def _modules_by_id(self) -> dict[int, str]:
        return {id(each.module): each.name for each in ModuleTree(self._model).modules}

    def _begin_step(self) -> bool:
        if self.config.log_gradients and not self._steps.more_than_a_call:
            self._without_backward += 1
            if self._without_backward == 1:
                log.warning("log_gradients: this step is a call of the model alone. %s", _BRACKET)
        session = self._session
        assert session is not None
        return session.begin_step(more_than_a_call=self._steps.more_than_a_call)

    def _end_step(self, error: BaseException | None) -> None:
        assert self._session is not None
        self._session.end_step(error=error)

    def _passed_by(self, model: nn.Module) -> list[str]:
        """What is to be said of that which ran past the capture."""
        said: list[str] = []
        session = self.session
        calls = self._steps.calls
        tree = ModuleTree(model)
        compiled = compiled_parts(tree.modules)
        # What of a traced model was not heard is told module by module.
        for name, how in () if self._traced else compiled.items():
            said.append(f"{shown(name)} is {how}; what ran compiled is not in the run")
        for name in self._versions.names(tree):
            session.passed_by.note(name, COMPILED)
        told = {name for names in session.passed_by.by.values() for name in names} | compiled.keys()
        said += remarks.compiled_functions(self._functions.called, told)
        if COMPILED not in session.passed_by.by and _may_select_taps(self.config):
            said += remarks.taps_left_out(self._functions.left_out)
        session.passed_by.add(self._steps.passed_by)
        stray = remarks.outside(self._steps.outside, self.config.step)
        if stray is not None:
            said.append(stray)
        said += remarks.mixed(self._steps.mixed)
        said += remarks.in_other_threads(self._steps.in_other_threads)
        samples = session.samples
        unknown = remarks.rows_unknown(samples.problems, self.config.cuts_rows, samples.any_known)
        if unknown is not None and session.captured_steps:
            said.append(unknown)
        if compiled:
            return said
        if calls and not session.captured_steps:
            said.append(
                f"the model was called {calls} times, but no step of log_step_ids came, so the run has none"
            )
        elif calls > session.captured_steps and not self._chose_steps:
            said.append(
                f"{session.captured_steps} of {calls} steps was captured: without log_step_ids it is step 0"
                " alone, with [] every one"
            )
        elif not calls:
            said.append(
                "no call of the model came by, so the run has no step; call the very model that is"
                " captured (a torch.compile'd version of it runs past the capture)"
            )
        return said
