"""What the sessions of s3fs's filesystems share: botocore's descriptions of the services, never a secret."""

from __future__ import annotations

from typing import Any

# By the directories that they are read from (botocore's ``data_path``), botocore's loaders, which keep what
# they have read.
_loaders: dict[str, Any] = {}


def share_descriptions(filesystem: Any) -> None:
    """Give an S3FileSystem without a session one of its own that reads no description a second time.

    To parse them takes a session 50 to 100 ms, which is most of opening a run. Whatever does not work out is
    left to s3fs, which says what is wrong when it makes the session itself.
    """
    if filesystem.session is not None:
        return
    try:
        from aiobotocore.session import AioSession

        session = AioSession(**filesystem.kwargs)
        place = str(session.get_config_variable("data_path"))
        loader = _loaders.setdefault(place, session.get_component("data_loader"))
        session.register_component("data_loader", loader)
    except Exception:
        return
    filesystem.session = session
