"""Results of another run in the place of a model's own: is what they differ in the only cause?"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from ..config.configuration import Inject
from ..errors import ConfigError, MissingError, ReadError
from ..layout.windows import row_choices
from ..reader import Call, OpaqueObject, Skipped, open_run
from ..record import Json
from .injected_values import SCALARS, CallArguments, Fitted, UnlikeError, stored_items

log = logging.getLogger("tlcore")


class Injection(ABC):
    """The results of a run, and what became of them in a capture.

    ``counted`` is what is injected or left out, in words. Raises ReadError when the run cannot be opened,
    ConfigError for one that was stored rounded.
    """

    counted = "results"

    def __init__(self, inject: Inject) -> None:
        self._run = open_run(inject.run)
        stored_as = self._run.config.get("store_dtype")
        if stored_as is not None:
            problem = f"that run was stored as {stored_as} (store_dtype), so its results are rounded."
            raise ConfigError("$.inject.run", problem, "Inject a run that was captured without it.")
        self._modules = inject.modules
        self._step = -1
        self.injected = 0
        self.left_out: Counter[str] = Counter()
        self._calls_in_step = self._injected_in_step = 0
        self._left_out_in_step: Counter[str] = Counter()
        # What was injected in another dtype, that has not all of its values, and not even their range.
        self.rounded: Counter[str] = Counter()
        self.overflowed: Counter[str] = Counter()
        self._rounded_in_step: Counter[str] = Counter()
        self._overflowed_in_step: Counter[str] = Counter()

    @property
    def document(self) -> Json:
        """What ``run.json`` says of it."""
        return {"run": self._run.url, "run_id": self._run.id, "modules": list(self._modules)}

    def begin_step(self, number: int) -> None:
        """A step begins, in which the model has not been called yet."""
        self._step = number
        self._calls_in_step = self._injected_in_step = 0
        self._left_out_in_step = Counter()
        self._rounded_in_step = Counter()
        self._overflowed_in_step = Counter()

    def end_step(self) -> Json:
        """What ``step.json`` says of it."""
        found: Json = {"calls": self._calls_in_step, "left_out": dict(self._left_out_in_step)}
        if self._rounded_in_step:
            found["rounded"] = dict(self._rounded_in_step)
        if self._overflowed_in_step:
            found["overflowed"] = dict(self._overflowed_in_step)
        return {"injected": found}

    def enters(self, directory: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model itself is called, with these arguments."""
        return

    def result_for(self, directory: str, own: Any, given: CallArguments) -> Any:
        """The stored result of a call, or the model's own where that cannot stand for it."""
        why: str
        try:
            if not _may_have_tensors(own):
                raise UnlikeError("its result has no tensor")
            return self._in_place_of(directory, own, given)
        except UnlikeError as error:
            why = str(error)
        except MissingError:
            why = "the other run has no result of this call"
        except ReadError:
            why = "the other run's result of this call could not be read"
            log.debug("a stored result could not be read", exc_info=True)
        except Exception as error:
            why = f"its result could not be put in place ({type(error).__name__})"
            log.debug("a result could not be injected", exc_info=True)
        self._leave_out(why, self._whole_call)
        return own

    @property
    def _whole_call(self) -> int:
        """What a call that keeps its own result counts."""
        return 1

    @abstractmethod
    def _in_place_of(self, directory: str, own: Any, given: CallArguments) -> Any:
        """What stands for a call's result. Raises UnlikeError or ReadError where nothing can."""

    def _inject(self, count: int = 1) -> None:
        self.injected += count
        self._injected_in_step += count
        self._calls_in_step += 1

    def _convert(self, what: str, rounded: int, overflowed: int) -> None:
        """Count what was only rounded, and what also went beyond the range of its new dtype."""
        if rounded:
            self.rounded[what] += rounded
            self._rounded_in_step[what] += rounded
        if overflowed:
            self.overflowed[what] += overflowed
            self._overflowed_in_step[what] += overflowed

    def _leave_out(self, why: str, count: int = 1) -> None:
        if count:
            self.left_out[why] += count
            self._left_out_in_step[why] += count

    def remarks(self) -> list[str]:
        """What is to be said of it at the end."""
        said = [f"inject: {self.injected} {self.counted} are those of {self._run.url}, not this model's own"]
        said += [
            f"inject: {count} {self._kept} kept their own result: {why}"
            for why, count in self.left_out.items()
        ]
        said += [
            f"inject: {count} {self.counted} were rounded from {what}: they are not quite the other run's"
            for what, count in self.rounded.items()
        ]
        said += [
            f"inject: {count} {self.counted} have numbers beyond the range, {what}, and are infinite or NaN "
            "there: what follows them tells nothing of either model"
            for what, count in self.overflowed.items()
        ]
        return said if self.injected or self.left_out else ["inject: none of its modules was called"]

    @property
    def _kept(self) -> str:
        return "calls"


class CallInjection(Injection):
    """The results of whole calls of a model that is given one thing at a time.

    They are injected only where both runs' models were given the same: in the same step, and in every step
    before it that a cache goes back to.
    """

    def __init__(self, inject: Inject) -> None:
        super().__init__(inject)
        # The last step of which all is known to be the same.
        self._same_until = -1
        self._why_not: str | None = None

    def begin_step(self, number: int) -> None:
        """A step begins, in which the model has not been called yet."""
        super().begin_step(number)
        self._why_not = "the model itself had not been called before in the step"

    def end_step(self) -> Json:
        """What ``step.json`` says of it."""
        if self._why_not is None:
            self._same_until = self._step
        return super().end_step()

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
        if not same and (chosen := row_choices(self._run.config)):
            return f"the other run has chosen rows alone of what the model was given ({chosen})"
        return None if same else "the model was given something else than in the other run"

    def _call(self, directory: str) -> Call:
        return self._run.step(self._step).call(directory)

    def _in_place_of(self, directory: str, own: Any, given: CallArguments) -> Any:
        if self._why_not is not None:
            raise UnlikeError(self._why_not)
        call = self._call(directory)
        converted: dict[str, bool] = {}
        fitted = Fitted(converted)
        found = fitted.of(own, call.outputs)
        if found is own:
            raise UnlikeError(f"nothing can stand for a result that is a {type(own).__name__}")
        self._inject()
        for what, overflowed in converted.items():
            self._convert(what, int(not overflowed), int(overflowed))
        fitted.write_into_arguments(given, lambda: call.inputs)
        return found


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
    if own is None or isinstance(own, SCALARS):
        return type(own) is type(stored) and own == stored
    if isinstance(own, Mapping):
        items = stored_items(own, stored)
        return items is not None and all(_same(value, items[str(key)]) for key, value in own.items())
    if isinstance(own, (tuple, list)):
        both = isinstance(stored, (tuple, list)) and len(own) == len(stored)
        return both and all(_same(one, other) for one, other in zip(own, stored, strict=True))
    return isinstance(stored, OpaqueObject) and not stored.items


def _may_have_tensors(own: Any) -> bool:
    """Whether there are tensors in a value, or an object that may have some."""
    if isinstance(own, (Mapping, tuple, list)):
        return any(map(_may_have_tensors, own.values() if isinstance(own, Mapping) else own))
    return not (own is None or isinstance(own, SCALARS))
