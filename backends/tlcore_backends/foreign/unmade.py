"""What a pickle refers to and asks for, which is never made; and what stands for such a thing as a key."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# Values and characters of a key that is shown as it is.
_LARGEST_KEY = 256


class Name(NamedTuple):
    """A name that the pickle refers to; it stays a name."""

    text: str


class StorageOf(NamedTuple):
    """A reference to bytes outside the pickle, as torch makes for a storage."""

    reference: Any


class Made:
    """An object that the pickle asks for and that is never made: what it would be made of."""

    __slots__ = ("arguments", "function", "items", "state")

    def __init__(self, function: Any, arguments: Any) -> None:
        self.function = function
        self.arguments = arguments
        self.items: list[tuple[Any, Any]] = []
        self.state: Any = None

    def __repr__(self) -> str:
        """As a key: the same in each reading. Bytes are pickled as their text in Latin 1."""
        text = self.arguments[0] if isinstance(self.arguments, tuple) and self.arguments else None
        if isinstance(self.function, Name) and self.function.text == "_codecs encode":
            return str(text) if isinstance(text, str) else "<bytes>"
        return f"<{name_of(self.function)}>"


def name_of(value: Any) -> str:
    """The name of a class or function, without its module."""
    return value.text.rpartition(" ")[2] if isinstance(value, Name) else type(value).__name__


def holds_storage(value: Any, known: set[int] | None = None) -> bool:
    """Whether a storage is anywhere in what an object would be made of, but in those of ``known`` ids."""
    return any(
        isinstance(each, StorageOf) for each in _objects_in([value], set() if known is None else known)
    )


def holds_all(made: Made) -> bool:
    """Whether the items of an object are all that it has of storages; attributes may name them once more."""
    seen = set[int]()
    deque(_objects_in([item for pair in made.items for item in pair], seen), 0)
    return not holds_storage((made.arguments, made.state), seen)


def _objects_in(values: list[Any], seen: set[int]) -> Iterator[Any]:
    """All objects in values whose ids are not ``seen``, which they are then."""
    waiting = values
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        if isinstance(each, Made):
            waiting += [each.arguments, each.state, *(part for pair in each.items for part in pair)]
        elif isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, (list, tuple)) and not isinstance(each, StorageOf):
            waiting += each


def free_key(key: Any, taken: Mapping[Any, Any]) -> str:
    """The text of a key, with a number behind it where others have it; of many of these few are looked at."""
    text, below, above = _text_of(key), 0, 1

    def numbered(number: int) -> str:
        return text if number == 1 else f"{text}~{number}"

    while numbered(above) in taken:
        below, above = above, 2 * above
    while above - below > 1:
        middle = (above + below) // 2
        below, above = (middle, above) if numbered(middle) in taken else (below, middle)
    return numbered(above)


def _text_of(key: Any) -> str:
    """A key as text; of a large one, parts of which may come again and again, only what it is."""
    waiting, size = [key], 0
    while waiting:
        each = waiting.pop()
        size += len(each) if isinstance(each, (str, bytes, bytearray, list, tuple, dict)) else 1
        if size > _LARGEST_KEY:
            return f"<{name_of(key.function if isinstance(key, Made) else key)}>"
        if isinstance(each, Made):
            waiting.append(each.arguments)
        elif isinstance(each, dict):
            waiting += [*each, *each.values()]
        elif isinstance(each, (list, tuple)):
            waiting += each
    return repr(key)
