"""Patterns that came over HTTP are tried in another process, which ends."""

from __future__ import annotations

import signal
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from tlcore.adapters.vllm.worker import pattern_cost
from tlcore.adapters.vllm.worker.capture import WorkerCapture
from tlcore.adapters.vllm.worker.pattern_cost import _last_tried, check_cost
from tlcore.config.configuration import load_config
from tlcore.errors import CaptureError, ConfigError

NAMES = [f"model.layers.{number}.self_attn.qkv_proj" for number in range(80)]


class Worker:
    def shutdown(self) -> None:
        """As vLLM ends one."""


def test_usual_patterns_are_quick_enough() -> None:
    usual = ["mlp$", r"layers\.\d+\..*proj:0", r"model\.(layers\.(0|1)|embed_tokens)\.?.*", "ü"]
    check_cost(load_config({"module_call_match": usual, "ops": ["self_attn$"]}), NAMES)
    check_cost(load_config({}), NAMES)


@pytest.mark.parametrize(
    ("key", "pattern"),
    [
        ("module_call_match", r"(\w+\.?)+\d!:2"),
        ("ops", r"(.*)*(.*)*(.*)*(.*)*\1!"),
        ("inject.modules", r"(\w+\.?)+\d!"),
    ],
)
def test_one_that_does_not_end_is_refused_with_its_place(key: str, pattern: str) -> None:
    patterns = ["mlp", pattern, "embed"]
    injected = {"inject": {"run": "a", "modules": patterns}}
    config = load_config(injected if key == "inject.modules" else {key: patterns})
    with pytest.raises(ConfigError, match=r"takes more than 0\.2 s, with those before it, on") as told:
        check_cost(config, NAMES)
    assert told.value.path == f"$.{key}[1]"


@pytest.mark.parametrize("kept_back", [False, True], ids=["ignored", "kept back"])
def test_it_ends_where_the_signal_means_nothing_to_the_engine(
    kept_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pattern_cost, "_LONGEST_S", 60.0)
    _last_tried.cache_clear()
    before = signal.getsignal(signal.SIGPROF), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        if kept_back:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
        else:
            signal.signal(signal.SIGPROF, signal.SIG_IGN)
        with pytest.raises(ConfigError, match="takes more than"):
            check_cost(load_config({"module_call_match": ["(a+)+$!"]}), ["a" * 40 + "b"])
    finally:
        signal.signal(signal.SIGPROF, before[0])
        signal.pthread_sigmask(signal.SIG_SETMASK, before[1])


def test_many_that_each_end_have_one_budget_together() -> None:
    slow = [rf"(?:a|b|[^!])*(?:a|[^!])*{number}!" for number in range(400)]
    check_cost(load_config({"module_call_match": slow[:1]}), NAMES)
    with pytest.raises(ConfigError, match="takes more than") as told:
        check_cost(load_config({"module_call_match": slow}), NAMES)
    assert told.value.path != "$.module_call_match[0]"


def test_they_are_tried_on_the_names_of_a_draft_model_too() -> None:
    inner = nn.ModuleDict({"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa": nn.Identity()})
    runner = SimpleNamespace(
        get_model=lambda: nn.Sequential(nn.Identity()), drafter=SimpleNamespace(model=inner)
    )
    parallel = SimpleNamespace(world_size=1)
    worker: Any = Worker()
    worker.rank, worker.model_runner = 0, runner
    worker.vllm_config = SimpleNamespace(parallel_config=parallel)
    config = load_config({"module_call_match": [r"^draft\.(a+)+!"]}).to_json(redact=False)
    with pytest.raises(ConfigError, match=r"\$\.module_call_match\[0\]: the pattern takes more than"):
        WorkerCapture(worker).start({"run_id": "a", "config": config, "over_http": True})


def test_where_nothing_can_be_tried_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("/bin/false", "/nowhere/python"):
        _last_tried.cache_clear()
        monkeypatch.setattr(sys, "executable", program)
        with pytest.raises(CaptureError, match="patterns of the configuration could not be tried"):
            check_cost(load_config({"module_call_match": ["mlp"]}), NAMES)
