"""The texts of a request's tokens, as they stand along a map: one a position, white space made visible."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from ...errors import BackendError, ConfigError, MissingError
from ...layout.names import printable
from ..results import Comparison

_VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})
# What a decoder gives for a part of a character.
_PARTIAL = "\N{REPLACEMENT CHARACTER}"
# What stands at a character's first tokens, and of how many tokens one is at most.
_BEGUN, _LONGEST = "⋯", 8


class Decoder(Protocol):
    """What is needed of a tokenizer; those of transformers and tokenizers have it."""

    def decode(self, ids: Any, skip_special_tokens: bool = ...) -> Any:
        """The text of some token ids."""


@lru_cache(maxsize=1)
def load_tokenizer(path: str) -> Decoder:
    """The tokenizer of a file ``tokenizer.json``, or of a directory with a model's or tokenizer's files.

    Nothing is fetched. Raises ConfigError where there is none, BackendError without the package to read it.
    """
    given = Path(path)
    file = given / "tokenizer.json" if given.is_dir() else given
    if not given.exists():
        advice = "give a directory with a tokenizer, or its tokenizer.json"
        raise ConfigError("--tokenizer", f"{path!r} is not there; {advice}")
    read = _from_file if file.is_file() else _from_directory
    try:
        return read(str(file if file.is_file() else given))
    except ImportError as error:
        package = "tokenizers" if file.is_file() else "transformers"
        raise BackendError(f"--tokenizer needs {package}: pip install {package}") from error
    except Exception as error:
        # Both packages raise whatever their parsers do.
        raise ConfigError("--tokenizer", f"{path!r} cannot be read as a tokenizer ({error})") from error


def _from_file(path: str) -> Decoder:
    from tokenizers import Tokenizer

    found: Decoder = Tokenizer.from_file(path)
    return found


def _from_directory(path: str) -> Decoder:
    from transformers import AutoTokenizer

    found: Decoder = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return found


def token_texts(comparison: Comparison, request: str | None, tokenizer: Decoder) -> dict[int, str]:
    """The text at each position whose token id run A has; none where it has no ids of the request."""
    if request is None or comparison.origin is None:
        return {}
    try:
        ids = comparison.origin.runs[0].request(request).tokens.known
    except MissingError:
        return {}
    return texts_of(ids, tokenizer)


def texts_of(ids: Mapping[int, int], tokenizer: Decoder) -> dict[int, str]:
    """The text that each token adds, by position. A character of several tokens stands at its last one."""
    found: dict[int, str] = {}
    waiting: list[int] = []
    for position in sorted(ids):
        if waiting and (waiting[-1] != position - 1 or len(waiting) == _LONGEST):
            found |= {at: _shown(_name(ids[at], tokenizer)) for at in waiting}
            waiting = []
        waiting.append(position)
        text = _added(ids, waiting, tokenizer)
        if not text.endswith(_PARTIAL):
            found |= dict.fromkeys(waiting[:-1], _BEGUN)
            found[position] = _shown(text or _name(ids[position], tokenizer))
            waiting = []
    return found | {at: _shown(_name(ids[at], tokenizer)) for at in waiting}


def _added(ids: Mapping[int, int], positions: Sequence[int], tokenizer: Decoder) -> str:
    """The text of tokens in a row. Read behind the one before, since decoders strip a first one's space."""
    own = [ids[position] for position in positions]
    before = ids.get(positions[0] - 1)
    if before is not None:
        alone, both = _decoded([before], tokenizer), _decoded([before, *own], tokenizer)
        if both.startswith(alone) and not alone.endswith(_PARTIAL):
            return both[len(alone) :]
    return _decoded(own, tokenizer)


def _decoded(ids: Sequence[int], tokenizer: Decoder) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def _shown(text: str) -> str:
    return printable(text.translate(_VISIBLE))


def _name(own: int, tokenizer: Decoder) -> str:
    """The vocabulary's own spelling of a token that is no whole character."""
    for method in ("id_to_token", "convert_ids_to_tokens"):
        spelled: Callable[[int], Any] | None = getattr(tokenizer, method, None)
        if spelled is not None and (found := spelled(own)):
            return str(found)
    return f"#{own}"
