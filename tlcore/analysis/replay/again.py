"""Running one captured call again and holding its result against the stored one."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError, ReadError
from ...layout.names import step_dir
from ...layout.row_scale import STORED as PACKED
from ...layout.structure import KeptLeaves, describe, flatten
from ...reader import Arguments, Call, Run, Skipped, open_run
from ..measure import Tolerance, measure
from ..results import Status, TensorResult
from .given import Place, arguments_of, by_place, on_each, refused, rows_lacking, tensors_of
from .state import copied, same_values, state_kept
from .then import since_capture

Callee = nn.Module | Callable[..., Any]
_Path = tuple[Any, ...]
SEED, _SHOWN = 0, 3
_RANDOM = "it draws random numbers, and from which ones it began is in no run"


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a call gave again: ``results`` holds each tensor of it against the stored one, A against B.

    ``output`` is the new result, ``arguments`` what the module was called with, ``tolerance`` what they were
    held against each other with. ``hints`` say what of the call no run holds.
    """

    run: str
    call: str
    results: Sequence[TensorResult]
    output: Any = field(repr=False, compare=False)
    arguments: Arguments = field(repr=False, compare=False)
    tolerance: Tolerance = field(default_factory=Tolerance, repr=False, compare=False)
    hints: tuple[str, ...] = field(default=(), compare=False)

    @property
    def equal(self) -> bool:
        """Whether all of the result agrees within the tolerance."""
        return all(each.agrees for each in self.results)

    @property
    def bitwise(self) -> bool:
        """Whether all of the result is equal in every bit."""
        return all(each.status == "bitwise" for each in self.results)

    def __str__(self) -> str:
        if self.bitwise:
            return f"{self.call}: equal to what was captured, in every bit"
        if self.equal:
            return f"{self.call}: agrees with what was captured, within the tolerance{self._why()}"
        # What differs says more than what is not there.
        wrong = min(
            (each for each in self.results if not each.agrees), key=lambda each: each.status == "missing"
        )
        path = "".join(f"[{key}]" for key in wrong.path)
        if wrong.status == "missing":
            return f"{self.call}: outputs{path} cannot be compared, {wrong.reason}{self._why()}"
        size = "" if wrong.measures is None else f", by {wrong.measures.max_abs:.3g} at most"
        reason = f" ({wrong.reason})" if wrong.reason else ""
        return f"{self.call}: outputs{path} differs from what was captured{size}{reason}{self._why()}"

    def _why(self) -> str:
        return "".join(f"; {each}" for each in self.hints)


def replay(
    run: Run | str | os.PathLike[str],
    call: str,
    module: Callee,
    *,
    replace: Mapping[Place, Any] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    rank: int = 0,
    storage_options: Mapping[str, Any] | None = None,
) -> Replayed:
    """Call a module with the inputs of a captured call, and compare the result with the stored one.

    ``call`` is its directory in a step, ``step_0/model.layers.5``. ``replace`` has arguments, by position or
    name, that stand in the place of stored ones, such as of a cache that was not captured. With a ``device``
    or ``dtype`` a copy of the module runs there, its floating tensors in that dtype. It runs without
    gradients, in the mode (training or not) that it is in, with a seed of its own, and leaves the module's
    buffers and attributes as they were. ``rtol`` and ``atol`` are those of `compare`.

    Raises ReadError when the call, an argument or the result is not in the run, and whatever the module does.
    """
    opened = run if isinstance(run, Run) else open_run(run, storage_options)
    as_given = module
    found = call_in(opened, call, rank)
    replace = by_place(found, replace or {}, module)
    given = arguments_of(found, replace)
    if device is not None or dtype is not None:
        if isinstance(module, nn.Module):
            module = copy.deepcopy(module).to(device=device, dtype=dtype)
        given = Arguments(*on_each((given.args, given.kwargs), lambda tensor: _moved(tensor, device, dtype)))
    stored = tensors_of(found.outputs)
    # What it is given was rounded, too, whether the result has scales or not.
    tolerance = Tolerance(rtol, atol, scaled=opened.config.get("store_dtype") == PACKED)
    try:
        again = _run_again(module, given)
    except Exception as error:
        reason = refused(found, replace, error, opened.config)
        raise error if reason is None else reason from error
    results = _compared(found, stored, tensors_in(again.output), tolerance)
    shared = given if _bitwise(results) else _shared(given)
    if shared is not given:
        # Whether two arguments were one tensor is in no run, and modules may ask.
        of_one = _run_again(module, shared)
        results_of_one = _compared(found, stored, tensors_in(of_one.output), tolerance)
        if _bitwise(results_of_one):
            again, results, given = of_one, results_of_one, shared
    hints: list[str] = []
    if not _bitwise(results):
        if not all(each.agrees for each in results):
            hints += since_capture(opened, found.module, as_given, rank)
            hints += rows_lacking(opened.config)
        hints += _other_dtype(results if dtype is None else (), opened.config.get("store_dtype"))
        hints += _of_itself(again, _run_again(module, given))
    return Replayed(opened.url, call, results, again.output, given, tolerance, tuple(hints))


