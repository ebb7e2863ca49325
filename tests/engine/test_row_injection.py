"""Results of another run put in place row by row, as a runner of many requests tells whose they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.ranked import ranks_run
from tlcore.config.configuration import Inject, load_config
from tlcore.engine.filters.rows import Given, StepRows
from tlcore.engine.new_run import new_run
from tlcore.engine.row_injection import RowInjection
from tlcore.engine.session import Session
from tlcore.layout.rows import RowSet
from tlcore.reader import Run

PROMPTS = {"a": [5, 6, 7, 8], "b": [5, 6], "c": [9, 9, 9]}


class Doubled(nn.Module):
    """Its result can be told from what it is given; with a ``fault`` it is another."""

    def __init__(self, fault: float = 0.0) -> None:
        super().__init__()
        self.inner = Inner(fault)

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)


class Inner(nn.Module):
    def __init__(self, fault: float) -> None:
        super().__init__()
        self.fault = fault
        self.dtype = torch.float32

    def forward(self, x: torch.Tensor) -> Any:
        parts = x * 2 + self.fault, x.sum(-1, keepdim=True) + self.fault
        one, other = (part.to(self.dtype) for part in parts)
        return one, (other, None)


class Engine:
    """Steps of a model whose rows are requests': ``(id, first position, tokens, apart, drafts)``.

    Where it is ``batched``, the model is given them as a batch of one sample.
    """

    batched = False

    def __init__(
        self, output_dir: Path, fault: float = 0.0, ranks: Any = None, rank: int = 0, **keys: Any
    ) -> None:
        config = load_config(output_dir=str(output_dir), log_step_ids=[], backend="safetensors", **keys)
        run = new_run(config, rank, len(ranks or "a"), None if ranks is None else output_dir.name)
        run.document.update({} if ranks is None else {"ranks": ranks})
        self.session = Session(config, run, of_requests=True)
        self.model = Doubled(fault)
        self.session.attach(self.model)

    def step(self, *rows: tuple[Any, ...], captured: bool = True) -> Any:
        entries, given, first = [], [], 0
        for request, position, tokens, *more in rows:
            prompt = PROMPTS[request[0]]
            entry = {
                "request_id": request, "external_request_id": None, "first_row": first,
                "rows": len(tokens), "first_position": position, "prompt_hash": f"h{request[0]}",
                **({"drafts": more[1]} if len(more) > 1 else {}),
            }  # fmt: skip
            entries.append(entry)
            given.append(Given(entry, tokens, len(prompt), more[0] if more else True))
            first += len(tokens)
        x = torch.tensor([[float(token), 1.0] for _, _, tokens, *_ in rows for token in tokens])
        session = self.session
        assert session.begin_step(wanted=captured) == captured
        injection = session.row_injection
        if captured:
            session.rows.batch([entry["request_id"] for entry in entries])
            session.rows.enter([RowSet("tokens", entries, batched=self.batched)], main=True)
        if injection is not None:
            if captured:
                injection.batch(given)
            else:
                injection.passed_by([entry["request_id"] for entry in entries])
        found = self.model(x[None] if self.batched else x)[0]
        tokens = [
            {"request_id": r, "first_position": p, "ids": list(ids), "prompt": len(PROMPTS[r[0]])}
            for r, p, ids, *_ in rows
        ]
        session.end_step(tokens=lambda: tokens)
        return found.movedim(-2 if self.batched else 0, 0).flatten(1)[:, 0].tolist()

    def close(self) -> Any:
        self.session.close()
        assert self.session.ledger.balanced
        return tlcore.open_run(self.session.url)


@pytest.fixture
def other(tmp_path: Path) -> Any:
    """a: 5 6 7 8 | 1 2; b: 5 6 | 3; c: 9 9 9."""
    engine = Engine(tmp_path / "a")
    engine.step(("a", 0, [5, 6]), ("c", 0, [9, 9, 9]))
    engine.step(("a", 2, [7, 8]), ("b", 0, [5, 6]))
    engine.step(("b", 2, [3]), ("a", 4, [1]))
    engine.step(("a", 5, [2]))
    return engine.close()


def injecting(other: Any, tmp_path: Path, **keys: Any) -> Engine:
    return Engine(tmp_path / "b", 100.0, inject={"run": other.url, "modules": ["^inner$"]}, **keys)


def told(run: Any) -> list[dict[str, Any]]:
    return [run.step(number).documents[0]["injected"] for number in run.steps]


def test_rows_are_put_in_place_whatever_the_batch(other: Any, tmp_path: Path) -> None:
    engine = injecting(other, tmp_path)
    assert engine.step(("b", 0, [5, 6]), ("a", 0, [5, 6, 7])) == [10, 12, 10, 12, 14]
    assert engine.step(("a", 3, [8]), ("c", 0, [9, 9]), ("b", 2, [3])) == [16, 18, 18, 6]
    assert engine.step(("a", 4, [1]), ("c", 2, [9])) == [2, 18]
    run = engine.close()
    assert [each["rows"] for each in told(run)] == [5, 4, 2]
    assert not any(each["left_out"] for each in told(run))
    assert torch.equal(run.request("a")["inner/outputs_1_0_cpu"].flatten()[:4], torch.tensor([6.0, 7, 8, 9]))
    assert run.injected["run_id"] == other.id


def test_rows_of_one_sample_are_put_in_place(other: Any, tmp_path: Path) -> None:
    """Those of another run whose tensors have them in front."""
    engine = injecting(other, tmp_path)
    engine.batched = True
    assert engine.step(("b", 0, [5, 6]), ("a", 0, [5, 6, 7])) == [10, 12, 10, 12, 14]
    assert engine.step(("a", 3, [8])) == [16]
    assert engine.step(("a", 4, [4])) == [108]
    run = engine.close()
    assert [each["rows"] for each in told(run)] == [5, 1, 0]
    sums = run.request("a")["inner/outputs_1_0_cpu"]
    assert torch.equal(sums, torch.tensor([[6.0], [7], [8], [9], [105]]))


def test_rows_behind_heads_are_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sample the heads come before the positions, which come before the heads in the other run."""

    def forward(self: Inner, x: torch.Tensor) -> Any:
        return ((x * 2 + self.fault).unsqueeze(-3 if x.dim() == 3 else -2).expand(heads[x.dim()]).clone(),)

    heads = {2: (-1, 3, -1), 3: (-1, 3, -1, -1)}
    monkeypatch.setattr(Inner, "forward", forward)
    engine = Engine(tmp_path / "a")
    engine.step(("a", 0, [5, 6]), ("b", 0, [5, 6]))
    engine = injecting(engine.close(), tmp_path)
    engine.batched = True
    assert engine.step(("b", 0, [5, 6]), ("a", 0, [5, 6])) == [10, 12, 10, 12]
    run = engine.close()
    assert run.tensor("step_0/inner/outputs_0_cpu").shape == (1, 3, 4, 2)
    rows = run.request("a")["inner/outputs_0_cpu"]
    assert torch.equal(rows[:, :, 0], torch.tensor([[10.0] * 3, [12.0] * 3]))


