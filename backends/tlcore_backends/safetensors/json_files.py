"""Reading a segment's JSON files, no more of them than such a file has."""

from __future__ import annotations

from tlcore.errors import BackendError, MissingError, ReadError
from tlcore.layout.run_files import LARGEST_JSON
from tlcore.storage import Store


def read_bytes(store: Store, name: str) -> bytes:
    """The bytes of a JSON file, of a too large one not all. Raises MissingError or ReadError."""
    try:
        return store.get(name, 0, LARGEST_JSON + 1)
    except FileNotFoundError:
        raise MissingError(f"{store.url}: no file {name!r}") from None
    except (BackendError, OSError) as error:
        raise ReadError(str(error)) from error
    except (MemoryError, OverflowError):
        raise ReadError(f"{store.url}/{name}: larger than this machine's memory") from None
