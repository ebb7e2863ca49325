"""How the reader reaches a run's files: every access to stored bytes goes through `RunFiles`."""

from __future__ import annotations

import difflib
import importlib
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import torch

from ..errors import BackendError, ReadError
from ..layout.names import is_url
from ..protocols import Store
from ..record import Json
from .documents import LARGEST_JSON, check_step, check_structure, parse, too_large
from .pt_file import PtError, decode
from .slices import Slice

RUN_FILE = "run.json"
_LOCAL_STORE = ("tlcore_backends.storage.local", "LocalStore")
_ANY_STORE = ("tlcore_backends.storage.open", "open_store")
_STRUCTURE = re.compile(
    r"(step_\d+)/(.+/(?:inputs|outputs|post_fwd_inputs)(_rank_[1-9]\d*)?\.json)", re.DOTALL
)
_LEAVES_THE_RUN = re.compile(r"(?:^|/)\.{0,2}(?:/|\Z)|\0")
# What a .pt file holds beside its payload is far less.
_LARGEST_FRAME = 1 << 20
# Those of a step that many ranks wrote are needed together.
_MOST_DOCUMENTS = 64
_REMOTE_THREADS = 8
# Looking for a name that was meant takes long among very many.
_MOST_COMPARED, _LONGEST_NAME = 5000, 500


class MissingError(ReadError, KeyError):
    """A run, step, call, tensor or file that is not there; also a KeyError, as mappings promise."""

    def __str__(self) -> str:
        # KeyError would show the message in quotes, with its line ends escaped.
        return str(self.args[0])


