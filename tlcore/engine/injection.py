"""Results of another run in the place of a model's own: is what they differ in the only cause?"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from ..config.configuration import Inject
from ..errors import ConfigError, ReadError
from ..reader import Call, OpaqueObject, Skipped, open_run
from ..record import Json

log = logging.getLogger("tlcore")
_SCALARS = (bool, int, float, str)


class _UnlikeError(Exception):
    """A stored value cannot stand for the model's own; the message says why."""


class Injection:
    """The results of a run, and what became of them in a capture.

    They are injected only where both runs' models were given the same: in the same step, and in every step
    before it that a cache goes back to. Raises ReadError when the run cannot be opened, ConfigError for one
    that was stored rounded.
    """

    def __init__(self, inject: Inject) -> None:
        self._run = open_run(inject.run)
        stored_as = self._run.config.get("store_dtype")
        if stored_as is not None:
            problem = f"that run was stored as {stored_as} (store_dtype), so its results are rounded."
            raise ConfigError("$.inject.run", problem, "Inject a run that was captured without it.")
        self._modules = inject.modules
        self._step = -1
        # The last step of which all is known to be the same.
        self._same_until = -1
        self._why_not: str | None = None
        self.injected = 0
        self.left_out: Counter[str] = Counter()
        self._in_step: tuple[int, Counter[str]] = (0, Counter())

    @property
    def document(self) -> Json:
        """What ``run.json`` says of it."""
        return {"run": self._run.url, "run_id": self._run.id, "modules": list(self._modules)}

    def begin_step(self, number: int) -> None:
        """A step begins, in which the model has not been called yet."""
        self._step = number
        self._in_step = 0, Counter()
        self._why_not = "the model itself had not been called before in the step"

    def end_step(self) -> Json:
        """What ``step.json`` says of it."""
        if self._why_not is None:
            self._same_until = self._step
        injected, left_out = self._in_step
        return {"injected": {"calls": injected, "left_out": dict(left_out)}}

    def enters(self, directory: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called: find out whether the other run's was given the same."""
        try:
            self._why_not = self._difference(directory, args, kwargs)
        except Exception as error:
            self._why_not = f"what the model was given could not be compared ({type(error).__name__})"
            log.debug("arguments could not be compared", exc_info=True)

    def _difference(self, directory: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if _goes_on(args, kwargs) and self._same_until != self._step - 1:
            return "its cache goes back to a step that was not the same in both runs, or not captured"
        try:
            given = self._call(directory).inputs
        except ReadError:
            return "the other run has no arguments of the model itself in this step (directory _root)"
        if _lacks(given.args) or _lacks(given.kwargs):
            return "the other run did not store all that the model was given"
        same = _same(args, given.args) and _same(kwargs, given.kwargs)
        return None if same else "the model was given something else than in the other run"

    def _call(self, directory: str) -> Call:
        return self._run.step(self._step).call(directory)

    def result_for(self, directory: str, own: Any) -> Any:
        """The stored result of a call, or the model's own where that cannot stand for it."""
        why = self._why_not
        found = own
        if why is None:
            try:
                found = _in_place_of(own, self._call(directory).outputs)
            except _UnlikeError as error:
                why = str(error)
            except ReadError:
                why = "the other run has no result of this call"
            except Exception as error:
                why = f"its result could not be put in place ({type(error).__name__})"
                log.debug("a result could not be injected", exc_info=True)
        injected, left_out = self._in_step
        if why is None:
            self.injected += 1
            self._in_step = injected + 1, left_out
        else:
            self.left_out[why] += 1
            left_out[why] += 1
        return found

    def remarks(self) -> list[str]:
        """What is to be said of it at the end."""
        said = [f"inject: {self.injected} results are those of {self._run.url}, not this model's own"]
        said += [
            f"inject: {count} calls kept their own result: {why}" for why, count in self.left_out.items()
        ]
        return said if self.injected or self.left_out else ["inject: none of its modules was called"]


def _goes_on(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is given a cache that holds what came before."""
    for value in (*args, *kwargs.values()):
        length = getattr(value, "get_seq_length", None)
        if callable(length) and int(length()) > 0:
            return True
    return False


def _lacks(stored: Any) -> bool:
    """Whether a tensor of a stored value was not stored."""
    if isinstance(stored, Mapping):
        return any(map(_lacks, stored.values()))
    return isinstance(stored, Skipped) or (isinstance(stored, (tuple, list)) and any(map(_lacks, stored)))


def _same(own: Any, stored: Any) -> bool:
    """Whether a value is what was stored; of objects that were not looked into, only the class is known."""
    if isinstance(own, torch.Tensor):
        if not isinstance(stored, torch.Tensor) or own.shape != stored.shape or own.dtype != stored.dtype:
            return False
        return bool(torch.equal(own.detach().cpu(), stored))
    if isinstance(stored, (torch.Tensor, Skipped)):
        return False
    if own is None or isinstance(own, _SCALARS):
        return type(own) is type(stored) and own == stored
    if isinstance(own, Mapping):
        both = isinstance(stored, Mapping) and own.keys() == stored.keys()
        return both and all(_same(value, stored[key]) for key, value in own.items())
    if isinstance(own, (tuple, list)):
        both = isinstance(stored, (tuple, list)) and len(own) == len(stored)
        return both and all(_same(one, other) for one, other in zip(own, stored, strict=True))
    return isinstance(stored, OpaqueObject) and not stored.items


def _in_place_of(own: Any, stored: Any) -> Any:
    """A value like the model's own with the stored tensors. Raises _UnlikeError where they do not fit."""
    if isinstance(own, torch.Tensor):
        if isinstance(stored, Skipped):
            raise _UnlikeError(f"its result was not stored ({stored.reason})")
        if not isinstance(stored, torch.Tensor) or own.shape != stored.shape:
            raise _UnlikeError("the other run's result has another shape")
        return stored.to(device=own.device, dtype=own.dtype)
    if own is None or isinstance(own, _SCALARS):
        return own
    if isinstance(own, Mapping) and isinstance(stored, Mapping) and own.keys() == stored.keys():
        made: Any = copy.copy(own)
        for key, value in own.items():
            made[key] = _in_place_of(value, stored[key])
        return made
    if isinstance(own, (tuple, list)) and isinstance(stored, (tuple, list)) and len(own) == len(stored):
        items = [_in_place_of(one, other) for one, other in zip(own, stored, strict=True)]
        return type(own)(*items) if hasattr(own, "_fields") else type(own)(items)
    if isinstance(stored, OpaqueObject) and not stored.items:
        return own
    raise _UnlikeError(f"nothing can stand for a result that is a {type(own).__name__}")
