"""`tlcore selftest` on real engines, and faults planted in what they captured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tlcore
from tests.adapters.vllm.helpers import run
from tests.adapters.vllm.of_transformers import KINDS, write_model
from tests.analysis.selftest.planting import ROWS, TENSORS, rewritten
from tests.models import smollm2, tiny_llama, write_tokenizer
from tlcore.adapters.reference import FILE
from tlcore.adapters.selftest import WAYS, judge_way
from tlcore.analysis.selftest.judge import TOLERANCES, Asked, Verdict, judge
from tlcore.analysis.selftest.reference import Reference
from tlcore.reader import Run

pytestmark = pytest.mark.slow


def _tested(model: Path, directory: Path, timeout: float = 1100) -> list[str]:
    done = run("-m", "tlcore", "selftest", str(model), "--keep", str(directory), timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


class Captured:
    """What one self-test has left: each way's runs and requests, and the reference."""

    def __init__(self, directory: Path, lines: list[str]) -> None:
        self.lines = lines
        answers = [json.loads(path.read_text()) for path in directory.glob("*/answer.json")]
        self.ways: dict[str, Any] = {name: way for each in answers for name, way in each["ways"].items()}
        settings = json.loads((directory / "transformers" / "settings.json").read_text())
        layers = load_file(directory / "transformers" / FILE)
        self.reference = Reference(settings["sequences"], {int(n): rows for n, rows in layers.items()})

    def judged(self, way: str, other: Run) -> Verdict:
        asked = [Asked(each["id"], each["tokens"], each["prompt"]) for each in self.ways[way]["requests"]]
        return judge(way, other, asked, self.reference, TOLERANCES["float32"])


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    directory = tmp_path_factory.mktemp("selftest") / "kept"
    return Captured(directory, _tested(tiny_llama(), directory))


def test_every_row_of_every_layer_is_right_in_each_way(captured: Captured) -> None:
    assert [line.split("  ")[0] for line in captured.lines] == list(WAYS)
    assert all(" right  " in line and "4 requests and 4 layers" in line for line in captured.lines)
    assert set(captured.ways) == set(WAYS)


@pytest.mark.parametrize("way", WAYS)
def test_each_planted_fault_is_found(captured: Captured, way: str, tmp_path: Path) -> None:
    found = captured.ways[way]
    source = tlcore.open_run(found["url"])
    assert judge_way(way, found, captured.reference, "float32").right
    # Rewriting alone is no fault.
    assert captured.judged(way, rewritten(source, tmp_path / "same")).right
    for name, change in TENSORS.items():
        verdict = captured.judged(way, rewritten(source, tmp_path / name, change))
        assert verdict.wrong, (way, name)
    for name, plant in ROWS.items():
        if way not in ("alone", "transformers") or (name == "later" and way == "alone"):
            verdict = captured.judged(way, rewritten(source, tmp_path / name, rows=plant))
            assert verdict.problems, (way, name)
    if len(source.steps) > 1:
        fewer = captured.judged(way, rewritten(source, tmp_path / "lost", steps=source.steps[:-2]))
        assert any("missing" in each for each in fewer.problems), way


def test_an_engine_that_does_not_start_is_said_with_its_log(tmp_path: Path) -> None:
    done = run("-m", "tlcore", "selftest", str(tiny_llama()), "--keep", str(tmp_path / "kept"),
               "--ways", "transformers,batched", "--engine-args", '{"max_model_len": 100000}')  # fmt: skip
    assert done.returncode == 1
    one, other = done.stdout.splitlines()
    assert one.startswith("transformers     right")
    assert other.startswith("batched          WRONG  the engine failed: it ended with status 1")
    assert "max_model_len" in done.stderr and (tmp_path / "kept" / "plain" / "log.txt").exists()


@pytest.mark.deep
def test_every_row_of_a_real_model_is_right_in_each_way(tmp_path: Path) -> None:
    lines = _tested(smollm2(), tmp_path / "kept", timeout=4000)
    assert len(lines) == len(WAYS) and all("4 requests and 30 layers" in line for line in lines)


@pytest.mark.deep
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_of_a_model_that_transformers_runs_is_right(kind: str, tmp_path: Path) -> None:
    write_model(kind, tmp_path / "model")
    lines = _tested(tmp_path / "model", tmp_path / "kept")
    assert len(lines) == len(WAYS) and all(" right  " in line and "3 layers" in line for line in lines)


@pytest.mark.deep
def test_a_model_with_sliding_windows_is_chunked_and_preempted(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 512, "sliding_window": 256}
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, **ends)).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    done = run("-m", "tlcore", "selftest", str(tmp_path / "model"), "--ways", "chunked prefill,preempted")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" right  ") == 2