def missing(what: str, name: object, where: str, known: Iterable[str]) -> MissingError:
    """The error for a name that is not there, with the nearest ones that are."""
    few = list(islice(known, _MOST_COMPARED))
    near = difflib.get_close_matches(str(name)[:_LONGEST_NAME], few, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return MissingError(f"{where}: no {what} {str(name)!r}{hint}")


def local_directory(path: str | os.PathLike[str]) -> Path | None:
    """``path`` (or ``file://`` URL) as a directory of this machine; None for any other URL.

    Raises ReadError for a file, or nothing there.
    """
    text = os.fspath(path)
    if is_url(text):
        parts = urlsplit(text)
        if parts.scheme.lower() not in ("file", "local") or parts.netloc:
            return None
        directory = Path(unquote(parts.path))
    else:
        directory = Path(text).expanduser()
    if not directory.exists():
        raise MissingError(f"{text}: there is no such directory")
    if not directory.is_dir():
        raise ReadError(f"{text}: is a file; give the run's directory")
    return directory


class RunFiles:
    """The files of one run: its listing, JSON, and tensors. Names are relative to the run.

    ``below`` is the run's directory in the store, ending in ``/``, where the store's root is its parent.
    """

    def __init__(self, store: Store, below: str = "") -> None:
        self.store = store
        self._below = below
        self._documents: OrderedDict[str, Json] = OrderedDict()
        self._listed: dict[str, Mapping[str, int]] = {}

    @property
    def url(self) -> str:
        """Where the run lies, for messages."""
        return f"{self.store.url}/{self._below}".rstrip("/") if self._below else self.store.url

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Every finished file and its size in bytes, as they were at first use."""
        return self._listing("")

    def sizes_in(self, directory: str) -> Mapping[str, int]:
        """The finished files below a directory such as ``step_0``, and perhaps others, and their sizes.

        Only this directory is listed, so that one step of a long run costs no more than of a short one.
        """
        if "sizes" in self.__dict__:
            return self.sizes
        if directory not in self._listed:
            self._listed[directory] = self._listing(f"{directory}/")
        return self._listed[directory]

    def size(self, name: str) -> int | None:
        """A finished file's size in bytes, None for a missing one; `sizes_in` says what this costs."""
        return self._near(name).get(name)

    def _near(self, name: str) -> Mapping[str, int]:
        directory, slash, _ = name.partition("/")
        return self.sizes_in(directory) if slash else self.sizes

    def _listing(self, prefix: str) -> Mapping[str, int]:
        skip = len(self._below)
        try:
            found = {entry.name[skip:]: entry.size for entry in self.store.list(self._below + prefix)}
        except (BackendError, OSError) as error:
            raise ReadError(str(error)) from error
        if bad := next(filter(_LEAVES_THE_RUN.search, found), None):
            raise ReadError(f"{self.url}: holds {bad!r}, a name that leads out of it")
        return found

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes ``[start, end)`` of a file, all of it by default.

        Raises MissingError or ReadError, also for a name that leaves the run.
        """
        try:
            return self.store.get(self._below + name, start, end)
        except FileNotFoundError:
            raise missing("file", name, self.url, self._near(name)) from None
        except (BackendError, OSError) as error:
            raise ReadError(str(error)) from error
        except (MemoryError, OverflowError):
            raise ReadError(f"{self.url}/{name}: larger than this machine's memory") from None

    @property
    def is_local(self) -> bool:
        """Whether the run lies on a disk of this machine."""
        return hasattr(self.store, "identity")

    def identity(self, name: str) -> Any:
        """Equal for two names of one stored file, None where a store has no such names or it is missing."""
        identity = getattr(self.store, "identity", None)
        return None if identity is None else identity(self._below + name)

    def open(self, name: str) -> BinaryIO | None:
        """A local file, to be read piece by piece; None where the run's store only serves ranges.

        Raises as `read` does.
        """
        opener = getattr(self.store, "open_file", None)
        if opener is None:
            return None
        try:
            file: BinaryIO = opener(self._below + name)
        except FileNotFoundError:
            raise missing("file", name, self.url, self._near(name)) from None
        except (BackendError, OSError) as error:
            raise ReadError(str(error)) from error
        return file

    def advise(self, record: Mapping[str, Any]) -> None:
        """Tell the system that a record's bytes on a local disk will be read soon."""
        offsets = record.get("offsets") or (0, 0)
        name = record.get("file") or record.get("shard")
        try:
            file = self.open(str(name))
            if file is not None:
                with file:
                    begin, end = offsets
                    os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)
        except (ReadError, OSError, TypeError, ValueError, OverflowError):
            # Whoever reads it reports what is wrong.
            return

    def holds(self, name: str) -> bool:
        """Whether the run has a file of this name, or a structure packed into its step's ``step.json``."""
        return self.size(name) is not None or self._packed(name) is not None

    def json(self, name: str) -> Any:
        """A JSON file's value, also of one that is packed. Raises ReadError when it is not JSON."""
        packed = self._packed(name)
        if packed is not None:
            return packed
        # Where the listing is not known yet, finding out costs more than reading.
        if "sizes" in self.__dict__ and self.sizes.get(name, 0) > LARGEST_JSON:
            raise too_large(f"{self.url}/{name}")
        return parse(self.read(name, 0, LARGEST_JSON + 1), f"{self.url}/{name}")

    def structure(self, name: str) -> Json:
        """A tensor structure, checked. Raises MissingError or ReadError."""
        return check_structure(self.json(name), f"{self.url}/{name}")

    def structures(self, names: Sequence[str]) -> list[Json]:
        """Tensor structures, checked, in order. Raises as `structure`."""
        if self.is_local or not names or self._packed(names[0]) is not None:
            return [self.structure(name) for name in names]
        with ThreadPoolExecutor(_REMOTE_THREADS, "tlcore-read") as pool:
            return list(pool.map(self.structure, names))

    def step_document(self, name: str) -> Json:
        """A ``step.json``; the last few are kept. Raises ReadError when it is missing or damaged."""
        if name not in self._documents:
            number = int(name.partition("/")[0].removeprefix("step_"))
            self._documents[name] = check_step(self.json(name), f"{self.url}/{name}", number)
            if len(self._documents) > _MOST_DOCUMENTS:
                self._documents.popitem(last=False)
        return self._documents[name]

    def _packed(self, name: str) -> Any:
        """A structure that its step's ``step.json`` holds; None where it does not."""
        match = _STRUCTURE.fullmatch(name)
        if match is None or self.size(name) is not None:
            return None
        step_file = f"{match[1]}/step{match[3] or ''}.json"
        if self.size(step_file) is None:
            return None
        return self.step_document(step_file).get("structures", {}).get(match[2])

    def stored(self, record: Mapping[str, Any]) -> torch.Tensor:
        """The tensor of a record of ``step.json``, from its file or, by one ranged read, from its shard."""
        if isinstance(record.get("file"), str):
            return self.tensor(record["file"], record)
        where = f"{self.url}: {record.get('name')!r}"
        place = Slice.of(record, where)
        size = self.size(place.shard)
        if size is not None and place.end > size:
            raise ReadError(f"{where}: {place.shard} ends too early, it has {size} bytes")
        return place.tensor(self.read(place.shard, place.begin, place.end), where)

    def tensor(self, file: str, record: Mapping[str, Any] | None = None) -> torch.Tensor:
        """The tensor of a ``.pt`` file, on the CPU; nothing is unpickled.

        Raises ReadError when it is damaged or differs from its ``record`` in dtype or shape.
        """
        where = f"{self.url}/{file}"
        if record is not None and (self.size(file) or 0) > record["bytes"] + _LARGEST_FRAME:
            raise ReadError(f"{where}: far larger than the {record['bytes']} bytes that step.json says")
        try:
            loaded = decode(self.read(file))
        except PtError as error:
            raise ReadError(f"{where}: not a readable .pt file ({error})") from None
        except MemoryError:
            raise ReadError(f"{where}: larger than this machine's memory") from None
        if record is not None:
            found = (str(loaded.dtype).removeprefix("torch."), list(loaded.shape))
            stated = (record.get("dtype"), record.get("shape"))
            if found != stated:
                raise ReadError(f"{where}: holds {found}, its step.json says {stated}")
        return loaded


def store_at(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Store:
    """The store of a local directory or URL; ``storage_options`` go to the URL's fsspec filesystem.

    Raises ReadError when there is no such directory, BackendError when the URL cannot be opened.
    """
    directory = local_directory(path)
    # Looked up by name, since the engine never imports a backend.
    module, attribute = _ANY_STORE if directory is None else _LOCAL_STORE
    factory = getattr(importlib.import_module(module), attribute)
    store: Store = (
        factory(os.fspath(path), storage_options)
        if directory is None
        else factory(os.path.realpath(directory))
    )
    return store


def payload(tensor: torch.Tensor) -> memoryview:
    """The C-contiguous bytes of a CPU tensor, as a record holds them."""
    if tensor.numel() == 0:
        return memoryview(b"")
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)
