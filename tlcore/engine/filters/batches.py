"""What a call's arguments say of its batch: how many samples, which positions are padding, what went before.

Everything here reads arguments of transformers' kind, by name; what it does not know for certain it refuses
(`UnknownRowsError`), with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeGuard

import numpy as np
import torch

from .host_values import HostValues, Values

Flags = np.ndarray[Any, np.dtype[np.bool_]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]
_TOKENS = frozenset({"input_ids", "inputs_embeds"})
_NOTHING = "which positions are padding is not known: the model was given no attention_mask"


class UnknownRowsError(Exception):
    """Whose the rows of a call are is not known; the message says why."""


class Batch:
    """The tokens or embeddings of a call ([samples, positions, ...]), and what goes with them."""

    def __init__(self, tokens: torch.Tensor, mask: Any, positions: Any, cache: Any) -> None:
        self.tokens = tokens
        self.mask = mask
        self.cache = cache
        self.positions = positions
        small = {"mask": mask if self.has_mask else None, "ids": tokens if self.has_ids else None}
        # Of a single position nothing is to be learnt from where it lies.
        small["positions"] = positions if self.length > 1 and _is_flat(positions) else None
        self._values = HostValues({name: each for name, each in small.items() if each is not None})

    @property
    def mask_values(self) -> Values:
        """The values of a mask [samples, positions]."""
        return self._values["mask"]

    @property
    def ids(self) -> Values:
        """The token ids."""
        return self._values["ids"]

    @property
    def position_values(self) -> Values:
        """The ``position_ids`` [samples, positions]."""
        return self._values["positions"]

    @property
    def samples(self) -> int:
        """How many sequences there are."""
        return int(self.tokens.shape[0])

    @property
    def length(self) -> int:
        """How many positions of each sequence are computed."""
        return int(self.tokens.shape[1])

    @property
    def has_mask(self) -> bool:
        """Whether the mask is one of [samples, positions]."""
        return _is_flat(self.mask)

    @property
    def has_ids(self) -> bool:
        """Whether the tokens are ids, not embeddings."""
        return is_ids(self.tokens)


def _is_flat(value: Any) -> bool:
    return is_plain(value) and value.dim() == 2


def is_ids(value: Any) -> TypeGuard[torch.Tensor]:
    """Whether a value is token ids, [samples, positions]."""
    whole = is_plain(value) and not (value.dtype.is_floating_point or value.dtype.is_complex)
    return whole and value.dim() == 2 and value.dtype is not torch.bool


def is_plain(value: Any) -> TypeGuard[torch.Tensor]:
    """Whether a value is a tensor whose values can be looked at."""
    return type(value) is torch.Tensor and value.layout is torch.strided and not value.is_meta


def batch_of(given: Mapping[str, Any], prefix: str = "", any_tensor: bool = False) -> Batch | None:
    """The batch in a call's arguments; ``prefix`` is ``decoder_`` for that of an encoder-decoder's decoder.

    With ``any_tensor`` the first tensor of two axes or more stands for tokens that have another name.
    """
    ids, embeddings = given.get(f"{prefix}input_ids"), given.get(f"{prefix}inputs_embeds")
    mask = given.get(f"{prefix}attention_mask")
    tokens: torch.Tensor | None = None
    if is_ids(ids):
        tokens = ids
    elif is_plain(embeddings) and embeddings.dim() == 3:
        tokens = embeddings
    elif any_tensor and ids is None and embeddings is None:
        named = [value for name, value in given.items() if "mask" not in name]
        first: Any = next((value for value in named if is_plain(value) and value.dim() >= 2), None)
        if is_ids(first) or (first is not None and first.dim() == 3):
            tokens = first
    if tokens is None:
        return None
    if any(value is not None for name, value in given.items() if name.startswith("cu_seq")):
        raise UnknownRowsError("several sequences are packed into one (cu_seq_lens)")
    return Batch(tokens, mask, given.get(f"{prefix}position_ids"), given.get("past_key_values"))


def opened(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """A call's arguments, with the items of the one dictionary that has its tokens where only that has them.

    Of one with a decoder's tokens, too, it is left to the parts of the model whose tokens these are.
    """
    if not _TOKENS.isdisjoint(given):
        return given
    held = [each for each in given.values() if isinstance(each, Mapping) and not _TOKENS.isdisjoint(each)]
    if len(held) != 1 or not all(isinstance(name, str) for name in held[0]):
        return given
    if any(name.startswith("decoder_") for name in held[0]):
        return given
    return {**given, **held[0]}


def is_no_batch(given: Mapping[str, Any]) -> bool:
    """Whether a call's arguments are floats of so few axes that they cannot be sequences, and no mask."""
    for name, value in given.items():
        if type(value) is not torch.Tensor or value.dim() > 2 or "mask" in name:
            return False
        if not value.is_floating_point():
            return False
    return True


