"""The tensors of a mixture of experts that say which experts were chosen for each token, with what weights.

Kernels list a token's experts in any order, which means nothing: both are compared in that of the experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .pairs import Key, Located

_PLACES = re.compile(r"(?:^|_)(?:gate|router|experts?|moe|top_?k)(?:$|_)|moe|router", re.IGNORECASE)
_GATES = re.compile(r"(?:^|_)(?:gate|router)$|router", re.IGNORECASE)
_NAMED = re.compile(r"top_?k_?(?:ids|ind)|(?:selected|chosen)_experts|experts?_(?:ids|ind)", re.IGNORECASE)
_METHOD = "quant_method"
# More of a token's values are no choice of experts.
_MOST = 64
Call = tuple[int, str, int, str]


def with_experts(found: dict[Key, Located]) -> dict[Key, Located]:
    """A step's tensors; each token's experts, and their weights, are put in order ``by`` the experts."""
    chosen = [key for key, source in found.items() if _says_which(key, source)]
    if not chosen:
        return found
    calls: dict[Call, list[Key]] = {}
    wanted = {key[:4] for key in chosen}
    for key in found:
        if key[:4] in wanted:
            calls.setdefault(key[:4], []).append(key)
    logits = _logits(found)
    result = dict(found)
    for key in chosen:
        weights = _weights(key, calls[key[:4]], found)
        if weights is None and not _NAMED.search(str(key[4][-1:])):
            continue
        source = found[key]
        by = source.names[0], source.records[0]
        result[key] = replace(source, by=by, logits=_logits_of(key, source, logits))
        if weights is not None:
            result[weights] = replace(found[weights], by=by)
    return result


def _says_which(key: Key, source: Located) -> bool:
    record = source.records[0]
    if not str(record["dtype"]).startswith(("int", "uint")):
        return False
    shape = record["shape"]
    if len(shape) < 2 or not 0 < shape[-1] <= _MOST:
        return False
    last = key[1].rpartition(".")[2]
    return bool(_PLACES.search(last)) or (last == _METHOD and bool(_NAMED.search(str(key[4][-1:]))))


def _weights(chosen: Key, call: list[Key], found: Mapping[Key, Located]) -> Key | None:
    """The floating tensor of the same shape that stands beside the experts among a call's values."""
    at = call.index(chosen)
    shape = found[chosen].records[0]["shape"]
    fitting = [
        place
        for place, key in enumerate(call)
        if _is_floating(found[key].records[0]) and found[key].records[0]["shape"] == shape
    ]
    return call[min(fitting, key=lambda place: abs(place - at))] if fitting else None


def _logits(found: Mapping[Key, Located]) -> dict[tuple[int, str, int], Located]:
    """What gates give for all experts, by rank, the module around the gate and the number of the call."""
    logits: dict[tuple[int, str, int], Located] = {}
    for (rank, module, call, direction, _), source in found.items():
        block, _, last = module.rpartition(".")
        record = source.records[0]
        if (
            direction == "outputs"
            and _GATES.search(last)
            and _is_floating(record)
            and len(record["shape"]) > 1
        ):
            known = logits.setdefault((rank, block, call), source)
            # Weights of the chosen ones are fewer.
            if record["shape"][-1] > known.records[0]["shape"][-1]:
                logits[rank, block, call] = source
    return logits


def _logits_of(key: Key, chosen: Located, logits: Mapping[tuple[int, str, int], Located]) -> str | None:
    rank, module, call = key[:3]
    *tokens, count = chosen.records[0]["shape"]
    while module:
        module = module.rpartition(".")[0]
        found = logits.get((rank, module, call))
        if found is not None:
            *rows, experts = found.records[0]["shape"]
            return found.names[0] if rows == tokens and experts > count else None
    return None


def _is_floating(record: Mapping[str, Any]) -> bool:
    return str(record["dtype"]).startswith(("float", "bfloat"))
