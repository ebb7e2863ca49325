"""What a capture says at its end of that which it did not hear, and why."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..layout.structure import class_name
from .hooks.compiled_parts import compiled_parts, is_compiled, shown
from .hooks.listeners import ListenerSet
from .hooks.module_tree import Named
from .hooks.tracing import COMPILED, INFERRED, SYMBOLIC, TRANSFORMED

log = logging.getLogger("tlcore")
NO_GRADIENTS = "log_gradients: no call within a step had a tensor that requires a gradient"
NO_TENSORS = "no tensor was captured in {} steps; device_names or module_call_match leave out everything"
_SHOWN = 4
_PASS_ON = ("torch", "transformers", "vllm")
_FAST_PATH = (
    "PyTorch's fast path of nn.TransformerEncoderLayer computes without calling them"
    " (torch.backends.mha.set_fastpath_enabled(False), or from torch 2.5 on a forward hook on any of them,"
    " keeps it from that)"
)
_ATTENTION = "nn.MultiheadAttention uses its weights and does not call it"
_SCRIPT = "TorchScript calls them without Python"
_REPLACED = "they were replaced or taken out of the model"
_PROPERTY = "their class's forward is a property, which nothing can stand in for"
_OWN_CALL = "their class's own __call__ does not call their forward"
_UNKNOWN = "the model's own code passed them by"


def unmatched(
    pattern: str, names: Iterable[str], what: str = "module", key: str = "module_call_match"
) -> str:
    """That no module, or other ``what``, has a name which ``pattern`` finds, with the nearest ones."""
    few = list(names)[:10_000]
    bare = re.sub(r"\\(.)|[\^$*+?(){}|\[\]]", r"\1", pattern).partition(":")[0]
    parts = {each.rpartition(".")[2]: each for each in reversed(few) if each}
    near = difflib.get_close_matches(bare, few, n=2, cutoff=0.6)
    near += [parts[each] for each in difflib.get_close_matches(bare, parts, n=2, cutoff=0.6)]
    hint = " or ".join(repr(each) for each in dict.fromkeys(near[:3]))
    said = f"{key} {pattern!r}: no {what} has a name that it finds"
    return said + (f"; did you mean {hint}?" if hint else "")


def unheard(
    hooks: ListenerSet,
    silent: Sequence[str],
    modules: Sequence[Named],
    selects: Any,
    told: Container[str] = (),
) -> list[str]:
    """What to say of selected modules that no captured step called, and of patterns that found only such.

    ``modules`` are those of the model now; ``silent`` are patterns with modules of which nothing was heard.
    ``selects`` says of a module's names whether it is selected; of those ``told`` of it is known why.
    """
    said = [_nothing_of(text) for text in silent]
    never = [name for name, called in hooks.called.items() if not called and name and name not in told]
    reasons = _Reasons(modules)
    grouped: dict[str, list[str]] = {}
    for name in never:
        reason = reasons.of(name)
        if reason is not None:
            grouped.setdefault(reason, []).append(name)
    for reason, names in grouped.items():
        if reason == _UNKNOWN and silent:
            # Said by the pattern, unless another pattern finds them, too.
            names = [name for name in names if not any(_finds(text, hooks.names[name]) for text in silent)]
        if names:
            said.append(f"selected, but never called: {some(names)}: {reason}")
    late = [
        each.name
        for each in modules
        if each.name not in hooks.names
        # One that only goes by another name now was heard by its old one.
        and id(each.module) not in hooks.known
        and selects(each.names)
        and has_forward(each.module)
    ]
    if late:
        said.append(f"{some(late)} came into the model after the last captured step had begun: not heard")
    return said


def traced(by: Mapping[str, Iterable[str]], modules: Sequence[Named]) -> list[str]:
    """What to say of calls that were only traced, ``by`` what; ``modules`` are those of the model now."""
    compiled = compiled_parts(modules)
    said = []
    for reason, found in by.items():
        names = [name for name in found if reason != COMPILED or not compiled.keys() & _above(name)]
        if not names:
            continue
        if reason == COMPILED:
            said.append(
                f"torch.compile compiled calls of {_listed(names)}; what ran compiled is not in the run. Call"
                ' the original instead, or capture with "compiled": "taps" and compile inside the block'
            )
        else:
            # A symbolic trace calls the modules of the original.
            made = "" if reason in (SYMBOLIC, TRANSFORMED, INFERRED) else ", nor those of what that made"
            said.append(f"calls of {_listed(names)} within {reason} are not captured{made}")
    return said


def compiled_functions(called: Mapping[str, Sequence[str]], told: Container[str]) -> list[str]:
    """What to say of compiled functions ``called`` outside any step, and of the modules that they reach."""
    said = []
    for function, found in called.items():
        names = [name for name in found if name not in told]
        if names:
            said.append(
                f"{function}, compiled with torch.compile, was called outside any step and reaches"
                f" {_listed(names)}; what ran compiled is not in the run. Call the original instead, or"
                ' capture with "compiled": "taps" and call it within `with capture.step():`'
            )
    return said


def _above(name: str) -> set[str]:
    """A module's name and those of the modules that it is part of."""
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(len(parts) + 1)}


