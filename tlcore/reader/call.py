"""One call of a module in a step of a stored run, read lazily."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import MissingError, missing
from ..layout.directions import is_gradient, is_operator, is_tap
from ..layout.names import LATER_CALL, MISREAD, call_dir, module_of, rank_suffix, step_dir
from ..record import Json
from .operator import Operator, operator_in
from .rebuild import Arguments, rebuild, rebuild_arguments
from .stored import Stored

if TYPE_CHECKING:
    from .step import Step


def checked_call(name: str, rank: int, step: Step, url: str) -> str:
    """The directory of a call, by that or, of a first call, by the module's name.

    Raises MissingError for a call that a step has not, or a rank of which it has nothing.
    """
    place = f"{url}/{step_dir(step.number)}"
    calls = step.calls
    directory = name if name in calls else call_dir(name, 0, frozenset())
    if directory not in calls:
        raise missing("call", name, place, calls)
    known = step.documents
    if known and rank not in known:
        later = f"a later call of a module has a name of its own, such as {directory}_{rank}"
        raise MissingError(f"{place}: nothing of rank {rank}, only of {sorted(known)} ({later})")
    return directory


class Call:
    """One call of a module in a step: its arguments and its result, rebuilt with tensors."""

    def __init__(self, step: Step, stored: Stored, directory: str, rank: int) -> None:
        self._step = step
        self._stored = stored
        self.directory = directory
        self.rank = rank

    @cached_property
    def _identity(self) -> tuple[str, int]:
        begin = f"{step_dir(self._step.number)}/{self.directory}/"
        for record in self._step.records:
            if record["name"].startswith(begin):
                return str(record["module"]), int(record["call"])
        # Nothing of this call was stored, so only its directory is left to tell, and who knows better.
        told = self._step.documents.get(self.rank, {}).get(MISREAD)
        module = told.get(self.directory) if isinstance(told, dict) else None
        if isinstance(module, str):
            return module, 0
        later = LATER_CALL.fullmatch(self.directory)
        if later and later[1] in self._step.calls:
            return module_of(later[1]), int(later[2])
        return module_of(self.directory), 0

    @property
    def step(self) -> int:
        """The number of its step."""
        return self._step.number

    @property
    def module(self) -> str:
        """The module's dotted name in the model."""
        return self._identity[0]

    @property
    def index(self) -> int:
        """Which call of the module in the step, from 0."""
        return self._identity[1]

    @cached_property
    def inputs(self) -> Arguments:
        """The arguments, with tensors; `Skipped` stands for a tensor that was not stored."""
        return rebuild_arguments(self.structure("inputs"), self._step.tensor)

    @property
    def original_inputs(self) -> Arguments:
        """`inputs` in the dtypes that they had before ``store_dtype``."""
        return rebuild_arguments(
            self.structure("inputs"), lambda file: self._step.tensor(file, dtype="original")
        )

    @cached_property
    def post_fwd_inputs(self) -> Arguments:
        """The arguments as they stood after the call, where ``log_post_fwd_inputs`` was set."""
        return rebuild_arguments(self.structure("post_fwd_inputs"), self._step.tensor)

    @cached_property
    def outputs(self) -> Any:
        """The result, with tensors."""
        return rebuild(self.structure("outputs"), self._step.tensor)

    @cached_property
    def taps(self) -> dict[str, Any]:
        """What `tlcore.tap` showed in the call, by name, with ``_1`` from the second time on."""
        return {
            each.partition(".")[2]: rebuild(self.structure(each), self._step.tensor)
            for each in self.taps_shown
        }

    @cached_property
    def grad_inputs(self) -> Arguments:
        """The gradients of the arguments, where ``log_gradients`` was set; `Skipped` for one without."""
        return rebuild_arguments(self.structure("grad_inputs"), self._step.tensor)

    @cached_property
    def grad_outputs(self) -> Any:
        """The gradients of the result, where ``log_gradients`` was set."""
        return rebuild(self.structure("grad_outputs"), self._step.tensor)

    @property
    def gradients_shown(self) -> list[str]:
        """The directions under which gradients are stored: ``grad_outputs``, ``grad_outputs~2``, ..."""
        return [each for each in self._directions if is_gradient(each)]

    @property
    def taps_shown(self) -> list[str]:
        """The directions under which the call's taps are stored: ``tap.<name>[_<i>]``."""
        return [each for each in self._directions if is_tap(each)]

    @cached_property
    def operators(self) -> list[Operator]:
        """The operators that the module's own code used, in order, where ``ops`` selected the module.

        What one of them gave is ``call.result_of(operator)``. Raises ReadError for a damaged one.
        """
        where = f"{self._stored.url}: {step_dir(self._step.number)}/{self.directory}"
        found = ((each, self.structure(each)) for each in self.operators_shown)
        return [operator_in(structure, each, f"{where}/{each}.json") for each, structure in found]

    def result_of(self, operator: Operator) -> Any:
        """What one of the call's operators gave, with tensors; what it wrote to, where it gives nothing."""
        return rebuild(self.structure(operator.direction), self._step.tensor)

    @property
    def operators_shown(self) -> list[str]:
        """The directions under which the call's operators are stored: ``op.<number>.<name>``."""
        found = [each for each in self._directions if is_operator(each)]
        return sorted(found, key=lambda each: int(each.split(".")[1]))

    @property
    def _directions(self) -> list[str]:
        begin = f"{self.directory}/"
        names = self._stored.structure_names(self._step.number, self.rank)
        own = [name.removeprefix(begin) for name in names if name.startswith(begin)]
        return sorted(name.removesuffix(".json") for name in own)

    def structure(self, direction: str) -> Json:
        """The structure JSON of one of `layout.directions`, such as ``inputs`` or ``tap.<name>``.

        Raises MissingError when it was not captured.
        """
        step, name = self._step, f"{self.directory}/{direction}.json"
        if name not in self._stored.structure_names(step.number, self.rank):
            why = "it was not captured" if step.complete else "the step was not committed"
            ranked = f"{step_dir(step.number)}/{self.directory}/{direction}{rank_suffix(self.rank)}.json"
            raise MissingError(f"{self._stored.url}: no {ranked!r}; {why}")
        return self._stored.structure(step.number, self.rank, name)

    def __repr__(self) -> str:
        return f"<Call {self.directory} of step {self._step.number}>"
