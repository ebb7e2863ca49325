"""Takes cached activations from an export. Runs where sae-lens is installed.

``python sae_lens_script.py DIRECTORY TENSOR CONTEXT WIDTH`` prints a JSON line: the rows of a batch.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(directory: str, tensor: str, context: int, width: int) -> dict[str, Any]:
    """A batch of the package's own store."""
    import torch
    from sae_lens.training.activations_store import ActivationsStore

    store: Any = ActivationsStore(
        model=None,
        dataset=None,
        streaming=False,
        hook_name=tensor,
        hook_head_index=None,
        context_size=context,
        d_in=width,
        n_batches_in_buffer=4,
        total_training_tokens=400,
        store_batch_size_prompts=4,
        train_batch_size_tokens=16,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=directory,
    )
    return {"rows": store.next_batch().tolist()}


if __name__ == "__main__":
    found = main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    sys.stdout.write("\nREPORT " + json.dumps(found) + "\n")
