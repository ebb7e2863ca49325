"""Opens exports with `datasets` and pandas. Runs where both are installed.

``python datasets_script.py DIRECTORY TENSOR`` (which has hf, arrow, requests and parquet) prints a JSON line.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(directory: str, tensor: str) -> dict[str, Any]:
    """The sums of all that each of them reads, and of the first item what tells it from others."""
    import datasets
    import pandas
    import torch

    hub = datasets.load_dataset(f"{directory}/hf", split="train").with_format("torch")
    boxes = datasets.load_from_disk(f"{directory}/arrow")
    frame = pandas.read_parquet(f"{directory}/parquet")
    rows = torch.tensor(frame[tensor].tolist())
    return {
        "hf": [len(hub), float(torch.cat(list(hub[:][tensor])).double().sum()), hub[0]["token_ids"].tolist()],
        "arrow": [len(boxes), float(boxes[:][tensor].double().sum()), list(boxes[0][tensor].shape)],
        "parquet": [len(frame), float(rows.double().sum()), list(frame.columns)],
        "requests": len(datasets.load_from_disk(f"{directory}/requests")),
    }


if __name__ == "__main__":
    sys.stdout.write("\nREPORT " + json.dumps(main(*sys.argv[1:])) + "\n")
