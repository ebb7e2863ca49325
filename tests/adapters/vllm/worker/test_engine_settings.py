"""What a run says of the engine's kernels, and that a configuration of another form harms nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tlcore.adapters.vllm.worker.engine_settings import engine_settings


@pytest.mark.slow
def test_vllms_own_configuration_tells_which_kernels_compute() -> None:
    from vllm.config import CompilationConfig, VllmConfig

    eager = VllmConfig(compilation_config=CompilationConfig(mode=0, custom_ops=["all"]))
    found = engine_settings(eager)
    assert (found["compilation"], found["custom_ops"]) == ("NONE", "all")
    assert {"cudagraphs", "kv_cache_dtype"} <= set(found) and all(
        type(each) is str for each in found.values()
    )
    compiled = engine_settings(VllmConfig(compilation_config=CompilationConfig(mode=3, custom_ops=["none"])))
    assert {key for key in found if found[key] != compiled[key]} >= {"compilation", "custom_ops"}


def test_what_another_release_lacks_is_left_out() -> None:
    config = SimpleNamespace(cache_config=SimpleNamespace(cache_dtype="auto"), compilation_config=None)
    assert engine_settings(config) == {"kv_cache_dtype": "auto"}
