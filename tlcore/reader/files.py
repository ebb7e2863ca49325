"""How the reader reaches a run's files: every access to stored bytes goes through `RunFiles`."""

from __future__ import annotations

import difflib
import importlib
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch

from ..errors import BackendError, ReadError
from ..names import is_url
from ..protocols import Store
from ..record import LAYOUT_VERSION, Json
from .shards import Slice

RUN_FILE = "run.json"
_LOCAL_STORE = ("tlcore_backends.stores", "LocalStore")
_ANY_STORE = ("tlcore_backends.places", "open_store")
_STRUCTURE = re.compile(
    r"(step_\d+)/(.+/(?:inputs|outputs|post_fwd_inputs)(_rank_[1-9]\d*)?\.json)", re.DOTALL
)


class MissingError(ReadError, KeyError):
    """A run, step, call, tensor or file that is not there; also a KeyError, as mappings promise."""

    def __str__(self) -> str:
        # KeyError would show the message in quotes, with its line ends escaped.
        return str(self.args[0])


def missing(what: str, name: object, where: str, known: Iterable[str]) -> MissingError:
    """The error for a name that is not there, with the nearest ones that are."""
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
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
        self._documents: dict[str, Json] = {}

    @property
    def url(self) -> str:
        """Where the run lies, for messages."""
        return f"{self.store.url}/{self._below}".rstrip("/") if self._below else self.store.url

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Every finished file and its size in bytes, as they were at first use."""
        skip = len(self._below)
        try:
            return {entry.name[skip:]: entry.size for entry in self.store.list(self._below)}
        except (BackendError, OSError) as error:
            raise ReadError(str(error)) from error

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes ``[start, end)`` of a file, all of it by default.

        Raises MissingError or ReadError, also for a name that leaves the run.
        """
        try:
            return self.store.get(self._below + name, start, end)
        except FileNotFoundError:
            raise missing("file", name, self.url, self.sizes) from None
        except (BackendError, OSError) as error:
            raise ReadError(str(error)) from error

    def holds(self, name: str) -> bool:
        """Whether the run has a file of this name, or a structure packed into its step's ``step.json``."""
        return name in self.sizes or self._packed(name) is not None

    def json(self, name: str) -> Any:
        """A JSON file's value, also of one that is packed. Raises ReadError when it is not JSON."""
        packed = self._packed(name)
        if packed is not None:
            return packed
        try:
            return json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise ReadError(f"{self.url}/{name}: damaged, not JSON ({error})") from error

    def document(self, name: str, required: Mapping[str, type]) -> Json:
        """A JSON object with a layout version that this reader knows and the ``required`` keys."""
        document = self.json(name)
        layout = document.get("layout") if isinstance(document, dict) else None
        if not isinstance(layout, int) or isinstance(layout, bool):
            raise ReadError(f"{self.url}/{name}: not written by tlcore (it has no layout version)")
        if layout > LAYOUT_VERSION:
            raise ReadError(
                f"{self.url}/{name}: has layout version {layout}, this tlcore reads up to {LAYOUT_VERSION};"
                " a newer tlcore is needed"
            )
        for key, kind in required.items():
            if not isinstance(document.get(key), kind):
                raise ReadError(f"{self.url}/{name}: damaged, {key!r} is missing or no {kind.__name__}")
        checked: Json = document
        return checked

    def step_document(self, name: str) -> Json:
        """A ``step.json``, read once. Raises ReadError when it is missing or damaged."""
        if name not in self._documents:
            document = self.document(name, {"calls": list, "records": list, "ledger": dict})
            named = all(isinstance(r, dict) and isinstance(r.get("name"), str) for r in document["records"])
            if not named or not isinstance(document.get("structures", {}), dict):
                raise ReadError(f"{self.url}/{name}: damaged record in step.json, or damaged structures")
            self._documents[name] = document
        return self._documents[name]

    def _packed(self, name: str) -> Any:
        """A structure that its step's ``step.json`` holds; None where it does not."""
        match = _STRUCTURE.fullmatch(name)
        if match is None or name in self.sizes:
            return None
        step_file = f"{match[1]}/step{match[3] or ''}.json"
        if step_file not in self.sizes:
            return None
        return self.step_document(step_file).get("structures", {}).get(match[2])

    def stored(self, record: Mapping[str, Any]) -> torch.Tensor:
        """The tensor of a record of ``step.json``, from its file or, by one ranged read, from its shard."""
        if isinstance(record.get("file"), str):
            return self.tensor(record["file"], record)
        where = f"{self.url}: {record.get('name')!r}"
        place = Slice.of(record, where)
        return place.tensor(self.read(place.shard, place.begin, place.end), where)

    def tensor(self, file: str, record: Mapping[str, Any] | None = None) -> torch.Tensor:
        """The tensor of a ``.pt`` file, on the CPU; only tensor data is ever unpickled.

        Raises ReadError when it is damaged or differs from its ``record`` in dtype or shape.
        """
        data = self.read(file)
        try:
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ReadError(f"{self.url}/{file}: not a readable .pt file ({reason[0]})") from error
        if not isinstance(loaded, torch.Tensor):
            raise ReadError(f"{self.url}/{file}: holds a {type(loaded).__name__}, not a tensor")
        if record is not None:
            found = (str(loaded.dtype).removeprefix("torch."), list(loaded.shape))
            stated = (record.get("dtype"), record.get("shape"))
            if found != stated:
                raise ReadError(f"{self.url}/{file}: holds {found}, its step.json says {stated}")
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
