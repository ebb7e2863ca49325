"""Who a request is, so that other runs know it again: everything that its states depend on."""

from __future__ import annotations

import logging
from array import array
from types import ModuleType
from typing import Any

import torch
import xxhash

from ....layout.hashes import HASH_PREFIX
from ....record import Json
from ..salts import given_salt

log = logging.getLogger("vllm.tlcore")
_MARK = "__tlcore__"


def patch_requests(module: ModuleType) -> None:
    """Let the scheduler tell its workers a new request's ``cache_salt``, too. Safe to repeat."""
    cls = module.NewRequestData
    original = cls.from_request
    if hasattr(original, _MARK):
        return

    def from_request(kind: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        made = original.__func__(kind, request, *args, **kwargs)
        salt = getattr(request, "cache_salt", None)
        if salt is not None:
            made.cache_salt = salt
        return made

    from_request.__dict__[_MARK] = True
    cls.from_request = classmethod(from_request)


def names_items(config: Any) -> bool:
    """Whether an engine, by its ``vllm_config``, names images and other items by what is in them.

    Without any cache for them vLLM numbers them through, so that another run's first image has the same name.
    """
    items = getattr(getattr(config, "model_config", None), "multimodal_config", None)
    caches = getattr(getattr(config, "cache_config", None), "enable_prefix_caching", True)
    return bool(caches or getattr(items, "mm_processor_cache_gb", 1))


def identity(request: Any, named: bool = True) -> Json:
    """``prompt_hash`` and ``adapter`` of a new request of the scheduler's; nothing where it cannot be told.

    The hash is of the prompt's token ids, or embeddings; where there are any, also of the adapter's name,
    of what images and other items are in the prompt, and of the salt that keeps the prefix cache's users
    apart. Where these items are not ``named`` by what is in them, that itself is hashed.
    """
    try:
        lora = getattr(request, "lora_request", None)
        adapter = None if lora is None else str(lora.lora_name)
        hashed = _hash(request, adapter, named)
    except Exception:
        log.debug("the prompt of a request could not be hashed", exc_info=True)
        return {}
    found: Json = {} if hashed is None else {"prompt_hash": f"{HASH_PREFIX}{hashed}"}
    return found if adapter is None else {**found, "adapter": adapter}


def _hash(request: Any, adapter: str | None, named: bool) -> str | None:
    ids = getattr(request, "prompt_token_ids", None)
    embeds = getattr(request, "prompt_embeds", None)
    if not ids and embeds is None:
        return None
    state = xxhash.xxh3_128()
    if ids:
        state.update(array("q", ids).tobytes())
    if embeds is not None:
        state.update(f"embeddings {embeds.dtype} {tuple(embeds.shape)}".encode())
        state.update(embeds.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        state.update(repr(getattr(request, "prompt_is_token_ids", None)).encode())
    more = {
        "adapter": adapter,
        "items": [_item(each, named, request) for each in getattr(request, "mm_features", None) or ()]
        or None,
        "salt": given_salt(getattr(request, "cache_salt", None)),
    }
    for key, value in more.items():
        if value is not None:
            state.update(f"{key} {value!r}".encode())
    return state.hexdigest()


def _item(feature: Any, named: bool, request: Any) -> tuple[str, int, int]:
    where = feature.mm_position
    name = getattr(feature, "mm_hash", None) or feature.identifier
    if not named:
        # What is not there to be hashed is like nothing else.
        name = request.req_id if feature.data is None else _hash_of_item(feature.data)
    return str(name), int(where.offset), int(where.length)


def _hash_of_item(data: Any) -> str:
    state = xxhash.xxh3_128()
    for key in sorted(data):
        state.update(key.encode())
        _update(state, data[key].data)
    return state.hexdigest()


def _update(state: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        state.update(f"{value.dtype} {tuple(value.shape)}".encode())
        state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (list, tuple)):
        for each in value:
            _update(state, each)
    else:
        state.update(repr(value).encode())
