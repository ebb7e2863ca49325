"""The switches that let one step run eagerly, on vLLM's own runner classes; no GPU is needed for that."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from tlcore.adapters.vllm.compiled.eager_steps import EagerSteps, when_pass_begins
from tlcore.errors import CaptureError

pytestmark = pytest.mark.slow


def _first_runner() -> Any:
    """A runner of the first version without its set-up, whose choice of a graph can be seen."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    class Runner(GPUModelRunner):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        def _determine_batch_execution_and_padding(self, *args: Any, force_eager: bool = False) -> bool:
            return force_eager

    return Runner()


def test_the_first_runner_is_told_to_choose_no_graph_in_an_eager_step() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    known = inspect.signature(GPUModelRunner._determine_batch_execution_and_padding).parameters
    assert "force_eager" in known
    runner = _first_runner()
    eager = EagerSteps(runner)
    assert runner._determine_batch_execution_and_padding(8) is False
    with eager.step():
        assert runner._determine_batch_execution_and_padding(8) is True
    assert runner._determine_batch_execution_and_padding(8) is False


def test_the_second_runner_chooses_no_graph_in_an_eager_step() -> None:
    from vllm.v1.worker.gpu import model_runner as module

    eager = EagerSteps(object.__new__(module.GPUModelRunner))
    with eager.step():
        description, _ = module.dispatch_cg_and_sync_dp(None, 2, 7, None, 1, 0)
    assert (description.cg_mode.name, description.num_tokens) == ("NONE", 7)
    # Outside it asks the manager of the graphs, which is not there.
    with pytest.raises(AssertionError, match="cudagraph_manager"):
        module.dispatch_cg_and_sync_dp(None, 2, 7, None, 1, 0)


def test_a_forward_pass_of_an_eager_step_skips_what_is_compiled() -> None:
    import vllm.forward_context
    from vllm.config import VllmConfig
    from vllm.forward_context import get_forward_context, set_forward_context

    class Told:
        count = 0

        def tell(self) -> None:
            self.count += 1

    eager, config, told = EagerSteps(_first_runner()), VllmConfig(), Told()
    when_pass_begins(told.tell)
    with set_forward_context(None, config):
        assert not get_forward_context().skip_compiled
    with eager.step():
        assert not eager.ran
        with set_forward_context(None, config):
            assert get_forward_context().skip_compiled
    assert eager.ran
    assert told.count == 2
    del told
    with set_forward_context(None, config):
        assert not get_forward_context().skip_compiled
    assert vllm.forward_context._forward_context is None


def test_an_unknown_runner_stops_the_start_naming_the_version() -> None:
    import vllm

    with pytest.raises(CaptureError, match=rf"does not know vLLM {vllm.__version__}: object does not let"):
        EagerSteps(object())
