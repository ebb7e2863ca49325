"""The file that a rank's running statistics lie in: one safetensors file of tables, with its own hash."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..layout.checksums import digest
from ..layout.hashes import HASH_PREFIX
from ..layout.names import rank_suffix
from .channels import COLUMNS, Table

_KEY = "tlcore"
_CHECKSUM = "checksum"
_KEYS = {"steps", "columns", "about", "hash", _CHECKSUM}
# The rank is its group, where it is not 0.
CHANNEL_FILE = re.compile(r"channels(?:_rank_([1-9][0-9]{0,8}))?\.safetensors")


def channel_file(rank: int) -> str:
    """The file's name in the run."""
    return f"channels{rank_suffix(rank)}.safetensors"


@dataclass(frozen=True)
class ChannelTables:
    """What one rank has gathered in so many ``steps``: tables by logical names without their step.

    ``about`` has, for each, ``module``, ``direction`` and ``path``, as records have them, and the ``dtype``.
    """

    steps: int
    tables: Mapping[str, Table]
    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def encode(found: ChannelTables) -> bytes:
    """The file's bytes."""
    tables = {name: np.ascontiguousarray(table) for name, table in found.tables.items()}
    about = {"steps": found.steps, "columns": COLUMNS, "about": found.about, "hash": _hash(tables)}
    return save(tables, {_KEY: json.dumps({**about, _CHECKSUM: _checksum(about)})})


def decode(data: bytes) -> ChannelTables:
    """What a file holds. Raises ValueError, with what is wrong, for one that is damaged or none of ours."""
    try:
        tables = load(data)
        size = int.from_bytes(data[:8], "little")
        about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_KEY])
        steps, stated, described = about["steps"], about["hash"], about["about"]
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"no file of channel statistics ({type(error).__name__}: {error})") from None
    for name, table in tables.items():
        if table.dtype != np.float64 or table.ndim != 2 or table.shape[0] != len(COLUMNS):
            raise ValueError(f"{name[:200]!r} is no table of {len(COLUMNS)} columns")
    if type(steps) is not int or not _is_sound(described, tables):
        raise ValueError("what it says of its tables makes no sense")
    # Earlier versions wrote no checksum. One whose name is damaged is a further key.
    checksum = about.pop(_CHECKSUM, None)
    if not _KEYS.issuperset(about) or checksum not in (None, _checksum(about)):
        raise ValueError("what it says of its tables was changed since it was written")
    if stated != _hash(tables):
        raise ValueError("its tables do not have the hash that it states")
    return ChannelTables(steps, {name: tables[name] for name in described}, described)


def _is_sound(described: Any, tables: Mapping[str, Table]) -> bool:
    if not isinstance(described, dict) or described.keys() != tables.keys():
        return False
    return all(
        isinstance(each, dict)
        and isinstance(each.get("module"), str)
        and isinstance(each.get("direction"), str)
        and isinstance(each.get("dtype"), str)
        and isinstance(each.get("path"), list)
        and all(type(key) in (int, str) for key in each["path"])
        for each in described.values()
    )


def _checksum(about: Mapping[str, Any]) -> str:
    return digest(json.dumps(about).encode())


def _hash(tables: Mapping[str, Table]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(tables):
        digest.update(f"{name} {tables[name].shape} ".encode())
        digest.update(np.ascontiguousarray(tables[name]).tobytes())
    return f"{HASH_PREFIX}{digest.hexdigest()}"