def test_rows_of_another_dtype_are_counted_where_they_are_rounded(tmp_path: Path) -> None:
    engine = Engine(tmp_path / "a", fault=0.001)
    engine.step(("a", 0, [5, 6, 7, 8]))
    other = engine.close()
    engine = injecting(other, tmp_path)
    engine.model.inner.dtype = torch.bfloat16
    assert engine.step(("a", 0, [5, 6, 7])) == [10, 12, 14]
    engine.model.inner.dtype = torch.int64
    assert engine.step(("a", 3, [8])) == [116]
    run = engine.close()
    first, second = told(run)
    assert first["rounded"] == {"float32 to bfloat16": 3} and first["rows"] == 3
    assert second["left_out"] == {"the other run's result is float32, and its own int64": 1}
    (remark,) = (each for each in engine.session.remarks if "rounded" in each)
    assert "3 rows of results were rounded from float32 to bfloat16" in remark


def test_rows_that_overflow_are_counted_apart(tmp_path: Path) -> None:
    engine = Engine(tmp_path / "a")
    engine.step(("a", 0, [5, 70000, 3, 70000]))
    other = engine.close()
    engine = injecting(other, tmp_path)
    engine.model.inner.dtype = torch.float16
    engine.step(("a", 0, [5, 70000, 3, 70000]))
    (first,) = told(engine.close())
    assert first["overflowed"] == {"float32 to float16": 2} and "rounded" not in first and first["rows"] == 4


def test_it_goes_as_far_as_the_tokens_are_the_same(other: Any, tmp_path: Path) -> None:
    engine = injecting(other, tmp_path)
    engine.step(("a", 0, [5, 6, 7, 8]))
    assert engine.step(("a", 4, [4])) == [108]
    # That a later token is the same again does not help.
    assert engine.step(("a", 5, [2])) == [104]
    assert [list(each["left_out"]) for each in told(engine.close())] == [
        [],
        ["its tokens are others than in the other run"],
        ["a position before it was not injected, was cached, or was not in a captured step"],
    ]