def mask_flags(batch: Batch, past: int | None) -> Flags:
    """Which of the [samples, keys] positions up to now the mask calls real. Raises UnknownRowsError."""
    mask = batch.mask
    if not is_plain(mask):
        raise UnknownRowsError(f"attention_mask is a {type(mask).__name__}")
    if mask.dim() != 2:
        raise UnknownRowsError(f"attention_mask has {mask.dim()} axes, not [samples, positions]")
    samples, keys = mask.shape
    if samples != batch.samples or keys < batch.length:
        shape, tokens = list(mask.shape), [batch.samples, batch.length]
        raise UnknownRowsError(f"attention_mask has the shape {shape}, the tokens {tokens}")
    if past is not None and keys != past + batch.length:
        raise UnknownRowsError(
            f"attention_mask has {keys} columns for {batch.length} positions and {past} in the cache"
        )
    values = batch.mask_values
    flags: Flags = values != 0
    if values.dtype != np.bool_ and not ((values == 1) == flags).all():
        raise UnknownRowsError("attention_mask has values other than 0 and 1")
    return flags


def unmasked_flags(
    batch: Batch, past: int | None, begun: bool, padding: Collection[int], starts: Collection[int] = ()
) -> Flags:
    """The same where there is no mask, as where nothing is padded; ``padding`` are ids that would be it.

    ``begun`` says that all samples begin with this call, ``starts`` are ids that stand before a decoder's
    first token, and which may be those of padding.
    """
    alone = batch.samples == 1 and past is not None
    first = begun and batch.length == 1 and past == 0
    if not (alone or first or (past == 0 and _is_full(batch, padding, starts if begun else ()))):
        raise UnknownRowsError(_NOTHING)
    return np.ones((batch.samples, (past or 0) + batch.length), bool)


def _is_full(batch: Batch, padding: Collection[int], starts: Collection[int]) -> bool:
    """Whether no sequence begins or ends with padding."""
    if not (padding and batch.has_ids):
        return False
    started = batch.length > 1 and bool(np.isin(batch.ids[:, 0], list(starts)).all())
    edges = batch.ids[:, [1 if started else 0, -1]]
    return not np.isin(edges, list(padding)).any()


def check_positions(batch: Batch, real: Flags) -> None:
    """Raises UnknownRowsError where a sample's ``position_ids`` do not follow one another."""
    positions, length = batch.positions, real.shape[1]
    if length < 2 or not _is_flat(positions) or positions.shape[1] != length:
        return
    values = batch.position_values
    if (np.diff(values) > 0).all():
        return
    for sample, flags in enumerate(real):
        own = values[sample if len(values) > 1 else 0][flags]
        # They may leap over padding.
        if len(own) > 1 and (np.diff(own) < 1).any():
            raise UnknownRowsError("position_ids begin anew within a sample, as of packed sequences")


def token_ids(batch: Batch) -> Numbers | None:
    """The token ids, where there are any."""
    return batch.ids.astype(np.int64) if batch.has_ids else None


def cached_positions(cache: Any) -> int | None:
    """How many positions a cache holds; None where it does not say."""
    if cache is None:
        return 0
    cache = getattr(cache, "self_attention_cache", cache)
    try:
        if hasattr(cache, "get_seq_length"):
            return int(cache.get_seq_length())
        keys = cached_keys(cache)
        return None if keys is None else int(keys.shape[-2])
    except Exception:
        return None


def cached_keys(cache: Any) -> torch.Tensor | None:
    """A cache's first keys. It keeps that very tensor until it takes up more, or is reordered or cut."""
    return next(_keys(cache), None)


def _keys(cache: Any) -> Iterator[torch.Tensor]:
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    if layers is None:
        layers = cache if type(cache) in (tuple, list) else ()
    for layer in layers:
        keys = layer[0] if type(layer) in (tuple, list) and layer else getattr(layer, "keys", None)
        if isinstance(keys, torch.Tensor):
            yield keys


def cache_in(result: Any, given: Any) -> Any:
    """The cache that a call leaves behind: that which it was given, or one in its result."""
    if given is not None:
        return given
    if isinstance(result, Mapping):
        return result.get("past_key_values")
    if isinstance(result, tuple):
        return next((each for each in result if cached_keys(each) is not None), None)
    return getattr(result, "past_key_values", None)
