"""Uploads in parts that nobody finished: found on a real server, and ended."""

from __future__ import annotations

import json

import fsspec
import pytest

from tests.servers import Server
from tlcore.__main__ import main
from tlcore_backends.storage.leftovers import leftovers

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
