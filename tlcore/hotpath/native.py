"""Finding the C extension, and saying why it is not used where it is not.

``TLCORE_NO_EXTENSIONS=1`` leaves it out. Whatever is not right with it (an older Python, no compiler when
tlcore was installed, an extension of other sources) leaves the work to the Python twins, which do the same.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import struct
import sys
import sysconfig
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

if TYPE_CHECKING:
    from . import _native

SWITCH = "TLCORE_NO_EXTENSIONS"
_INTERFACE = 14
_TRIED = bytes(range(256)) * 3


class Loaded(NamedTuple):
    """The extension, and whether it can hash, also in pieces, and take checksums; or None, and the reason."""

    module: Any
    hashes: bool
    reason: str
    hashes_pieces: bool = False
    checks: bool = False


def _load() -> Loaded:
    if os.environ.get(SWITCH, "") not in ("", "0"):
        return Loaded(None, False, f"{SWITCH} is set")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return Loaded(None, False, "it does not support free-threaded Python")
    if sys.version_info < (3, 11):
        return Loaded(None, False, "it needs Python 3.11")
    try:
        module = importlib.import_module(f"{__package__}._native")
    except ImportError as error:
        return Loaded(None, False, f"it is not built ({error})")
    found = getattr(module, "INTERFACE", None)
    if found != _INTERFACE:
        return Loaded(None, False, f"it was built from other sources (interface {found}, not {_INTERFACE})")
    return Loaded(module, _can_hash(module), "", _can_hash_pieces(module), _can_check(module))


def _can_hash(module: Any) -> bool:
    """Give the extension the xxhash library's function, and see that known hashes come out."""
    try:
        library = ctypes.CDLL(importlib.import_module("xxhash._xxhash").__file__)
        module.use_xxh3(ctypes.cast(library.XXH3_128bits, ctypes.c_void_p).value or 0)
        known = [xxhash.xxh3_128_hexdigest(part) for part in (b"", _TRIED)]
        if module.hex_digests([b"", _TRIED]) == known:
            return True
    except (ImportError, OSError, AttributeError, RuntimeError, TypeError):
        pass
    module.use_xxh3(0)
    return False


def _can_hash_pieces(module: Any) -> bool:
    """The same with the functions for what comes piece by piece."""
    names = ("XXH3_createState", "XXH3_freeState", "XXH3_128bits_reset", "XXH3_128bits_update")
    try:
        library = ctypes.CDLL(importlib.import_module("xxhash._xxhash").__file__)
        functions = [getattr(library, name) for name in (*names, "XXH3_128bits_digest")]
        module.use_xxh3_pieces(*(ctypes.cast(each, ctypes.c_void_p).value or 0 for each in functions))
        if module.digest_in_pieces((b"", _TRIED, b"", _TRIED)) == xxhash.xxh3_128_digest(_TRIED * 2):
            return True
    except (ImportError, OSError, AttributeError, RuntimeError, TypeError):
        pass
    module.use_xxh3_pieces(0, 0, 0, 0, 0)
    return False


def _can_check(module: Any) -> bool:
    """The same with zlib's function for CRC-32."""
    # A row whose template is the twenty digits of the checksum of its data, which is mixed in, and no more.
    row = struct.pack("=5q3qQQ3q3q", 0, 0, 24, 0, len(_TRIED), 20, -1, -1, 0, 0, 0, 0, 0, -1, -1, -1)
    found = bytearray(24)
    try:
        library = ctypes.CDLL(importlib.import_module("zlib").__file__)
        module.use_crc32(ctypes.cast(library.crc32, ctypes.c_void_p).value or 0)
        module.seal(found, bytes(24), row, _TRIED)
        if found[20:] == struct.pack("<I", zlib.crc32(_TRIED)):
            return True
    except (ImportError, OSError, AttributeError, RuntimeError, TypeError):
        pass
    module.use_crc32(0)
    return False


_loaded = _load()
# What the twins use: the module, or None. Typed as if it were always there; they ask first.
extension: Any = _loaded.module
if TYPE_CHECKING:
    extension = _native
can_hash = _loaded.hashes
hashes_pieces = _loaded.hashes_pieces
can_check = _loaded.checks


def in_use() -> str:
    """Which half runs, in words, for ``tlcore --version``."""
    if extension is None:
        return f"Python only: the C extension is not used, since {_loaded.reason}"
    return "C extension" if can_hash else "C extension, hashing in Python: xxhash exports no XXH3_128bits"