def test_drafts_are_injected_where_they_are_the_other_runs_tokens(other: Any, tmp_path: Path) -> None:
    engine = injecting(other, tmp_path)
    engine.step(("a", 0, [5, 6, 7, 8]))
    # The second draft is wrong, and computed again when it was rejected.
    assert engine.step(("a", 4, [1, 7, 2], True, 2)) == [2, 114, 104]
    assert engine.step(("a", 5, [2])) == [4]
    rows = [each["rows"] for each in told(engine.close())]
    assert rows == [4, 1, 1]


def test_after_a_preemption_it_begins_anew(other: Any, tmp_path: Path) -> None:
    engine = injecting(other, tmp_path)
    engine.step(("a", 0, [5, 6, 7]))
    assert engine.step(("a", 0, [5, 6])) == [10, 12]
    assert engine.step(("a", 2, [7, 8, 1])) == [14, 16, 2]
    assert engine.step(("a", 4, [1, 2])) == [2, 4]
    engine.close()


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (("a", 2, [7, 8]), "a position before it was not injected"),
        (("a", 0, [5, 6], False), "without a cache salt of its own"),
        (("d", 0, [5, 6]), "no request of the other run"),
    ],
    ids=["cached", "shared", "unknown"],
)
def test_what_is_not_injected_keeps_its_own_and_is_counted(
    other: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Any, why: str
) -> None:
    monkeypatch.setitem(PROMPTS, "d", [5, 6])
    engine = injecting(other, tmp_path)
    assert engine.step(rows, ("c", 0, [9, 9, 9])) == [*(100 + 2 * each for each in rows[2]), 18, 18, 18]
    (found,) = told(engine.close())
    assert found["rows"] == 3 and list(found["left_out"].values()) == [2]
    assert why in next(iter(found["left_out"]))


def test_a_step_that_is_not_captured_ends_it(other: Any, tmp_path: Path) -> None:
    engine = injecting(other, tmp_path)
    engine.step(("a", 0, [5, 6]))
    engine.step(("a", 2, [7, 8]), captured=False)
    assert engine.step(("a", 0, [5, 6]), ("b", 0, [5, 6])) == [110, 112, 10, 12]
    (reason,) = told(engine.close())[-1]["left_out"]
    assert reason == "a step of it was not captured"


def test_of_several_requests_with_one_prompt_each_gets_one(other: Any, tmp_path: Path) -> None:
    engine = injecting(other, tmp_path)
    assert engine.step(("a", 0, [5]), ("a2", 0, [5])) == [10, 110]
    (found,) = told(engine.close())
    assert found["left_out"] == {"no request of the other run, or no other one, has its prompt": 1}


def test_positions_that_the_other_run_has_not_end_it(tmp_path: Path) -> None:
    engine = Engine(tmp_path / "a")
    engine.step(("a", 0, [5, 6]))
    engine.step(("a", 2, [7]), captured=False)
    engine.step(("a", 3, [8]))
    with_gap = injecting(engine.close(), tmp_path)
    assert with_gap.step(("a", 0, [5, 6, 7, 8])) == [10, 12, 114, 116]
    (found,) = told(with_gap.close())
    assert found["left_out"] == {"the other run has no result of this position": 2}


def test_rows_that_nobody_knows_are_not_injected(other: Any, tmp_path: Path) -> None:
    engine = injecting(other, tmp_path)
    assert engine.session.begin_step()
    assert engine.model(torch.tensor([[5.0, 1.0]]))[0].tolist() == [[110, 102]]
    engine.session.end_step()
    (found,) = told(engine.close())
    assert found == {"calls": 0, "rows": 0, "left_out": {"whose rows its result has is not known": 1}}


