"""Whose rows a step keeps, and which of them: what the configuration says, and the requests themselves."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from ...layout.names import ROOT_DIR
from ...layout.windows import Window

_SEVERAL = re.compile(r"\*{2,}")
Chooses = Callable[[str], bool]
_NOBODY: frozenset[str] = frozenset()


class ModuleNames:
    """Names of modules, in which ``*`` stands for any characters; found in time that grows with the name."""

    def __init__(self, names: Collection[str]) -> None:
        self._plain = frozenset(name for name in names if "*" not in name)
        # One * stands for what several in a row do, in less time.
        self._parts = [_SEVERAL.sub("*", name).split("*") for name in names if "*" in name]
        self._known: dict[str, bool] = {}

    def __contains__(self, module: str) -> bool:
        found = self._known.get(module)
        if found is None:
            name = module or ROOT_DIR
            found = name in self._plain or any(_fits(parts, name) for parts in self._parts)
            self._known[module] = found
        return found


def _fits(parts: list[str], name: str) -> bool:
    """Whether a name consists of these parts, in this order, with anything between them."""
    first, *inner, last = parts
    if not (name.startswith(first) and name.endswith(last) and len(name) >= len(first) + len(last)):
        return False
    at, end = len(first), len(name) - len(last)
    for part in inner:
        place = name.find(part, at, end)
        if place < 0:
            return False
        at = place + len(part)
    return True


class Choice(NamedTuple):
    """What a request chooses of itself: nothing at all, or of which modules and positions.

    One that is ``enabled`` is captured in every step, selected or not.
    """

    enabled: bool
    modules: ModuleNames | None = None
    window: Window | None = None
    last: bool = False


class Choosing:
    """Which rows of a step's requests are kept.

    ``chooses`` says it of a request's id (None: each is kept), ``last`` keeps of each request only the row of
    its last token, ``window`` only those of some positions. Requests with ``choices`` of their own say
    themselves; where they are the ``only`` ones, no other is kept. ``requests`` are all of the step.
    """

    def __init__(
        self,
        chooses: Chooses | None = None,
        last: bool = False,
        window: Window | None = None,
        choices: Mapping[str, Choice] | None = None,
        only: bool = False,
        requests: Collection[str] = (),
    ) -> None:
        self._base = chooses
        self._last = last
        self._window = None if window == Window() else window
        self._choices = choices or {}
        self.only = only
        self._narrow = {
            request: choice.modules
            for request, choice in self._choices.items()
            if choice.enabled and choice.modules is not None
        }
        self._others = any(self.keeps(each) for each in requests if each not in self._narrow)
        self._left_out: dict[str, frozenset[str]] = {}
        # None where every request is kept.
        self.chooses: Chooses | None = (
            None if chooses is None and not self._choices and not only else self.keeps
        )

    def of_step(self, requests: Collection[str], choices: Mapping[str, Choice], selected: bool) -> Choosing:
        """The same for a step, ``selected`` or not, in which some requests choose for themselves."""
        if selected and not choices:
            return self
        return Choosing(self._base, self._last, self._window, choices, not selected, requests)

    @property
    def cuts(self) -> bool:
        """Whether any rows may be left out."""
        return self.chooses is not None or self._last or self._window is not None

    @property
    def asked(self) -> bool:
        """Whether any request of the step asks to be captured."""
        return any(choice.enabled for choice in self._choices.values())

    @property
    def any_window(self) -> bool:
        """Whether of some request only some positions are kept."""
        return self._window is not None or any(each.window is not None for each in self._choices.values())

    def keeps(self, request: str) -> bool:
        """Whether any row of a request is kept."""
        choice = self._choices.get(request)
        if choice is not None:
            return choice.enabled
        return not self.only and (self._base is None or self._base(request))

    def lasts(self, request: str) -> bool:
        """Whether only a request's last row is kept."""
        choice = self._choices.get(request)
        return self._last or (choice is not None and choice.last)

    def only_sure(self, request: str) -> bool:
        """Whether of a request's rows only those are kept whose tokens stay in it."""
        choice = self._choices.get(request)
        windows = self._window, None if choice is None else choice.window
        return self.lasts(request) or any(each is not None for each in windows)

    def part(
        self, request: str, first: int | None, length: int, prompt: int | None
    ) -> tuple[int, int] | None:
        """Those that are kept of a request's rows from position ``first`` on, as `Window.part` has them."""
        choice = self._choices.get(request)
        skipped = 0
        for window in (self._window, None if choice is None else choice.window):
            if window is None:
                continue
            found = window.part(None if first is None else first + skipped, length, prompt)
            if found is None:
                return None
            skipped, length = skipped + found[0], found[1]
        return skipped, length

    def left_out(self, module: str) -> frozenset[str]:
        """The requests that have chosen other modules."""
        if not self._narrow:
            return _NOBODY
        found = self._left_out.get(module)
        if found is None:
            found = frozenset(each for each, modules in self._narrow.items() if module not in modules)
            self._left_out[module] = found
        return found

    def hears(self, module: str) -> bool:
        """Whether any row of a module's tensors may be kept."""
        return not self._narrow or self._others or len(self.left_out(module)) < len(self._narrow)
