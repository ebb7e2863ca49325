"""Taps in vLLM's compiled models: the numbers, and vLLM's compilation caches, cold, warm and changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.adapters.vllm.helpers import REPOSITORY, SEVERAL_RANKS, agree, all_stored, report
from tests.adapters.vllm.taps_script import TOKENS
from tests.models import smollm2, tiny_llama

pytestmark = pytest.mark.slow
# Each is compiled by itself, which takes most of the time.
LAYERS = 2
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "taps_script.py")


def _captured(
    directory: Path,
    model: Path,
    mode: str,
    cache: Path,
    dtype: str = "auto",
    options: Mapping[str, Any] | None = None,
    **keys: Any,
) -> tuple[dict[str, Any], tlcore.Run]:
    """The script's report and the run that it captured."""
    config = {"output_dir": str(directory), "compiled": "taps", "log_step_ids": [], **keys}
    made = report(
        SCRIPT,
        str(model),
        json.dumps(config),
        mode,
        dtype,
        json.dumps(options or {}),
        timeout=900,
        environment={"VLLM_CACHE_ROOT": str(cache), **(SEVERAL_RANKS if options else {})},
    )
    (found,) = map(tlcore.open_run, directory.iterdir())
    assert found.ledger.balanced
    return made, found


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("taps")


@pytest.fixture(scope="module")
def cold(places: Path) -> tuple[dict[str, Any], tlcore.Run]:
    """The first start, which compiles."""
    return _captured(places / "cold", tiny_llama(LAYERS), "piecewise", places / "cache")


@pytest.fixture(scope="module")
def eager(places: Path) -> tlcore.Run:
    return _captured(places / "eager", tiny_llama(LAYERS), "eager", places / "cache")[1]


def _differing(one: tlcore.Run, other: tlcore.Run, step: int) -> list[str]:
    names = one.step(step).names
    assert names == other.step(step).names
    assert one.step(step).calls == other.step(step).calls
    return [name for name in names if not agree(one.tensor(name), other.tensor(name))]


def test_taps_agree_with_eager_mode(cold: tuple[dict[str, Any], tlcore.Run], eager: tlcore.Run) -> None:
    made, tapped = cold
    assert (made["compiled"], made["loaded"]) == (1, 0)
    assert tapped.steps == list(range(TOKENS))
    assert all_stored(tapped.ledger) and tapped.ledger.stored == eager.ledger.stored > 100 * LAYERS
    assert _differing(tapped, eager, 0) == []
    assert [row["rows"] for row in tapped.step(1).rows or ()] == [1, 1]


def test_a_warm_start_with_other_volatile_keys_loads_the_taps(
    cold: tuple[dict[str, Any], tlcore.Run], places: Path
) -> None:
    made, warm = _captured(
        places / "warm",
        tiny_llama(LAYERS),
        "piecewise",
        places / "cache",
        log_step_ids=[0, 2],
        queue_bytes=1 << 26,
    )
    assert (made["compiled"], made["loaded"]) == (0, 1)
    assert made["tokens"] == cold[0]["tokens"]
    assert warm.steps == [0, 2]
    assert all_stored(warm.ledger) and warm.ledger.stored > 50 * LAYERS
    for step in warm.steps:
        for name in cold[1].step(step).names:
            assert torch.equal(warm.tensor(name), cold[1].tensor(name)), name


def test_another_choice_of_modules_is_compiled_anew(
    cold: tuple[dict[str, Any], tlcore.Run], places: Path
) -> None:
    made, other = _captured(
        places / "other",
        tiny_llama(LAYERS),
        "piecewise",
        places / "cache",
        module_call_match=[r"mlp$", "norm:1"],
    )
    assert (made["compiled"], made["loaded"]) == (1, 0)
    assert set(other.step(0).calls) == {f"model.layers.{i}.mlp" for i in range(LAYERS)}
    assert other.ledger.failed == 0
    assert other.ledger.stored == other.ledger.captured == TOKENS * LAYERS * 2


def test_values_within_a_forward_come_out_of_compiled_code(
    cold: tuple[dict[str, Any], tlcore.Run], places: Path
) -> None:
    # What vLLM knows of the model's class, which it asks a new process for.
    shutil.copytree(places / "cache" / "modelinfos", places / "cache_shows" / "modelinfos")

    def captured(name: str, mode: str) -> tuple[dict[str, Any], tlcore.Run]:
        patterns = [r"\.tap\.", r"model\.norm$"]
        options, cache = {"shows": True}, places / "cache_shows"
        model = tiny_llama(LAYERS)
        return _captured(places / name, model, mode, cache, "auto", options, module_call_match=patterns)

    _, eager = captured("shows_eager", "eager")
    # Whether compiled or loaded, there is one whole model.
    for name in ("shows_first", "shows_again"):
        made, tapped = captured(name, "piecewise")
        assert made["compiled"] + made["loaded"] == 1
        assert all_stored(tapped.ledger) and tapped.ledger.stored == eager.ledger.stored
        assert _differing(tapped, eager, 0) == []
        directory = f"step_0/model.layers.{LAYERS - 1}.mlp"
        assert {f"{directory}/tap.gated", f"{directory}/tap.gated_1"} <= _bare(tapped.step(0).names)
        assert "step_0/model/tap.hidden" in _bare(tapped.step(0).names)


def _bare(names: Iterable[str]) -> set[str]:
    """Names without their device."""
    return {name.removesuffix("_cpu") for name in names}


@pytest.mark.deep
def test_taps_agree_with_eager_mode_on_all_tensors_of_a_real_model(places: Path) -> None:
    # In bfloat16 the roundings of thirty layers add up to per cents; float32 leaves a mistake no room.
    def captured(name: str, mode: str) -> tlcore.Run:
        cache = places / "cache"
        return _captured(places / name, smollm2(), mode, cache, dtype="float32", log_step_ids=[0])[1]

    eager = captured("real_eager", "eager")
    for start in ("real_cold", "real_warm"):
        tapped = captured(start, "plain")
        assert all_stored(tapped.ledger) and tapped.ledger.stored == eager.ledger.stored > 1000
        assert _differing(tapped, eager, 0) == []


@pytest.mark.deep
@pytest.mark.parametrize("kind", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_taps_agree_with_eager_mode_on_two_ranks(kind: str, places: Path) -> None:
    def captured(mode: str) -> tlcore.Run:
        options = {kind: 2}
        return _captured(places / f"{kind}_{mode}", tiny_llama(), mode, places / "ranks", options=options)[1]

    eager, tapped = captured("eager"), captured("plain")
    assert (tapped.state, tapped.world_size, tapped.ranks) == ("complete", 2, eager.ranks)
    names = set(eager.step(0).names)
    # What one stage sends to the next is an object that taps do not reach into.
    untapped = {name for name in names if name.startswith("step_0/model/")} - set(tapped.step(0).names)
    assert bool(untapped) == (kind == "pipeline_parallel_size")
    assert set(tapped.step(0).names) == names - untapped and len(names) > 150
    assert tapped.ledger.failed == 0
    for name in names - untapped:
        assert agree(tapped.tensor(name), eager.tensor(name)), name
