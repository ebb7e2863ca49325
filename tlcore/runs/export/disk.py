"""A directory that `datasets.load_from_disk` opens: Arrow streams and two small documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .export import pyarrow
from .parts import write_parts
from .tables import with_features

_FILE_BYTES = 512 << 20


def write_disk(
    directory: Path, schema: Any, features: Mapping[str, Any], batches: Iterable[Any], identity: str
) -> None:
    """Write record batches; ``identity`` tells this set from others (`datasets` caches by it).

    What is read is given as tensors of torch.
    """
    pa = pyarrow()
    schema = with_features(schema, features)
    made = write_parts(
        batches,
        _FILE_BYTES,
        lambda number: directory / f"part-{number}",
        lambda file: pa.ipc.new_stream(str(file), schema),
    )
    names = []
    for number, part in enumerate(made):
        names.append(f"data-{number:05d}-of-{len(made):05d}.arrow")
        part.rename(directory / names[-1])
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
    (directory / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    (directory / "dataset_info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
