"""The C extension; each function is described at its Python twin."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from typing_extensions import Buffer

INTERFACE: int
SOURCES: str

def use_xxh3(address: int, /) -> None: ...
def use_xxh3_pieces(create: int, free: int, reset: int, update: int, digest: int, /) -> None: ...
def digest_in_pieces(parts: tuple[bytes, ...], /) -> bytes: ...
def hex_digests(buffers: Sequence[Buffer], /) -> list[str]: ...
def gather(target: Buffer, offsets: Sequence[int], parts: Sequence[Buffer], /) -> None: ...
def write_all(handle: int, parts: Sequence[Buffer], /) -> int: ...
def read_files(
    target: Buffer, directory: str, names: Sequence[str], sizes: Sequence[int], /
) -> list[int]: ...
def hash_ranges(handle: int, ranges: Buffer, scratch: Buffer, /) -> bytes: ...
def read_texts(directory: str, names: Sequence[str], most: int, /) -> list[bytes | None]: ...
def hash_payloads(
    directory: str, names: Sequence[str], spans: Buffer, kept: Buffer, /
) -> tuple[list[int], bytes]: ...
def identities(paths: Sequence[str], /) -> list[tuple[int, int, int, int] | None]: ...
def learn(
    tensor: type, exchange: Any, plain: tuple[torch.Tensor, ...], odd: tuple[torch.Tensor, ...], /
) -> bool: ...
def is_plain(tensor: object, /) -> bool: ...

class Memory:
    address: int
    size: int
    bytes: int

class Walker:
    def __init__(
        self,
        tensor: Callable[[torch.Tensor], object],
        other: Callable[[Any, tuple[int, ...]], Hashable],
    ) -> None: ...
    def use(
        self,
        sides: list[Any],
        specs: list[Any],
        memories: list[Any],
        offsets: list[int],
        scalars: list[Any],
        /,
    ) -> None: ...
    def arguments(
        self, sides: dict[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> tuple[Hashable, Hashable] | None: ...
    def result(self, sides: dict[Any, Any], value: object, /) -> Hashable: ...
    def fill(self, memory: Memory | None, /) -> None: ...
    def know(self, tensor: torch.Tensor, spec: object, nbytes: int, /) -> None: ...
    def forget(self) -> None: ...
    def flatten(self, value: object, /) -> Hashable: ...
    def watch(self, full: list[Any], /) -> None: ...
    leaving: bool

class Hearing:
    owner: int

class KnownSides:
    inputs: dict[Any, Any]
    outputs: dict[Any, Any]

class Listening:
    count: int
    elsewhere: int
    running: int
    covered: bool
    dead: bool
    def __init__(
        self,
        walker: Walker,
        collector: Any,
        hearing: Hearing,
        own: dict[str, Any],
        sites: list[Any],
        handles: list[Any],
        post: bool,
    ) -> None: ...
    def aim(self, original: Callable[..., Any], replaced: Any, /) -> None: ...
    def deafen(self, hearing: Hearing, /) -> None: ...
    def hear(self, listener: Any, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any: ...

def use_torch(
    hooks: dict[Any, Any],
    backward: Callable[[], int],
    tracing: Callable[[], bool],
    modes: Callable[[], int],
    flags: dict[str, Any],
    flag: str,
    /,
) -> None: ...
def put_all(listeners: list[Any], all_of_them: list[Listening], begin: int, /) -> int: ...
def take_all(listeners: list[Any], all_of_them: list[Listening], begin: int, /) -> int: ...