def test_rows_of_a_module_that_gives_nothing_are_counted(
    other: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that writes into its arguments."""
    monkeypatch.setattr(Inner, "forward", lambda self, x: None)
    engine = injecting(other, tmp_path)
    session = engine.session
    assert session.begin_step() and session.row_injection is not None
    entry = {"request_id": "a", "first_row": 0, "rows": 2, "first_position": 0, "prompt_hash": "ha"}
    session.rows.batch(["a"])
    session.rows.enter([RowSet("tokens", [entry])], main=True)
    session.row_injection.batch([Given(entry, [5, 6], 4, True)])
    assert engine.model(torch.ones(2, 2)) is None
    session.end_step()
    (found,) = told(engine.close())
    assert found == {"calls": 0, "rows": 0, "left_out": {"its result has no tensor": 2}}


def test_what_an_encoder_gives_is_left_to_it(other: Any, tmp_path: Path) -> None:
    engine = injecting(other, tmp_path)
    engine.step(("c", 0, [9, 9, 9]))
    session = engine.session
    assert session.begin_step() and session.row_injection is not None
    entry = {"request_id": "a", "first_row": 0, "rows": 2, "first_position": 0, "prompt_hash": "ha"}
    session.rows.batch(["a"])
    session.row_injection.batch([Given(entry, [5, 6], 4, True)])
    session.rows.enter([RowSet("item_tokens", [entry])])
    # Other requests with the same item get it from the encoder's cache.
    assert engine.model(torch.tensor([[5.0, 1.0], [6.0, 1.0]]))[0][:, 0].tolist() == [110, 112]
    session.end_step()
    found = told(engine.close())[-1]
    assert found["rows"] == 0
    assert found["left_out"] == {"an encoder's results are kept for all requests with the same item": 2}


def test_a_request_that_cannot_be_read_keeps_its_own_and_the_others_are_injected(
    other: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, request = injecting(other, tmp_path), Run.request

    def damaged(self: Run, request_id: str) -> Any:
        if request_id == "a":
            raise tlcore.ReadError("damaged")
        return request(self, request_id)

    monkeypatch.setattr(Run, "request", damaged)
    assert engine.step(("a", 0, [5, 6]), ("b", 0, [5, 6])) == [110, 112, 10, 12]
    assert engine.step(("a", 2, [7]), ("b", 2, [3])) == [114, 6]
    run = engine.close()
    why = "its request of the other run could not be read (ReadError)"
    assert [each["left_out"] for each in told(run)] == [{why: 2}, {why: 1}]


def test_what_a_rank_has_not_is_injected_into_none(tmp_path: Path) -> None:
    ranks = [dict(place) for place in ranks_run(tmp_path, [{"a": torch.ones(2)}] * 2, {}).ranks.values()]
    for rank in (0, 1):
        # The second rank skips what has more than three rows.
        keys = {"max_tensor_size": 7} if rank else {}
        engine = Engine(tmp_path / "a", ranks=ranks, rank=rank, **keys)
        engine.step(("a", 0, [5, 6]))
        engine.step(("a", 2, [7, 8]), ("b", 0, [5, 6]))
        other = engine.close()
    assert other.world_size == 2 and other.steps == [0, 1]
    for rank in (0, 1):
        engine = injecting(other, tmp_path, ranks=ranks, rank=rank)
        assert engine.step(("a", 0, [5, 6, 7, 8])) == [10, 12, 114, 116], rank
        injection = engine.session.row_injection
        assert injection is not None
        assert injection.left_out == {"the other run has no result of this position": 2}
        engine.session.close()


def test_whichever_engine_had_a_request_then_it_is_injected(tmp_path: Path) -> None:
    alone = {
        f"{group}_{what}": int(what == "size") for group in ("tp", "pcp", "pp") for what in ("rank", "size")
    }
    ranks = [{"rank": rank, **alone, "dp_rank": rank, "dp_size": 2} for rank in (0, 1)]
    for rank, request in enumerate("ba"):
        engine = Engine(tmp_path / "a", ranks=ranks, rank=rank)
        engine.step((request, 0, [5, 6]))
        other = engine.close()
    engine = injecting(other, tmp_path, ranks=ranks)
    assert engine.step(("b", 0, [5, 6]), ("a", 0, [5, 6])) == [10, 12, 10, 12]
    engine.session.close()


def test_a_run_of_other_ranks_is_refused(other: Any) -> None:
    config = load_config({})
    with pytest.raises(
        tlcore.ConfigError, match=r"\$\.inject\.run: that run is of 1 ranks, and this one of 2"
    ):
        RowInjection(Inject(other.url, ("a",)), new_run(config, world_size=2), StepRows())


def test_a_run_whose_ranks_share_the_model_otherwise_is_refused(tmp_path: Path) -> None:
    other = ranks_run(tmp_path, [{"a": torch.ones(2, 2)}] * 2, {})
    config, inject = load_config({}), Inject(other.url, ("a",))
    run = new_run(config, world_size=2)
    run.document["ranks"] = [dict(place) for place in other.ranks.values()]
    assert RowInjection(inject, run, StepRows()).document["run_id"] == other.id
    for place in run.document["ranks"]:
        place.update(pp_rank=place["tp_rank"], pp_size=2, tp_rank=0, tp_size=1)
    with pytest.raises(
        tlcore.ConfigError, match=r"\$\.inject\.run: the ranks of that run share the model in"
    ):
        RowInjection(inject, run, StepRows())
