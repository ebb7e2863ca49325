"""Listening to the selected modules' calls, only while a selected step runs.

A module is listened to by standing in for its ``forward``, which also hears calls that never come by
``Module.__call__``. What forward hooks of others make of its result is heard behind the last of them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Container
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from ...hotpath.intercept import (
    FORWARD,
    StandIn,
    forget,
    hooks_follow,
    is_stand_in,
    keep_out_of_copies,
    put_back,
    raised_through,
    without_dead,
)
from ..calls import Call
from .collector import Collector
from .module_tree import ModuleTree, Named
from .stack_room import StackRoom

_NOBODY = 0
_is_compiling = torch.compiler.is_compiling
_get_ident = threading.get_ident
_global_hooks = torch_module._global_forward_hooks


class Hearing:
    """Whose calls all listeners of a model hear at the moment: those of the thread ``owner``, 0 for none."""

    __slots__ = ("owner",)

    def __init__(self) -> None:
        self.owner = _NOBODY


class Listener(StandIn):
    """One module's listener: counts its calls in the step and hands the wanted ones to the collector.

    ``found`` is what the module's own ``__dict__`` has as its ``forward``.
    """

    __slots__ = (
        "_collector",
        "_directory",
        "_hearing",
        "_post",
        "_sites",
        "_wanted",
        "count",
        "elsewhere",
        "handles",
        "name",
    )

    def __init__(
        self,
        name: str,
        module: nn.Module,
        wanted: frozenset[int] | Literal["all"],
        collector: Collector,
        hearing: Hearing,
        directory: Callable[[str, int], str],
        post_inputs: bool,
    ) -> None:
        super().__init__(module, FORWARD, put_back(vars(module).get(FORWARD)))
        self.name = name
        self.count = 0
        # Calls in threads other than the step's, which nobody can put in order.
        self.elsewhere = 0
        self._directory = directory
        self._sites: list[Call | None] = []
        self._wanted = wanted
        self._collector = collector
        self._hearing = hearing
        self._post = post_inputs
        self.handles: list[RemovableHandle] = []

    def successor(self) -> Listener:
        """A new listener for the module, around whatever stands for its ``forward`` now.

        This one may be held inside that, and passes by for ever.
        """
        self.dead = True
        self._wanted, wanted = frozenset(), self._wanted
        given = (wanted, self._collector, self._hearing, self._directory, self._post)
        next_one = Listener(self.name, self.module, *given)
        next_one._sites = self._sites
        self._hearing = _DEAF
        return next_one

    def follow(self, found: Any) -> bool:
        """Whether to stand in for ``found`` is the same as before but for other captures' listeners."""
        base, mine = found, self.replaced
        while is_stand_in(base):
            if base is self:
                return False
            base = base.replaced
        while is_stand_in(mine):
            mine = mine.replaced
        if self.dead or base is not mine:
            return False
        self.replaced = without_dead(found)
        self.original = self.module.forward if self.replaced is None else self.replaced
        return True

    @property
    def heard(self) -> bool:
        """Whether any call was captured."""
        return any(self._sites)

    @property
    def called(self) -> bool:
        """Whether there was any call, wanted or not."""
        return bool(self._sites or self.elsewhere)

    def _new_call(self) -> Call | None:
        """The sides of a call later in the step than any before; None when it is not wanted."""
        call = len(self._sites)
        if self._wanted == "all" or call in self._wanted:
            self._sites.append(Call(self.name, call, self._directory(self.name, call)))
        else:
            self._sites.append(None)
        return self._sites[call]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's ``forward``."""
        if _is_compiling():
            return self.original(*args, **kwargs)
        hearing = self._hearing
        if _get_ident() != hearing.owner:
            # Seldom, so that it costs nothing to look whether a step is in progress.
            self.elsewhere += bool(hearing.owner)
            return self.original(*args, **kwargs)
        call = self.count
        self.count = call + 1
        sides = self._sites[call] if call < len(self._sites) else self._new_call()
        if sides is None:
            return self.original(*args, **kwargs)
        collector = self._collector
        collector.inputs(sides, args, kwargs)
        try:
            output = self.original(*args, **kwargs)
        except BaseException as error:
            if hearing.owner:
                self._raised(sides, error, args, kwargs)
            raise
        # The step may have ended inside the call.
        if hearing.owner and not (
            (_global_hooks or self.own["_forward_hooks"]) and self._hear_behind_hooks(sides, args, kwargs)
        ):
            collector.outputs(sides, output)
            if self._post:
                collector.post_fwd_inputs(sides, args, kwargs)
        return output

    def _raised(
        self, sides: Call, error: BaseException, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._collector.raised(sides, error)
        if self._post:
            self._collector.post_fwd_inputs(sides, args, kwargs)

    def _hear_behind_hooks(self, sides: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether hooks come now, which may change the result; if so it is captured behind the last one.

        Our hook is there only from the moment when ``forward`` has returned, so that no code of the model
        sees it, and whatever was registered until then comes before it.
        """
        module = self.module
        if isinstance(module, torch.jit.ScriptModule):
            return False
        if not hooks_follow(sys._getframe(2), module, Listener.__call__.__code__):
            return False
        heard = False

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal heard
            if heard:
                return
            heard = True
            error = raised_through(sys._getframe(1))
            if error is None:
                # Not while PyTorch walks through the very dictionary, as it does after an error.
                self.handles.remove(handle)
                handle.remove()
            if not self._hearing.owner:
                return
            if error is not None:
                self._raised(sides, error, args, kwargs)
                return
            self._collector.outputs(sides, output)
            if self._post:
                self._collector.post_fwd_inputs(sides, args, kwargs)

        handle = module.register_forward_hook(after, always_call=True)
        self.handles.append(handle)
        return True

    def take_away(self) -> bool:
        """Leave the module as it was. False, and dead, where somebody else's lies in our place meanwhile."""
        while self.handles:
            self.handles.pop().remove()
        return super().take_away()


_DEAF = Hearing()


class Source(Protocol):
    """Captures some modules in another way than by listening to their ``forward``."""

    @property
    def modules(self) -> Container[nn.Module]:
        """Those that it captures; nobody else listens to them."""
        ...

    def begin_step(self, collector: Collector) -> None:
        """Fill the collector from now on."""
        ...

    def end_step(self) -> str | None:
        """Add what is still missing, and say what went wrong, if anything."""
        ...


# Makes the listener of a module, None where it is not to be heard; given the names of all modules, too.
Select = Callable[[Named, frozenset[str], Hearing], "Listener | None"]
# Under which names a module goes, where these are not its own; None where it is to be left out.
Rename = Callable[[Named], "Named | None"]


class ListenerSet:
    """All listeners of one model, there while a selected step runs and gone after it.

    Between steps anybody may change the model: modules and what stands for their ``forward`` are looked at
    anew before each step.
    """

    def __init__(self, model: nn.Module, select: Select, rename: Rename | None = None) -> None:
        self.model = model
        self._select = select
        self._rename = rename
        self._hearing = Hearing()
        self._room = StackRoom()
        self._installed = False
        self._listeners: list[Listener] = []
        self._heard: dict[str, bool] = {}
        self._called: dict[str, bool] = {}
        # The names of each module that was ever listened to, by its first one.
        self.names: dict[str, tuple[str, ...]] = {}
        # Modules whose forward others replaced while it was listened to.
        self.replaced_within: dict[str, None] = {}
        self._classes: set[type] = set()
        self._tree = ModuleTree(model)
        self._plan()

    def _plan(self) -> None:
        """Listeners for the modules that the model has now."""
        self._note_heard()
        classes = self._tree.classes
        keep_out_of_copies(classes)
        forget(self._classes)
        self._classes = classes
        modules = self.named(self._tree)
        names = frozenset(each.name for each in modules)
        made = [(each, self._select(each, names, self._hearing)) for each in modules]
        self._listeners = [listener for _, listener in made if listener is not None]
        for each, listener in made:
            if listener is not None:
                self.names[each.name] = each.names

    def _note_heard(self) -> None:
        for each in self._listeners:
            self._heard[each.name] = self._heard.get(each.name, False) or each.heard
            self._called[each.name] = self._called.get(each.name, False) or each.called

    def __len__(self) -> int:
        return len(self._listeners)

    def named(self, tree: ModuleTree) -> list[Named]:
        """The model's modules by the names under which they go here."""
        if self._rename is None:
            return tree.modules
        return [named for named in map(self._rename, tree.modules) if named is not None]

    @property
    def tree(self) -> ModuleTree:
        """The model's modules, as they were at the last look."""
        return self._tree

    @property
    def elsewhere(self) -> dict[str, int]:
        """How many calls of which module the step had in threads other than its own."""
        return {each.name: each.elsewhere for each in self._listeners if each.elsewhere}

    @property
    def heard(self) -> dict[str, bool]:
        """Of each module ever listened to, whether any call was captured."""
        self._note_heard()
        return dict(self._heard)

    @property
    def called(self) -> dict[str, bool]:
        """Of each module ever listened to, whether a captured step called it."""
        self._note_heard()
        return dict(self._called)

    def look(self) -> bool:
        """Whether the model has other modules than at the last look; then there are listeners for those."""
        if self._tree.is_as_it_was():
            return False
        self._tree = ModuleTree(self.model)
        self._plan()
        return True

    def install(self) -> None:
        """Look at the model, and listen."""
        self.remove()
        self.look()
        self._installed = True
        listeners = self._listeners
        for index, each in enumerate(listeners):
            own = each.own
            found = own.get(FORWARD)
            if (found is not each.replaced or each.dead) and not each.follow(found):
                each = listeners[index] = each.successor()
            own[FORWARD] = each
            each.count = each.elsewhere = 0
        self._room.take(self._tree.depth)
        self._hearing.owner = _get_ident()

    def resume(self) -> None:
        """Go on listening in a step after a rest; calls are counted on."""
        self._hearing.owner = _get_ident()

    def rest(self) -> None:
        """Pass over calls until `resume`."""
        self._hearing.owner = _NOBODY

    def remove(self) -> None:
        """Take every listener away."""
        self._hearing.owner = _NOBODY
        if not self._installed:
            return
        self._installed = False
        self._room.give_back()
        for each in self._listeners:
            own = each.own
            if each.replaced is None and own.get(FORWARD) is each and not each.handles:
                # As nearly all are, and there may be a thousand.
                del own[FORWARD]
            elif not each.take_away():
                self.replaced_within[each.name] = None

    def close(self) -> None:
        """Take every listener away, for good."""
        self.remove()
        forget(self._classes)
        self._classes = set()
