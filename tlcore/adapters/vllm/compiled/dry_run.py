"""One eager forward pass before the model is compiled: it shows which tensors there will be to tap.

A graph out of a compilation cache is never traced, so what its taps mean must be known without a trace. The
dry run runs the model as vLLM's own profiling does, and notes each call's structure.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn

from ....engine.calls import Call
from ....engine.filters.modules import Calls, ModuleFilter
from ....engine.filters.tensors import TensorSpec
from ....engine.hooks import tap_point
from ....engine.hooks.module_tree import Named
from ....engine.hooks.tap_sites import CallTaps, module_of
from ....layout.directions import DIRECTIONS, tap_name
from ....layout.names import call_dir
from ....layout.structure import NO_ITEMS, KeptLeaves, Scalar, TreeSpec, flatten
from ....ledger import Outcome
from ....record import Direction
from ..module_names import plain_modules
from .code_taps import tensors_of
from .tapped import Slots

UNTAPPABLE = Outcome("skipped", "a compiled model's taps do not reach into this structure")
NOT_FIRED = Outcome("failed", "its tap did not fire")
_TAP = "tap."


@dataclass(slots=True, eq=False)
class Side:
    """One side of one call: its structure, and the specs that its tensors had in the dry run.

    ``wanted`` is False for a call that no pattern selects, ``tappable`` where no tap reaches its tensors.
    """

    sides: Call
    direction: Direction
    treespec: TreeSpec
    keywords: TreeSpec | None
    scalars: list[Scalar]
    specs: list[TensorSpec]
    wanted: bool
    tappable: bool


@dataclass(slots=True)
class Plan:
    """What to tap: the sides in order of execution, and each module's slots.

    ``users`` has, for each slot, the sides that use it, in the order in which its tap fires, each with the
    tensor's position in the side. ``table`` says what each slot is; it changes when the graph does.
    ``code`` has, for each of these modules, the slots of what is shown by `tlcore.tap` while it is the
    innermost one that runs, by the tap's name.
    """

    sides: list[Side] = field(default_factory=list)
    slots: dict[nn.Module, Slots] = field(default_factory=dict)
    users: list[list[tuple[Side, int]]] = field(default_factory=list)
    table: list[str] = field(default_factory=list)
    code: dict[nn.Module, dict[str, tuple[int, ...]]] = field(default_factory=dict)


class DryRun:
    """Listens to the modules called inside the model's ``forward``, by standing in for their own.

    ``patterns`` and ``post_inputs`` are those of the configuration.
    """

    def __init__(self, model: nn.Module, selector: ModuleFilter, post_inputs: bool) -> None:
        self._modules: dict[str, nn.Module] = {"": model, **plain_modules(model)}
        self._model = model
        self._selector = selector
        self._post = post_inputs
        self._depth = 0
        self._counts: Counter[str] = Counter()
        # The modules that run, the innermost last, and which of their calls it is.
        self._running: list[tuple[str, int]] = []
        # Each side with the module that shows it and as what: a direction, or a tap's name behind ``tap.``.
        self._noted: list[tuple[str, str, Side]] = []
        self._known = {id(module): Named(name, module, ()) for name, module in self._modules.items()}
        self._names = frozenset(self._modules)
        self._shown: Counter[tuple[str, str]] = Counter()
        self._in_call: Counter[tuple[str, int, str]] = Counter()
        self._taps: dict[tuple[str, int, bool], CallTaps] = {}

    def run(self, forward_pass: Callable[[], object]) -> Plan:
        """Call ``forward_pass`` and plan the taps for the last pass of the model in it."""
        replaced = []
        for name, module in self._modules.items():
            own = vars(module)
            replaced.append((own, own.get("forward")))
            heard = self._whole if module is self._model else functools.partial(self._call, name)
            own["forward"] = functools.partial(heard, module.forward)
        tap_point.receive(self)
        try:
            forward_pass()
        finally:
            tap_point.receive_no_more(self)
            for own, before in replaced:
                if before is None:
                    del own["forward"]
                else:
                    own["forward"] = before
        return self._plan()

    def tapped(self, name: str, value: Any, frame: FrameType | None) -> bool:
        """The code of ``frame`` shows a value, the model's own where that is none's."""
        if self._depth:
            self._note_tap(module_of(frame, self._known) or self._known[id(self._model)], name, value)
        return False

    def tapped_in(self, name: str, value: Any, module: nn.Module) -> None:
        """Code that another capture has traced along is none of the model's."""

    def _note_tap(self, named: Named, name: str, value: Any) -> None:
        module = named.name
        running = next((call for each, call in reversed(self._running) if each == module), None)
        call = max(0, self._counts[module] - 1) if running is None else running
        count = self._shown[module, name]
        self._shown[module, name] = count + 1
        number = self._in_call[module, call, name]
        self._in_call[module, call, name] = number + 1
        # Of a method that is called directly there are no arguments, either.
        only_taps = running is None or not _is_among(self._selector.calls(module), call)
        taps = self._taps.get((module, call, only_taps))
        if taps is None:
            directory = call_dir(module, call, self._names)
            taps = self._taps[module, call, only_taps] = CallTaps(Call(module, call, directory, only_taps))
        leaves = KeptLeaves()
        treespec = flatten(value, leaves)
        direction = taps.direction(name, number, treespec)
        wanted = _is_among(self._selector.calls(tap_name(module, name)), count)
        side = _side(taps.call, direction, treespec, None, leaves, tensors_of(value), wanted)
        self._noted.append((self._running[-1][0], _TAP + name, side))

    def _whole(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for each in (self._counts, self._noted, self._shown, self._in_call, self._taps):
            each.clear()
        self._depth += 1
        try:
            return self._call("", forward, *args, **kwargs)
        finally:
            self._depth -= 1

    def _call(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._depth:
            return forward(*args, **kwargs)
        call = self._counts[name]
        self._counts[name] = call + 1
        selected = self._selector.calls(name)
        sides = Call(name, call, call_dir(name, call, self._names))
        wanted = None if selected is None else _is_among(selected, call)
        self._note(sides, "inputs", args, kwargs, wanted)
        self._running.append((name, call))
        try:
            output = forward(*args, **kwargs)
        finally:
            self._running.pop()
        self._note(sides, "outputs", output, None, wanted)
        if self._post:
            self._note(sides, "post_fwd_inputs", args, kwargs, wanted)
        return output

    def _note(
        self,
        sides: Call,
        direction: Direction,
        value: Any,
        kwargs: dict[str, Any] | None,
        wanted: bool | None,
    ) -> None:
        """Note one side of a call; nothing of a module that is not selected at all."""
        if wanted is None:
            return
        leaves = KeptLeaves()
        treespec = flatten(value, leaves)
        keywords = None if kwargs is None else flatten(kwargs, leaves) if kwargs else NO_ITEMS
        reached = tensors_of(value if kwargs is None else (value, kwargs))
        side = _side(sides, direction, treespec, keywords, leaves, reached, wanted)
        self._noted.append((sides.module, direction, side))

    def _plan(self) -> Plan:
        # Of a tap that nobody wants, not even the place is kept in the graph.
        chosen = {(by, what) for by, what, side in self._noted if side.wanted or not what.startswith(_TAP)}
        noted = [(by, what, side) for by, what, side in self._noted if (by, what) in chosen]
        plan = Plan(sides=[side for _, _, side in noted])
        numbers: dict[tuple[str, str, int], int] = {}
        for name, what, side in noted:
            for i in range(len(side.specs) if side.tappable else 0):
                key = (name, what, i)
                if key not in numbers:
                    numbers[key] = len(plan.table)
                    plan.table.append(f"{name}/{what}/{i}")
                    plan.users.append([])
                plan.users[numbers[key]].append((side, i))
        for name in dict.fromkeys(name for name, _, _ in self._noted):
            module = self._modules[name]
            plan.slots[module] = Slots(*(_slots_of(numbers, name, each) for each in DIRECTIONS))
            taps = dict.fromkeys(what for by, what, _ in self._noted if by == name and what.startswith(_TAP))
            plan.code[module] = {each.removeprefix(_TAP): _slots_of(numbers, name, each) for each in taps}
        return plan


def _is_among(selected: Calls | None, call: int) -> bool:
    return selected == "all" or (selected is not None and call in selected)


def _slots_of(numbers: dict[tuple[str, str, int], int], name: str, what: str) -> tuple[int, ...]:
    found: list[int] = []
    while (name, what, len(found)) in numbers:
        found.append(numbers[name, what, len(found)])
    return tuple(found)


def _side(
    sides: Call,
    direction: Direction,
    treespec: TreeSpec,
    keywords: TreeSpec | None,
    leaves: KeptLeaves,
    reached: list[torch.Tensor],
    wanted: bool,
) -> Side:
    tappable = [id(each) for each in reached] == [id(each) for each in leaves.tensors]
    outcome = NOT_FIRED if tappable else UNTAPPABLE
    specs = [_form(tensor, outcome) for tensor in leaves.tensors]
    return Side(sides, direction, treespec, keywords, leaves.scalars, specs, wanted, tappable)


def _form(tensor: torch.Tensor, outcome: Outcome) -> TensorSpec:
    shape = tuple(tensor.shape)
    nbytes = tensor.numel() * tensor.element_size()
    return TensorSpec(tensor.dtype, shape, str(tensor.device), nbytes, -1, outcome)
