"""obstore's filesystem for one bucket, which also hands out a range as it came; its own copies each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from obstore.fsspec import FsspecStore
from obstore.store import from_url


class BucketFilesystem(FsspecStore):
    """Its ``_cat_buffer`` is ``_cat_file`` of a range without the copy."""

    def __init__(self, bucket: str, options: Mapping[str, Any]) -> None:
        super().__init__("s3", **options)
        self.dircache.use_listings_cache = False
        self._bucket = bucket
        self._store: Any = from_url(f"s3://{bucket}", **options)

    async def _cat_buffer(self, path: str, start: int, end: int) -> memoryview:
        name = path.removeprefix(f"{self._bucket}/")
        return memoryview(await self._store.get_range_async(name, start=start, end=end))
