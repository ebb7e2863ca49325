"""A directory that `datasets.load_from_disk` opens: Arrow streams and two small documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .target import Target

FILE_BYTES = 512 << 20


def table_name(number: int, count: int) -> str:
    """The name of one of so many Arrow streams."""
    return f"data-{number:05d}-of-{count:05d}.arrow"


def write_documents(target: Target, names: Sequence[str], features: Mapping[str, Any], identity: str) -> None:
    """Write what makes a data set of Arrow streams, which is read as tensors of torch.

    ``identity`` tells it from others: `datasets` caches by it.
    """
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": hashlib.sha256(identity.encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": "torch",
        "_output_all_columns": False,
        "_split": None,
    }
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    target.document("dataset_info.json", json.dumps(info, indent=1))
    target.document("state.json", json.dumps(state, indent=1))
