"""Rows of requests that were not chosen are left out before anything is copied."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tlcore
from tests.sinks import MemorySink
from tlcore.config.configuration import load_config
from tlcore.engine.hooks.row_filter import Cut
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session

# Three requests of 2, 1 and 3 tokens, of which the first and the last are kept, and 2 rows of padding.
CUT = Cut([(0, 2), (3, 3)], 6, 2, [0, 2], 3)


@pytest.mark.parametrize("length", [6, 8])
def test_token_rows_are_kept_and_padding_left_out(length: int) -> None:
    tensor = torch.arange(length * 2.0).view(length, 2)
    assert torch.equal(CUT(tensor), tensor[[0, 1, 3, 4, 5]])


def test_rows_of_requests_are_kept() -> None:
    assert CUT(torch.tensor([[1.0] * 6, [2.0] * 6, [3.0] * 6]))[:, 0].tolist() == [1, 3]


def test_neighbouring_rows_are_not_copied() -> None:
    tensor = torch.arange(12.0).view(6, 2)
    kept = Cut([(1, 2), (3, 1)], 6, 0, [1], 3)(tensor)
    assert kept.tolist() == tensor[1:4].tolist()
    assert kept.data_ptr() == tensor[1].data_ptr()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(7, 2),
        torch.tensor(1.0),
        torch.zeros(3, 6, dtype=torch.int64),
        torch.ones(6, 2).to_sparse(),
        nn.Parameter(torch.ones(6, 2)),
    ],
    ids=["other length", "scalar", "multimodal positions", "sparse", "parameter"],
)
def test_other_tensors_stay_whole(tensor: torch.Tensor) -> None:
    assert CUT(tensor) is tensor


def _session(sink: MemorySink) -> tuple[Session, nn.Module]:
    config = load_config({"log_step_ids": [], "output_dir": "unused", "request_ids": "a"})
    session = Session(config, new_run(config), sink, inline=True)
    model = nn.Sequential(nn.Linear(2, 2))
    session.attach(model)
    return session, model


def test_only_kept_rows_are_captured() -> None:
    sink = MemorySink()
    session, model = _session(sink)
    for cut in (Cut([(5, 1)], 6, 0, [2], 3), Cut([(0, 1)], 4, 0, [0], 3)):
        session.find_cut = lambda cut=cut: cut  # type: ignore[misc]
        session.begin_step()
        x = torch.randn(6, 2) if not sink.steps else torch.randn(4, 2)
        with torch.inference_mode():
            y = model(x)
        session.end_step()
        row = 5 if len(sink.steps) == 1 else 0
        step = f"step_{len(sink.steps) - 1}"
        assert torch.equal(sink.tensors[f"{step}/0/inputs_0_cpu"], x[row : row + 1])
        assert torch.equal(sink.tensors[f"{step}/0/outputs_cpu"], y[row : row + 1])
    session.close()
    assert session.ledger.bytes_captured == session.ledger.bytes_stored == 2 * 2 * 2 * 4


def test_without_rows_nothing_is_stored_and_everything_accounted_for() -> None:
    sink = MemorySink()
    session, model = _session(sink)
    session.begin_step()
    model(torch.ones(6, 2))
    session.end_step()
    session.close()
    assert sink.tensors == {} and session.ledger.balanced
    assert session.ledger.reasons == {"skipped: rows of the requests unknown": 2}


def test_a_step_that_is_not_wanted_is_only_counted() -> None:
    sink = MemorySink()
    session, model = _session(sink)
    session.find_cut = lambda: CUT
    assert not session.begin_step(wanted=False)
    model(torch.ones(6, 2))
    session.end_step()
    assert session.begin_step()
    session.end_step()
    session.close()
    assert [step.step for step in sink.steps] == [1]


@pytest.mark.parametrize("key", [{"rows": "last"}, {"request_ids": ["a"]}, {"sample_rate": 0.5}])
def test_outside_vllm_nobody_knows_the_rows(key: dict[str, object]) -> None:
    with pytest.raises(tlcore.ConfigError, match="only vLLM knows"):
        tlcore.capture(nn.Linear(2, 2), key)


def test_patterns_of_requests_are_checked() -> None:
    with pytest.raises(tlcore.ConfigError, match=r"\$\.request_ids\[1\]: '\(' is not a regular expression"):
        load_config({"request_ids": ["a", "("]})
    assert load_config({"request_ids": "a"}).request_ids == ("a",)