def _bitwise(results: Sequence[TensorResult]) -> bool:
    return all(each.status == "bitwise" for each in results)


def _of_itself(again: _Again, once_more: _Again) -> Iterator[str]:
    """What a call and its repetition tell of themselves: why a module may not give what it gave."""
    if again.random:
        yield _RANDOM
    mine, its = tensors_in(again.output), tensors_in(once_more.output)
    if any(not same_values(each, its[path]) for path, each in mine.items() if path in its):
        yield "two replays of it differ from one another: it is not deterministic"
    if again.changed:
        shown = ", ".join(again.changed[:_SHOWN])
        yield f"it changes its own state ({shown}), and what that was before this call is in no run"
    if again.written:
        shown = ", ".join(again.written[:_SHOWN])
        yield f"it writes into its argument {shown}, and what else had the same memory is in no run"


def _other_dtype(results: Sequence[TensorResult], asked: Any) -> Iterator[str]:
    """What to know of a result that has another dtype now, or was ``asked`` to be stored in another."""
    if isinstance(asked, str):
        yield f'the run has it and its arguments rounded to {asked}, as "store_dtype" asked'
    for stored, again in dict.fromkeys(each.dtypes for each in results):
        if None not in (stored, again) and stored != again and stored != asked:
            yield f"it was {stored} and is {again} now, and whether autocast was on is in no run"
            return


def run_again(module: Callee, given: Arguments) -> Any:
    """A module's result for copies of arguments, which it may change in place, and from its state as it is.

    What is random in it is so from one seed on.
    """
    return _run_again(module, given).output


@dataclass(frozen=True, slots=True)
class _Again:
    """A result; whether random numbers were drawn, which state was changed, which arguments written into."""

    output: Any
    random: bool
    changed: list[str]
    written: list[str]


def _run_again(module: Callee, given: Arguments) -> _Again:
    """The same, with what the call told of itself."""
    clones: dict[int, torch.Tensor] = {}
    args, kwargs = on_each(
        (given.args, given.kwargs),
        lambda tensor: clones.setdefault(id(tensor), tensor.clone()),
        other=lambda value: copied(value, {}),
    )
    before = tensors_of((dict(enumerate(given.args)), given.kwargs))
    devices = {each.device for each in tensors_of((args, kwargs)).values() if isinstance(each, torch.Tensor)}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))
        for device in devices:
            if device.type != "cpu":
                stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
        changed = stack.enter_context(state_kept(module))
        torch.manual_seed(SEED)
        states = _random_states(devices)
        with torch.no_grad():
            output = module(*args, **kwargs)
        random = any(map(_unequal, states, _random_states(devices)))
        pairs = ((path, each, clones.get(id(each))) for path, each in before.items())
        written = [
            ".".join(map(str, path[1:]))
            for path, each, clone in pairs
            if clone is not None and isinstance(each, torch.Tensor) and not same_values(each, clone)
        ]
        return _Again(output, random, changed(), written)


