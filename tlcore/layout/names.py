"""The layout's naming rules: pure functions from modules, calls and keys to logical names.

A logical name is ``step_<S>/<module>[_<i>]/<stem>``, without extension. Everything a model can put
into a name (module names, keyword names, dictionary keys) passes through `safe`, so that a name can
never leave its directory.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from urllib.parse import unquote

PathKey = int | str
ROOT_DIR = "_root"

_UNSAFE = re.compile(r"[^A-Za-z0-9_.\-+=@,()\[\]]")
# The directory of a module's first call, and which later one this is; unless the module itself is so called.
LATER_CALL = re.compile(r"(.+)_([1-9][0-9]*)(?:~2)?")
# In step.json: what `misread` says.
MISREAD = "modules"
# A rank's suffix before the extension or a shard's number; a device's index where it says the same.
_RANK_OF_FILE = re.compile(r"_rank_(\d+)(?:_\d+)?\.[a-z]+\Z|_[a-z]+_(\d+)\.pt\Z")
# File systems allow 255 bytes; this leaves room for a rank, a `~2` and an extension.
_LONGEST = 200


@lru_cache(4096)
def safe(text: str) -> str:
    """Percent-encode what is unsafe in a file name; equal results only for equal texts.

    ``~`` is always encoded, so a suffix made with it can never be mistaken for a module's own name.
    """
    encoded = _UNSAFE.sub(lambda m: "".join(f"%{b:02X}" for b in m[0].encode("utf-8", "surrogatepass")), text)
    if encoded in ("", ".", ".."):
        encoded = encoded.replace(".", "%2E") or "%"
    if len(encoded) > _LONGEST:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        encoded = f"{encoded[: _LONGEST - 13]}~{digest}"
    return encoded


def step_dir(step: int) -> str:
    """``step_3``."""
    return f"step_{step}"


def call_dir(module: str, call: int, module_names: frozenset[str]) -> str:
    """The directory of one call: the module's name, with ``_<i>`` from the second call on.

    ``module_names`` are all names in the model: a module really called ``l_1`` keeps that directory,
    and the second call of ``l`` goes to ``l_1~2``. The model itself, whose name is empty, has ``_root``, and
    a module really called that ``_root~2``.
    """
    if module == ROOT_DIR:
        return f"{ROOT_DIR}~2_{call}" if call else f"{ROOT_DIR}~2"
    first = module or ROOT_DIR
    if call == 0:
        return safe(first)
    plain = f"{first}_{call}"
    return safe(plain) + ("~2" if plain in module_names else "")


def module_of(directory: str) -> str:
    """The module whose first call has this directory."""
    if directory in (ROOT_DIR, f"{ROOT_DIR}~2"):
        return "" if directory == ROOT_DIR else ROOT_DIR
    return unquote(directory)


def misread(modules: Collection[str]) -> dict[str, str]:
    """By directory, those of these modules whose first call it shows as another's, or as nobody's."""
    found = {}
    for module in modules:
        directory = call_dir(module, 0, frozenset())
        later = LATER_CALL.fullmatch(directory)
        taken = later is not None and (module_of(later[1]) in modules)
        if taken or module_of(directory) != module:
            found[directory] = module
    return found


def within(module: str, outer: str) -> bool:
    """Whether a module is a submodule of another, at any depth; all are the model's, whose name is empty."""
    return module.startswith(f"{outer}.") if outer else bool(module)


def shown_module(module: str) -> str:
    """A module's name for people: the model itself, whose name is empty, goes by its directory."""
    return module or ROOT_DIR


def call_name(module: str, call: int) -> str:
    """A call for people: `shown_module`, with ``_<i>`` from the second call on."""
    return f"{shown_module(module)}_{call}" if call else shown_module(module)


@lru_cache(256)
def device_label(device: str, rank: int) -> str:
    """``cuda:0`` -> ``cuda_0``, with ``_rank_<r>`` unless rank and device index already agree."""
    base, _, index = device.partition(":")
    label = safe(f"{base}_{index}" if index else base)
    own = rank == int(index) if index.isdigit() else rank == 0
    return label if own else f"{label}_rank_{rank}"


def rank_suffix(rank: int) -> str:
    """What rank's own JSON and text files carry: nothing for rank 0, else ``_rank_<r>``."""
    return "" if rank == 0 else f"_rank_{rank}"


def rank_of(file: str) -> int:
    """The rank that wrote a file of a step."""
    found = _RANK_OF_FILE.search(file)
    return int(found[1] or found[2]) if found else 0


def stem(direction: str, path: Sequence[PathKey], device: str, rank: int) -> str:
    """``outputs_0_key_cuda_0``: direction, the way into the structure, the device's label."""
    full = "_".join([direction, *(safe(str(key)) for key in path), device_label(device, rank)])
    if len(full) > _LONGEST:
        digest = hashlib.sha256(repr((direction, tuple(path), device, rank)).encode()).hexdigest()[:12]
        full = f"{full[: _LONGEST - 13]}~{digest}"
    return full


def unique(name: str, taken: set[str], mark: str = "~") -> str:
    """``name``, or the first of ``name~2``, ``name~3``, ... that is free; takes it. ``mark`` is the ``~``."""
    chosen, n = name, 2
    while chosen in taken:
        chosen, n = f"{name}{mark}{n}", n + 1
    taken.add(chosen)
    return chosen


def printable(text: str) -> str:
    """``text`` with control characters escaped, so that stored names cannot steer a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shown_numbers(numbers: Iterable[int], most: int = 8) -> str:
    """``0-99, 120, 122``: ascending numbers for people; of more than ``most`` runs only the first ones."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    shown = [
        f"{first}-{last}" if last - first > 1 else ", ".join(map(str, range(first, last + 1)))
        for first, last in runs[:most]
    ]
    return ", ".join(shown + ["..."] * (len(runs) > most)) or "none"
