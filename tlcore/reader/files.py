"""How the reader reaches a run's files: every access to stored bytes goes through `RunFiles`."""

from __future__ import annotations

import difflib
import importlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import BackendError, ReadError
from ..protocols import Store
from ..record import LAYOUT_VERSION, Json

RUN_FILE = "run.json"
_LOCAL_STORE = ("tlcore_backends.stores", "LocalStore")


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


def local_directory(path: str | os.PathLike[str]) -> Path:
    """``path`` as a directory of this machine. Raises ReadError for a URL, a file, or nothing there."""
    text = os.fspath(path)
    if "://" in text:
        raise ReadError(f"{text}: this version reads runs from local directories, not from URLs")
    directory = Path(text).expanduser()
    if not directory.exists():
        raise MissingError(f"{text}: there is no such directory")
    if not directory.is_dir():
        raise ReadError(f"{text}: is a file; give the run's directory")
    return directory


class RunFiles:
    """The files of one run: its listing, JSON, and tensors. Names are relative to the run."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def url(self) -> str:
        """Where the run lies, for messages."""
        return self.store.url

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Every finished file and its size in bytes, as they were at first use."""
        try:
            return {entry.name: entry.size for entry in self.store.list()}
        except (BackendError, OSError) as error:
            raise ReadError(str(error)) from error

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises MissingError or ReadError, also for a name that leaves the run."""
        try:
            return self.store.get(name)
        except FileNotFoundError:
            raise missing("file", name, self.url, self.sizes) from None
        except (BackendError, OSError) as error:
            raise ReadError(str(error)) from error

    def json(self, name: str) -> Any:
        """A JSON file's value. Raises ReadError when it is not JSON."""
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


def open_files(path: str | os.PathLike[str]) -> RunFiles:
    """The files below a local directory. Raises ReadError when there is no such directory."""
    directory = local_directory(path)
    # Looked up by name, since the engine never imports a backend.
    module, attribute = _LOCAL_STORE
    store: Store = getattr(importlib.import_module(module), attribute)(os.path.realpath(directory))
    return RunFiles(store)


def payload(tensor: torch.Tensor) -> memoryview:
    """The C-contiguous bytes of a CPU tensor, as a record holds them."""
    if tensor.numel() == 0:
        return memoryview(b"")
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)