def _random_states(devices: Collection[torch.device]) -> list[torch.Tensor]:
    others = [each for each in devices if each.type != "cpu"]
    states = [torch.get_device_module(each).get_rng_state(each) for each in others]
    return [torch.get_rng_state(), *states]


def _unequal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not torch.equal(one, other)


def _shared(given: Arguments) -> Arguments:
    """The arguments with one tensor for all that are equal; the same object where none are."""
    kept: list[torch.Tensor] = []

    def one(tensor: torch.Tensor) -> torch.Tensor:
        for each in kept:
            same = each.dtype == tensor.dtype and each.shape == tensor.shape
            if same and each.device == tensor.device and torch.equal(each, tensor):
                return each
        kept.append(tensor)
        return tensor

    found = Arguments(*on_each((given.args, given.kwargs), one))
    return given if len(kept) == len(tensors_of((given.args, given.kwargs))) else found


def tensors_in(value: Any) -> dict[_Path, torch.Tensor]:
    """The tensors that capture finds in a value, by the keys that lead to them."""
    leaves, paths = KeptLeaves(), []

    def note(path: _Path) -> dict[str, Any]:
        paths.append(path)
        return {}

    describe(flatten(value, leaves), (), note, iter(leaves.scalars))
    return dict(zip(paths, leaves.tensors, strict=True))


def call_in(run: Run, name: str, rank: int = 0) -> Call:
    """A call by its directory in a step. Raises ConfigError for a name of another form, MissingError."""
    step, _, directory = name.partition("/")
    number = step.removeprefix("step_")
    if not number.isdigit() or not directory or step == number:
        plain = name and "/" not in name and not name.startswith("step_")
        call = f"{step_dir(next(iter(run.steps), 0))}/{name}" if plain else "step_0/model.layers.5"
        raise ConfigError("call", f"{name!r} names no call of a step.", f"Write {call}.")
    return run.step(int(number)).call(directory.rstrip("/"), rank)


def _moved(tensor: torch.Tensor, device: Any, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _compared(
    call: Call,
    stored: Mapping[_Path, torch.Tensor | Skipped],
    again: Mapping[_Path, torch.Tensor],
    tolerance: Tolerance,
) -> list[TensorResult]:
    if not stored:
        raise ReadError(f"{call.directory}: no tensor of its result was stored")
    left = {_text(path): (path, tensor) for path, tensor in again.items()}
    results = []
    for path, tensor in stored.items():
        _, mine = left.pop(_text(path), (path, None))
        results.append(_result(call, path, tensor, mine, tolerance))
    return results + [_result(call, path, None, tensor, tolerance) for path, tensor in left.values()]


def _result(
    call: Call,
    path: _Path,
    stored: torch.Tensor | Skipped | None,
    again: torch.Tensor | None,
    tolerance: Tolerance,
) -> TensorResult:
    status: Status = "missing"
    measures, reason = None, None
    if isinstance(stored, Skipped):
        reason = f"it was not stored ({stored.reason})"
    elif stored is None or again is None:
        reason = f"only {'the run' if again is None else 'the new result'} has it"
    elif stored.shape != again.shape:
        status, reason = "different", f"the shapes {tuple(stored.shape)} and {tuple(again.shape)} differ"
    else:
        allowed = tolerance.between(stored.dtype, again.dtype)
        measures = measure(stored, again.detach().cpu(), allowed)
        status = "bitwise" if measures.bitwise else "close" if measures.agrees else "different"
    both = stored if isinstance(stored, torch.Tensor) else None, again
    return TensorResult(
        status=status,
        step=call.step,
        rank=call.rank,
        module=call.module,
        call=call.index,
        direction="outputs",
        path=path,
        names=(call.directory, None),
        dtypes=_both(both, lambda each: str(each.dtype).removeprefix("torch.")),
        shapes=_both(both, lambda each: tuple(each.shape)),
        measures=measures,
        reason=reason,
    )


def _both(both: tuple[torch.Tensor | None, torch.Tensor | None], what: Callable[[torch.Tensor], Any]) -> Any:
    return tuple(None if each is None else what(each) for each in both)


def _text(path: _Path) -> str:
    return "/".join(str(key) for key in path)
