"""Which requests' rows are stored, as ``request_ids`` and ``sample_rate`` say."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import xxhash

from ...config.configuration import Config
from ...config.patterns import LONGEST_SEARCHED

# vLLM's own additions to an id: one that is another each time, and the number of a sample of ``n``.
_ADDITIONS = re.compile(r"\A\d+_|-[0-9a-f]{8}\Z")
_WHOLE = 1 << 64


def request_filter(config: Config) -> Callable[[str], bool] | None:
    """Whether a request is captured, by its id: the same answer in every step, rank and run.

    None: each is.
    """
    if config.request_ids is None and config.sample_rate >= 1:
        return None
    patterns = None if config.request_ids is None else [re.compile(text) for text in config.request_ids]
    rate, seed = config.sample_rate, config.sample_seed

    # A request is asked about in each of its steps.
    @functools.lru_cache(maxsize=1 << 16)
    def chooses(request_id: str) -> bool:
        if patterns is not None and not any(
            pattern.search(request_id[:LONGEST_SEARCHED]) for pattern in patterns
        ):
            return False
        if rate >= 1:
            return True
        # The same request must be chosen again in another run, with all of its samples or none.
        plain = _ADDITIONS.sub("", request_id)
        return xxhash.xxh3_64_intdigest(f"{seed}:{plain}".encode()) < rate * _WHOLE

    return chooses
