"""What a document tells of a safetensors file beside its tensors."""

from __future__ import annotations

from typing import NamedTuple

from tlcore.layout.checksums import digest
from tlcore.record import Json


class DataFile(NamedTuple):
    """A file as a document tells of it: ``head`` is the hash of all that stands before the tensors."""

    name: str
    nbytes: int
    head: str

    @classmethod
    def of(cls, name: str, nbytes: int, head: bytes) -> DataFile:
        """A file of so many bytes that begins with ``head``."""
        return cls(name, nbytes, digest(head))

    def to_json(self) -> Json:
        """Its entry in the document."""
        return {"file": self.name, "bytes": self.nbytes, "head": self.head}
