"""Uploads in parts: those that nobody finished are ended, and those that fail are tried again."""

from __future__ import annotations

import json

import fsspec
import numpy as np
import pytest

from tests.faults.helpers import options
from tests.faults.proxy import Fault, Proxy, busy, cut, cut_later_parts, times
from tests.servers import Server
from tlcore.__main__ import main
from tlcore.storage import RetryPolicy
from tlcore_backends.storage.leftovers import leftovers
from tlcore_backends.storage.remote import FsspecStore

pytestmark = pytest.mark.slow


def test_orphaned_uploads_are_found_and_ended(weed: Server, capsys: pytest.CaptureFixture[str]) -> None:
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True, **weed.options)
    bucket = weed.url.removeprefix("s3://")
    for key in ("orphans/run/step_0/shard.safetensors", "elsewhere/shard.safetensors"):
        begun = filesystem.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
        filesystem.call_s3(
            "upload_part", Bucket=bucket, Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=b"half"
        )
    url = f"{weed.url}/orphans"
    # One that began just now may still be on its way.

    command = ["prune", url, "--uploads", "--yes", "--storage-options", json.dumps(weed.options)]
    assert main(command) == 0
    assert "no unfinished upload" in capsys.readouterr().out
    (found,) = leftovers(url, weed.options, older_than_s=-60)
    assert found.name == f"{url}/run/step_0/shard.safetensors"
    found.remove()
    assert leftovers(url, weed.options, older_than_s=-60) == []
    assert len(leftovers(weed.url, weed.options, older_than_s=-60)) == 1


@pytest.mark.parametrize("fault", [busy, cut, cut_later_parts])
def test_a_blob_of_several_pieces_is_whole_though_requests_fail(
    weed: Server, proxy: Proxy, fault: Fault
) -> None:
    sizes = [7, 9 << 20, 0, 12 << 20]
    pieces = [np.random.default_rng(number).bytes(size) for number, size in enumerate(sizes)]
    # The client that sends pieces as they are is taken where the region is known.
    given = {**options(weed, proxy.server_port), "client_kwargs": {"region_name": "us-east-1"}}
    store = FsspecStore(f"{weed.url}/pieces", given, RetryPolicy(deadline_s=30, attempts=6))
    proxy.fault = times(4, fault)
    assert store.put("blob", [memoryview(piece) for piece in pieces]) == sum(sizes)
    assert proxy.faults > 0
    assert store.get("blob") == b"".join(pieces)
