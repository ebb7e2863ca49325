"""Compiled engines whose captured steps run eagerly: the same numbers, and compiled steps left compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.adapters.vllm import helpers
from tests.adapters.vllm.eager_steps_script import PROMPTS, TOKENS
from tests.adapters.vllm.helpers import REPOSITORY, agree, run_script
from tests.models import tiny_llama

pytestmark = pytest.mark.slow
SCRIPTS = REPOSITORY / "tests" / "adapters" / "vllm"
EAGER = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from vllm import LLM, SamplingParams
from tests.models import tiny_llama
from tests.adapters.vllm.eager_steps_script import PROMPTS, TOKENS
if __name__ == "__main__":
    llm = LLM(
        str(tiny_llama(2)), enforce_eager=True, max_model_len=256, enable_prefix_caching=False,
        intermediate_log_config={{"output_dir": sys.argv[1], "log_step_ids": []}},
    )
    llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True))
"""


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eager_steps")


@pytest.fixture(scope="module")
def report(output_dir: Path) -> dict[str, Any]:
    """The compiled engine with no capture, with every step captured, and with one."""
    tiny_llama(2)
    return helpers.report(str(SCRIPTS / "eager_steps_script.py"), str(output_dir))


def test_a_captured_step_is_bitwise_what_skip_compiled_gives(
    report: dict[str, Any], output_dir: Path
) -> None:
    captured = tlcore.open_run(report["runs"]["all"])
    reference = torch.load(output_dir / "reference.pt", weights_only=True)
    assert captured.steps == list(range(TOKENS))
    names = {
        name
        for step in captured.steps
        for name in captured.step(step).names
        if "/outputs" in name and "/model/" not in name and "/_root/" not in name
    }
    assert set(reference) == names
    assert len(names) > 75
    different = [name for name in names if not torch.equal(captured.tensor(name), reference[name])]
    assert different == []
    assert report["tokens"]["all"] == report["tokens"]["reference"]
    # The compiled module itself is captured too.
    for step in captured.steps:
        output = captured.tensor(f"step_{step}/model/outputs_cpu")
        assert torch.equal(output, reference[f"step_{step}/model.norm/outputs_0_cpu"])


def test_only_the_selected_step_runs_eagerly(report: dict[str, Any]) -> None:
    assert report["compiled_calls"] == {
        "plain": TOKENS,
        "all": 0,
        "one": TOKENS - 1,
        "after": TOKENS,
        "reference": 0,
    }
    one = tlcore.open_run(report["runs"]["one"])
    assert one.steps == [1]
    # The head itself is an argument of the logits processor.
    assert one.ledger.balanced and one.ledger.reasons == {"skipped: module": 1}
    assert one.ledger.stored == one.ledger.captured - 1 > 50
    assert report["tokens"]["plain"] == report["tokens"]["after"]
    assert [len(tokens) for tokens in report["tokens"]["one"]] == [TOKENS] * len(PROMPTS)


def test_it_agrees_with_enforce_eager_within_tolerance(report: dict[str, Any], output_dir: Path) -> None:
    # In one process all prompts are queued before the first step, as they are in the compiled engine.
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    (output_dir / "eager.py").write_text(EAGER)
    arguments = (str(output_dir / "eager.py"), str(output_dir / "eager"))
    done = run_script(*arguments, environment=one_process)
    assert done.returncode == 0, done.stdout + done.stderr
    (eager,) = map(tlcore.open_run, (output_dir / "eager").iterdir())
    compiled = tlcore.open_run(report["runs"]["all"])
    names = compiled.step(0).names
    assert names == eager.step(0).names
    assert compiled.step(0).calls == eager.step(0).calls
    assert [name for name in names if not agree(compiled.tensor(name), eager.tensor(name))] == []
