"""The cache salt of an injected request: no other has it, and the client's own is known still."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tlcore.adapters.vllm.salts import given_salt, is_apart, keep_apart


@pytest.mark.parametrize("own", [None, "a", "a:b", "tlcore-injected:", "tlcore-injected:x"])
def test_each_request_gets_one_of_its_own_and_keeps_the_clients(own: str | None) -> None:
    salts = []
    for _ in range(2):
        params = SimpleNamespace(skip_reading_prefix_cache=None)
        request = SimpleNamespace(cache_salt=own, sampling_params=params, pooling_params=None)
        keep_apart(request)
        assert params.skip_reading_prefix_cache
        salts.append(request.cache_salt)
    assert len({own, *salts}) == 3
    assert all(map(is_apart, salts)) and not is_apart(own)
    assert {given_salt(each) for each in [own, *salts]} == {own}
