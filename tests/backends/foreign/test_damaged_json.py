"""JSON files of other tools that are damaged are refused by name, however they are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tlcore
from tlcore.errors import ReadError

DAMAGE = {
    "deep_list": b"[" * 100_000,
    "deep_object": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "cut": b'{"a": 1',
    "no_text": b"\xff\xfe\x00",
    "empty": b"",
}
# For each tool the file that is damaged, and what lies beside it.
TOOLS: dict[str, tuple[str, dict[str, bytes | None]]] = {
    "debugger": ("M_debug_tree_FULL_TENSORS.json", {}),
    "neuron": ("capture_metadata.json", {"captured_tensors_tokens_step_1_module_a_output.pt": None}),
    "msprobe": ("step0/rank0/dump.json", {"step0/rank0/construct.json": b"{}"}),
    "saelens": ("state.json", {"dataset_info.json": b"{}", "data-00000-of-00001.arrow": b""}),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_damaged_file_is_named(tool: str, damage: str, tmp_path: Path) -> None:
    name, beside = TOOLS[tool]
    for other, data in {name: DAMAGE[damage], **beside}.items():
        file = tmp_path / other
        file.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            torch.save(torch.ones(2), file)
        else:
            file.write_bytes(data)
    with pytest.raises(ReadError, match="damaged, not JSON") as raised:
        _ = tlcore.open_run(tmp_path).step(0).names
    assert f"{tmp_path / name}: " in str(raised.value)
