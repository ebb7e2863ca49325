"""What openings of S3 share, and what they do not."""

from __future__ import annotations

from typing import Any

import pytest
from botocore.exceptions import ProfileNotFound
from botocore.loaders import JSONFileLoader
from fsspec.asyn import sync

from tlcore_backends.storage.filesystems import open_filesystem
from tlcore_backends.storage.redaction import Redactor

# Without a region, which obstore would want.
_URL = "s3://bucket/runs"


def _opened(**options: Any) -> Any:
    filesystem, _ = open_filesystem(_URL, options, Redactor(_URL, options))
    return filesystem


def _client(filesystem: Any) -> Any:
    return sync(filesystem.loop, filesystem.set_session)


def test_a_second_opening_parses_no_description_and_has_its_own_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    first = _client(_opened(key="a", secret="b", endpoint_url="http://127.0.0.1:1"))
    read: list[str] = []
    monkeypatch.setattr(JSONFileLoader, "load_file", lambda _, path: read.append(path))
    second = _client(_opened(key="c", secret="d", endpoint_url="http://127.0.0.1:2"))
    assert not read
    keys = [client._request_signer._credentials.access_key for client in (first, second)]
    assert keys == ["a", "c"]
    assert [client.meta.endpoint_url for client in (first, second)] == [
        "http://127.0.0.1:1",
        "http://127.0.0.1:2",
    ]


def test_what_s3fs_says_of_a_profile_that_is_not_there_is_still_said() -> None:
    with pytest.raises(ProfileNotFound, match="nobody"):
        _client(_opened(profile="nobody"))


def test_other_directories_of_descriptions_have_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    usual = _opened(key="a", secret="b").session.get_component("data_loader")
    monkeypatch.setenv("AWS_DATA_PATH", str(tmp_path))
    other = _opened(key="a", secret="b").session.get_component("data_loader")
    assert other is not usual
    assert str(tmp_path) in other.search_paths
