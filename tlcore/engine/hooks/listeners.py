"""All listeners of a model: there while a selected step runs, whatever others do to the model meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from operator import attrgetter

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ...hotpath.intercept import FORWARD, StandIn, forget, keep_out_of_copies, lies_in
from ...hotpath.listening import Hearing, Listening, put_all, take_all
from ...layout.names import misread
from .counting import CallCounter, Counts
from .keeping import Keeper
from .listening import NOBODY, Listener, Rename, Select
from .module_tree import ModuleTree, Named
from .stack_room import StackRoom

_get_ident = threading.get_ident
_elsewhere = attrgetter("elsewhere")


class ListenerSet:
    """All listeners of one model, there while a selected step runs and gone after it.

    Between steps anybody may change the model: modules and what stands for their ``forward`` are looked at
    anew before each step. Where the model ``may_change_within`` a step, modules that come into it there are
    heard, too, and in steps that are more than a call of the model a ``forward`` that is replaced. Of modules
    for which nobody listens, calls are counted where ``counts`` says so. ``tree`` are the model's modules, as
    they were at the last look.
    """

    def __init__(
        self,
        model: nn.Module,
        select: Select,
        rename: Rename | None = None,
        may_change_within: bool = False,
        counts: Callable[[Named], bool] = lambda each: False,
    ) -> None:
        self.model = model
        self._select = select
        self._rename = rename
        self._renamed: tuple[ModuleTree, list[Named]] | None = None
        self._looks_within = may_change_within
        self._keepers: list[Keeper] = []
        # Where in the list of listeners a module's is, by its identity.
        self._places: dict[int, int] = {}
        self._known: dict[int, Named] = {}
        self._counts = counts
        # Of modules that are not captured themselves: to tell in which call a tap is.
        self._counting: dict[int, CallCounter] = {}
        arrivals = register_module_module_registration_hook(self._arrives)
        # Where torch looks when a module gets a part, and under which number this is there in a step.
        self._arrival_hooks: dict[int, object] = arrivals.hooks_dict_ref() or {}
        self._arrivals = arrivals.id
        arrivals.remove()
        self._arrived = False
        self._keeping = False
        self._hearing = Hearing()
        self._room = StackRoom()
        self._installed = False
        self._listeners: list[Listener] = []
        # What each of them does for a call.
        self._listening: list[Listening] = []
        self._heard: dict[str, bool] = {}
        self._called: dict[str, bool] = {}
        # The names of each module that was ever listened to, by its first one.
        self.names: dict[str, tuple[str, ...]] = {}
        # Modules whose forward others replaced while it was listened to.
        self.replaced_within: dict[str, None] = {}
        # The modules of which a directory tells another, by that.
        self.misread: dict[str, str] = {}
        self._classes: set[type] = set()
        self.tree = ModuleTree(model)
        self._plan()

    def _plan(self) -> None:
        """Listeners for the modules that the model has now."""
        self._note_heard()
        classes = self.tree.classes
        keep_out_of_copies(classes)
        forget(self._classes)
        self._classes = classes
        modules = self.named(self.tree)
        names = frozenset(each.name for each in modules)
        made = [(each, self._select(each, names, self._hearing)) for each in modules]
        self._listeners = [listener for _, listener in made if listener is not None]
        self._listening = [each.listening for each in self._listeners]
        self._places = {id(each.module): place for place, each in enumerate(self._listeners)}
        self._known = {id(each.module): each for each in modules}
        if self._looks_within:
            self._keepers = [Keeper(each.module, self._refit) for each in self._listeners]
        before = self._counting
        self._counting = {
            id(each.module): before.get(id(each.module)) or self._counter(each)
            for each, listener in made
            if listener is None and (id(each.module) in before or self._counts(each))
        }
        for each, listener in made:
            if listener is not None:
                self.names[each.name] = each.names
        selected = {each.name for each, listener in made if listener is not None}
        self.misread = misread(
            selected | {each.name for each, _ in made if id(each.module) in self._counting}
        )

    def _counter(self, each: Named) -> CallCounter:
        return CallCounter(each.name, each.module, self._hearing)

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
        if self._renamed is None or self._renamed[0] is not tree:
            self._renamed = tree, self._rename(tree)
        return self._renamed[1]

    @property
    def elsewhere(self) -> dict[str, int]:
        """How many calls of which module the step had in threads other than its own."""
        if not any(map(_elsewhere, self._listening)):
            return {}
        calls = ((each.name, each.listening.elsewhere) for each in self._listeners)
        return {name: count for name, count in calls if count}

    def counts(self) -> dict[str, int]:
        """How often which module has been called in the step so far."""
        calls = ((each.name, each.listening.count) for each in self._listeners)
        return {name: count for name, count in calls if count}

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
        if self.tree.is_as_it_was() and not self._arrived:
            return False
        self._arrived = False
        self.tree = ModuleTree(self.model)
        self._plan()
        return True

    def install(self, more_than_a_call: bool = False) -> None:
        """Look at the model, and listen; the step may be ``more_than_a_call`` of the model."""
        if self._installed:
            self.remove()
        self.look()
        self._installed = True
        self._put_them()
        for key, counter in self._counting.items():
            self._counting[key] = counter.again()
        self._keeping = more_than_a_call and self._looks_within
        if self._keeping:
            for keeper, each in zip(self._keepers, self._listeners, strict=True):
                keeper.keep(each)
        if self._looks_within:
            self._arrival_hooks[self._arrivals] = self._arrives
        self._room.take(self.tree.depth)
        self._hearing.owner = _get_ident()

    def _put_them(self) -> None:
        """Let every listener stand in, around what is there now."""
        listeners, listening = self._listeners, self._listening
        index = put_all(listeners, listening, 0)
        while index < len(listeners):
            each = listeners[index]
            if not each.follow(each.own.get(FORWARD)):
                each = listeners[index] = each.successor()
                listening[index] = each.listening
            each.own[FORWARD] = each
            each.listening.count = each.listening.elsewhere = 0
            index = put_all(listeners, listening, index + 1)

    def _refit(self, module: nn.Module, new_class: bool) -> None:
        """Listen to what others have put in the place of a module's ``forward`` or class within the step."""
        place = self._places[id(module)]
        old = self._listeners[place]
        if _get_ident() != self._hearing.owner and not new_class:
            return
        if new_class:
            # What it stands for is the other class's, and may not even take the module.
            StandIn.take_away(old)
        elif lies_in(old.own.get(FORWARD), old):
            return
        self._put(place, old.successor())

    def _put(self, place: int, listener: Listener) -> None:
        self._listeners[place] = listener
        self._listening[place] = listener.listening
        listener.own[FORWARD] = listener
        self._keepers[place].listener = listener

    def _arrives(self, parent: nn.Module, key: str, part: nn.Module | None) -> None:
        """Listen to the modules of a part that comes into the model within the step."""
        above = self._known.get(id(parent))
        if above is None or above.module is not parent or part is None or _get_ident() != self._hearing.owner:
            return
        top = f"{above.name}.{key}" if above.name else key
        self._arrived = True
        came = [Named(f"{top}.{each.name}".rstrip("."), each.module, ()) for each in ModuleTree(part).modules]
        taken = {each.name for each in came if id(each.module) not in self._known}
        for each in came:
            known, place = self._known.get(id(each.module)), self._places.get(id(each.module))
            # One that was here before keeps its name, unless another has that now.
            if known is None or known.name in taken or (place is not None and self._listeners[place].dead):
                self._listen(each)

    def _listen(self, each: Named) -> None:
        """Listen to one more module within the step, in the place of whatever had its name."""
        key, cls = id(each.module), type(each.module)
        self._known[key] = each
        place = self._places.get(key)
        if place is not None:
            old = self._listeners[place]
            # Only its place: a call of the module may be on its way.
            StandIn.take_away(old)
            old.retire()
        names = frozenset(named.name for named in self._known.values())
        made = self._select(each, names, self._hearing)
        if made is None:
            return
        for other in self._listeners:
            if other.name == made.name:
                made.goes_on_from(other)
        if cls not in self._classes:
            keep_out_of_copies({cls})
            self._classes = self._classes | {cls}
        self.names[each.name] = each.names
        self.misread = misread(self.names.keys() | self.misread.values())
        if place is None:
            place = self._places[key] = len(self._listeners)
            self._listeners.append(made)
            self._listening.append(made.listening)
            self._keepers.append(Keeper(each.module, self._refit))
            if self._keeping:
                self._keepers[place].keep(made)
        self._put(place, made)

    @property
    def owner(self) -> int:
        """The thread whose calls are heard now; 0 for none."""
        return self._hearing.owner

    @property
    def hearing(self) -> Hearing:
        """Whose calls are heard now."""
        return self._hearing

    @property
    def known(self) -> Mapping[int, Named]:
        """The modules by their identity, those that came into the model within the step, too."""
        return self._known

    def counter(self, each: Named) -> Counts:
        """Who listens to a module in the step that runs, or at least counts its calls from now on."""
        key = id(each.module)
        place = self._places.get(key)
        if place is not None:
            return self._listeners[place]
        found = self._counting.get(key)
        if found is None:
            found = self._counting[key] = self._counter(each)
            # The call that shows the first tap is the first one that is known of.
            found.count, found.running = 1, 0
            if self._installed:
                found.put()
        return found

    def resume(self) -> None:
        """Go on listening in a step after a rest; calls are counted on."""
        self._hearing.owner = _get_ident()

    def rest(self) -> None:
        """Pass over calls until `resume`."""
        self._hearing.owner = NOBODY

    def remove(self) -> None:
        """Take every listener away."""
        self._hearing.owner = NOBODY
        if not self._installed:
            return
        self._installed = False
        self._arrival_hooks.pop(self._arrivals, None)
        if self._keeping:
            self._keepers = [keeper.leave() for keeper in self._keepers]
        self._take_them()
        for counter in self._counting.values():
            counter.take_away()

    def _take_them(self) -> None:
        """Take every listener away until the next step."""
        listeners = self._listeners
        index = take_all(listeners, self._listening, 0)
        while index < len(listeners):
            each = listeners[index]
            covered, each.listening.covered = each.listening.covered, False
            if not each.take_away() or covered:
                self.replaced_within[each.name] = None
            index = take_all(listeners, self._listening, index + 1)

    def close(self) -> None:
        """Take every listener away, for good."""
        self.remove()
        self._room.give_back()
        forget(self._classes)
        self._classes = set()
