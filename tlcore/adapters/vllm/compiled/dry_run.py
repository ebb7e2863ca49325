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
from typing import Any, Literal

import torch
from torch import nn

from ....engine.calls import Call
from ....engine.filters.modules import ModuleFilter
from ....engine.filters.tensors import TensorSpec
from ....engine.hooks import tap_point
from ....engine.hooks.module_tree import Named
from ....engine.hooks.tap_sites import module_of
from ....layout.directions import tap_name
from ....layout.names import call_dir
from ....layout.structure import NO_ITEMS, KeptLeaves, Scalar, TreeSpec, flatten
from ....ledger import Outcome
from ....record import Direction
from ..module_names import plain_modules
from .tapped import Slots, tensors_of

UNTAPPABLE = Outcome("skipped", "a compiled model's taps do not reach into this structure")
NOT_FIRED = Outcome("failed", "its tap did not fire")


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
    ``code_taps`` are selected values that the model's code shows by `tlcore.tap`; a compiler leaves them out.
    """

    sides: list[Side] = field(default_factory=list)
    slots: dict[nn.Module, Slots] = field(default_factory=dict)
    users: list[list[tuple[Side, int]]] = field(default_factory=list)
    table: list[str] = field(default_factory=list)
    code_taps: list[str] = field(default_factory=list)


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
        self._noted: list[tuple[str, Side]] = []
        self._known = {id(module): Named(name, module, ()) for name, module in self._modules.items()}
        self._code_taps: dict[str, None] = {}

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

    def tapped(self, name: str, value: Any, frame: FrameType | None) -> None:
        """The code of ``frame`` shows a value, which nobody will see when it is compiled."""
        named = module_of(frame, self._known) if self._depth else None
        if named is not None:
            self._note_tap(tap_name(named.name, name))

    def tapped_in(self, name: str, value: Any, module: nn.Module) -> None:
        """The code of a module shows a value."""
        named = self._known.get(id(module))
        if named is not None and self._depth:
            self._note_tap(tap_name(named.name, name))

    def _note_tap(self, name: str) -> None:
        if self._selector.calls(name) is not None:
            self._code_taps[name] = None

    def _whole(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._counts.clear()
        self._noted.clear()
        self._depth += 1
        try:
            return self._call("", forward, *args, **kwargs)
        finally:
            self._depth -= 1

    def _call(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        selected = self._selector.calls(name)
        if not self._depth or selected is None:
            return forward(*args, **kwargs)
        call = self._counts[name]
        self._counts[name] += 1
        sides = Call(name, call, call_dir(name, call, frozenset(self._modules)))
        wanted = selected == "all" or call in selected
        self._note(sides, "inputs", args, kwargs, wanted)
        output = forward(*args, **kwargs)
        self._note(sides, "outputs", output, None, wanted)
        if self._post:
            self._note(sides, "post_fwd_inputs", args, kwargs, wanted)
        return output

    def _note(
        self, sides: Call, direction: Direction, value: Any, kwargs: dict[str, Any] | None, wanted: bool
    ) -> None:
        leaves = KeptLeaves()
        treespec = flatten(value, leaves)
        keywords = None if kwargs is None else flatten(kwargs, leaves) if kwargs else NO_ITEMS
        reached = tensors_of(value if kwargs is None else (value, kwargs))
        tappable = [id(each) for each in reached] == [id(each) for each in leaves.tensors]
        outcome = NOT_FIRED if tappable else UNTAPPABLE
        specs = [_form(tensor, outcome) for tensor in leaves.tensors]
        side = Side(sides, direction, treespec, keywords, leaves.scalars, specs, wanted, tappable)
        self._noted.append((sides.module, side))

    def _plan(self) -> Plan:
        plan = Plan(sides=[side for _, side in self._noted], code_taps=list(self._code_taps))
        numbers: dict[tuple[str, Direction, int], int] = {}
        for name, side in self._noted:
            for i in range(len(side.specs) if side.tappable else 0):
                key = (name, side.direction, i)
                if key not in numbers:
                    numbers[key] = len(plan.table)
                    plan.table.append(f"{name}/{side.direction}/{i}")
                    plan.users.append([])
                plan.users[numbers[key]].append((side, i))
        for name in dict.fromkeys(name for name, _ in self._noted):
            plan.slots[self._modules[name]] = Slots(
                _slots_of(numbers, name, "inputs"),
                _slots_of(numbers, name, "outputs"),
                _slots_of(numbers, name, "post_fwd_inputs"),
            )
        return plan


def _slots_of(
    numbers: dict[tuple[str, Direction, int], int],
    name: str,
    direction: Literal["inputs", "outputs", "post_fwd_inputs"],
) -> tuple[int, ...]:
    found: list[int] = []
    while (name, direction, len(found)) in numbers:
        found.append(numbers[name, direction, len(found)])
    return tuple(found)


def _form(tensor: torch.Tensor, outcome: Outcome) -> TensorSpec:
    shape = tuple(tensor.shape)
    nbytes = tensor.numel() * tensor.element_size()
    return TensorSpec(tensor.dtype, shape, str(tensor.device), nbytes, -1, outcome)