def _listed(names: Iterable[str]) -> str:
    """The first few names in a sentence, without those of parts of others."""
    known = set(names)
    top = [shown(each) for each in names if not (_above(each) - {each}) & known]
    return ", ".join(top[:_SHOWN]) + (f" and {len(top) - _SHOWN} more" if len(top) > _SHOWN else "")


def missed_taps(unmatched_by: Sequence[str], silent: Sequence[str], shown: Iterable[str]) -> list[str]:
    """What to say of patterns that find none of the taps ``shown``, and of those that found no value."""
    return [unmatched(each, shown, "tap") for each in unmatched_by] + [_nothing_of(each) for each in silent]


def without_operators(silent: Sequence[str], left_out: Iterable[str]) -> list[str]:
    """What to say of patterns of `ops` that found none, and of modules in which they were left out."""
    said = [f"ops {each!r}: no operator was captured in the modules that it selects" for each in silent]
    if names := sorted(left_out):
        said.append(
            f"ops: not captured in {some(names)}: PyTorch's fast path would compute otherwise there if its"
            " operators were watched (torch.backends.mha.set_fastpath_enabled(False) lets them be)"
        )
    return said


def taps_left_out(names: Iterable[str]) -> list[str]:
    """What to say of `tlcore.tap` in code that was compiled without taps, where any compiled code ran."""
    listed = ", ".join(map(repr, sorted(names)[:_SHOWN]))
    return [
        f"tlcore.tap of {listed} is in code that was compiled without it; what ran compiled did not show it."
        ' Capture with "compiled": "taps" to have it'
    ] * bool(listed)


def replaced_within(modules: Sequence[str]) -> list[str]:
    """Of modules whose ``forward`` was replaced where nobody looked; nothing where there is none."""
    if not modules:
        return []
    return [
        f"the forward of {some(modules)} was replaced within a captured step; what the replacement made of"
        " arguments and result there may not be in the run"
    ]


def _nothing_of(pattern: str) -> str:
    what = "no call that it selects was made within a captured step, so nothing of it is in the run"
    return f"module_call_match {pattern!r}: {what}"


def _finds(pattern: str, names: Sequence[str]) -> bool:
    return any(re.search(pattern, name) for name in names)


def some(names: Sequence[str]) -> str:
    """The first few names, and how many there are."""
    top = [each for each in names if each.rpartition(".")[0] not in names]
    more = len(names) - len(top[:_SHOWN])
    return ", ".join(top[:_SHOWN]) + (f" and {more} more" if more else "")


def has_forward(module: nn.Module) -> bool:
    """Whether a module can be called at all; containers such as `nn.ModuleList` cannot."""
    own = getattr(type(module), "forward", None) is not nn.Module.forward or "forward" in vars(module)
    return own or has_own_call(module)


def has_own_call(module: nn.Module) -> bool:
    """Whether a module's class has a ``__call__`` of its own, which may do more than to call ``forward``."""
    found = type(module).__call__
    # Those of PyTorch, transformers (gradient checkpointing) and vLLM hand on what forward returns, or hooks
    # made of it.
    return found is not nn.Module.__call__ and str(found.__module__).partition(".")[0] not in _PASS_ON


def own_calls(modules: Iterable[Named], heard: Mapping[str, bool]) -> list[str]:
    """What to say of modules that were ``heard`` and whose callers may have got something else."""
    names = [each.name for each in modules if heard.get(each.name) and has_own_call(each.module)]
    if not names:
        return []
    return [
        f"the class of {some([shown(each) for each in names])} has a __call__ of its own; the run has the"
        " arguments and results of forward, not what that makes of them"
    ]


class _Reasons:
    """Why modules were not called, found in the model as it is at the end."""

    def __init__(self, modules: Sequence[Named]) -> None:
        self._modules = {each.name: each.module for each in modules}
        self._compiled = compiled_parts(modules)
        self._methods = _compiled_methods(modules)
        self._kept = _kept_forwards(modules)

    def of(self, name: str) -> str | None:
        """Why; None for a module that nobody calls."""
        module = self._modules.get(name)
        if module is None:
            return _REPLACED
        if not has_forward(module):
            return None
        above = sorted(_above(name), key=len, reverse=True)
        for each in above:
            if each in self._compiled:
                return f"{shown(each)} is {self._compiled[each]}, where they run without Python"
            if each in self._methods:
                return f"{self._methods[each]!r} of {shown(each)} is compiled with torch.compile"
        if id(module) in self._kept:
            return f"{self._kept[id(module)]} keeps its forward from before the capture, and calls that"
        parents = [self._modules.get(each) for each in above[1:]]
        if any(isinstance(each, torch.jit.ScriptModule) for each in parents):
            return _SCRIPT
        if isinstance(inspect.getattr_static(type(module), "forward", None), property):
            return _PROPERTY
        if has_own_call(module):
            return _OWN_CALL
        if isinstance(parents[0], nn.MultiheadAttention):
            return _ATTENTION
        if any(isinstance(each, nn.TransformerEncoderLayer) and not each.training for each in parents):
            return _FAST_PATH
        return _UNKNOWN


Look = Callable[[nn.Module, str, Any], Any]


def _found(modules: Iterable[Named], look: Look) -> Iterator[tuple[str, str, Any]]:
    """What ``look`` finds in which attribute of which module; nothing where an object refuses the look."""
    for each in modules:
        for key, value in list(vars(each.module).items()):
            try:
                found = look(each.module, key, value)
            except Exception:
                continue
            if found is not None:
                yield each.name, key, found


def _compiled_methods(modules: Iterable[Named]) -> dict[str, str]:
    def look(module: nn.Module, key: str, value: Any) -> bool | None:
        return True if callable(value) and key != "forward" and is_compiled(value) else None

    return {name: key for name, key, _ in _found(modules, look)}


def _kept_forwards(modules: Iterable[Named]) -> dict[int, str]:
    """Of modules whose bound ``forward`` lies in an attribute of some module: where."""

    def look(module: nn.Module, key: str, value: Any) -> Any:
        while isinstance(value, functools.partial):
            value = value.func
        # A bound `functools.partial` has no name.
        kept = isinstance(value, MethodType) and getattr(value, "__name__", None) == "forward"
        return value.__self__ if kept and value.__self__ is not module else None

    return {id(owner): f"{key!r} of {shown(name)}" for name, key, owner in _found(modules, look)}


def quietly(make: Callable[[], Iterable[str]]) -> list[str]:
    """What ``make`` says, or that it failed: it looks at objects of others, and the run must be ended."""
    try:
        return list(make())
    except Exception as error:
        log.debug("remarks", exc_info=True)
        return [f"what may be missing could not be told: {class_name(error)}: {error}"]


def rows_unknown(problems: Mapping[str, int], cuts: bool, told: bool) -> str | None:
    """What to know where only some rows were to be stored, and whose rows they are was not always known."""
    if not cuts or (told and not problems):
        return None
    why = "; ".join(f"{text} ({count} calls)" for text, count in problems.items())
    unknown = "tensors whose rows nobody knows were skipped"
    advice = "give the model an attention_mask, or write `with capture.step(rows=[...]):`"
    return f"{unknown}: {why or 'nothing said which rows are whose'}; {advice}"


def mixed(count: int) -> list[str]:
    """What to say of so many steps and calls of the model that came while a step of another task was open."""
    if not count:
        return []
    what = "steps or calls of the model came from another task while a step waited in its own (`await`)"
    return [f"{count} {what}, and lie in that step; let steps exclude each other (asyncio.Lock)"]


def in_other_threads(count: int) -> list[str]:
    """What to say of so many steps and calls of the model that came while another thread was in a step."""
    if not count:
        return []
    what = "steps or calls of the model came while another thread was in a step, and are not captured"
    return [f"{count} {what}; let threads take turns (threading.Lock)"]


def elsewhere(calls: Mapping[str, int]) -> str:
    """What to say of calls of modules in other threads than the step's own."""
    which = ", ".join(map(shown, list(calls)[:_SHOWN])) + (", ..." if len(calls) > _SHOWN else "")
    what = f"{sum(calls.values())} calls in other threads than the step's own are not captured, of {which}"
    return f"{what}; step.json counts them (calls_in_other_threads)"


def outside(calls: Mapping[str, int], kind: str) -> str | None:
    """What to say of calls outside any step; None where there were none."""
    if not calls:
        return None
    counted = Counter(calls)
    advice = "put `with capture.step():` around the code that makes them"
    if kind != "outermost":
        advice += ', or configure step="outermost"'
    names = [shown(name) for name in counted]
    listed = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    number = sum(counted.values())
    return f"{number} calls outside any step are not captured, of {listed}; to have them, {advice}"
