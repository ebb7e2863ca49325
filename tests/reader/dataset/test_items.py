"""What the items of a data set are, held against the rows that `run.request` gives of each request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.engine.samples import LAYER, LOGITS, PROMPTS, generated, llama, padded, run_of
from tests.ranked import Rows, json_rows, requests_run
from tests.reader.dataset.served import NAMES, Served, seen
from tlcore.errors import MissingError, ReadError

BACKENDS: dict[str, Any] = {
    "pt": "pt",
    "segments": "safetensors",
    "shards": {"name": "safetensors", "layout": 1},
}


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Any:
    return BACKENDS[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_is_there_once_with_its_newest_row(
    backend: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    served = Served()
    run = served.run(tmp_path, backend, dtype)
    data = run.dataset(NAMES)
    found = {seen(item): item for item in data}
    assert len(found) == len(data) == sum(map(len, served.ids.values()))
    assert not data.left_out and data.requests == list(run.requests)
    for number, request_id in enumerate(data.requests):
        request = run.request(request_id)
        rows = request["layers_0/outputs_cpu"]
        assert rows.dtype is dtype and len(rows) == len(served.ids[request_id])
        for position, row in enumerate(rows):
            item = found[number, position]
            assert torch.equal(item[NAMES[0]], row)
            assert int(item["token_ids"]) == served.ids[request_id][position]
            assert bool(item["response"]) == (position >= served.prompts[request_id])


@pytest.mark.parametrize(
    "rows", ["prompt", "response", {"from": -1, "to": "prompt"}, {"from": 2, "to": 4}], ids=repr
)
def test_a_window_chooses_positions_of_each_request(backend: Any, rows: Any, tmp_path: Path) -> None:
    served = Served()
    data = served.run(tmp_path, backend).dataset(NAMES[0], rows=rows)
    expected = set()
    for number, (request_id, ids) in enumerate(served.ids.items()):
        prompt, all_of_it = served.prompts[request_id], range(len(ids))
        begin, end = {
            "prompt": (0, prompt),
            "response": (prompt, len(ids)),
        }.get(str(rows), (prompt - 1, prompt) if "from" in rows and rows["from"] == -1 else (2, 4))
        expected |= {(number, position) for position in all_of_it[begin:end]}
    numbers = [list(served.ids).index(each) for each in data.requests]
    assert sorted((numbers[request], position) for request, position in map(_place, data)) == sorted(expected)
    there = {number for number, _ in expected}
    empty = {each for number, each in enumerate(served.ids) if number not in there}
    assert data.left_out == dict.fromkeys(empty, "it has no rows at these positions")


def _place(item: Any) -> tuple[int, int]:
    return int(item["request"]), int(item["positions"])


def test_whole_requests_are_the_rows_that_a_request_has(backend: Any, tmp_path: Path) -> None:
    served = Served()
    run = served.run(tmp_path, backend)
    data = run.dataset(NAMES, per="request")
    assert len(data) == len(served.ids)
    for item in data:
        request_id = data.requests[int(item["request"])]
        request = run.request(request_id)
        assert torch.equal(item[NAMES[0]], request["layers_0/outputs_cpu"])
        assert torch.equal(item[NAMES[1]], request["layers_1/outputs_cpu"])
        assert torch.equal(item["token_ids"], request.token_ids)
        assert item["positions"].tolist() == list(range(len(served.ids[request_id])))


def test_pieces_of_a_context_follow_one_another_in_one_request(backend: Any, tmp_path: Path) -> None:
    served = Served()
    data = served.run(tmp_path, backend).dataset(NAMES[0], context=3)
    assert len(data) == sum(len(ids) // 3 for ids in served.ids.values())
    for item in data:
        begin = int(item["positions"][0])
        assert begin % 3 == 0 and item["positions"].tolist() == [begin, begin + 1, begin + 2]
        assert item[NAMES[0]][:, 1].tolist() == item["positions"].tolist()
        assert set(item[NAMES[0]][:, 0].tolist()) == {int(item["request"])}
    short = [each for each, ids in served.ids.items() if len(ids) < 3]
    assert sorted(data.left_out) == sorted(short)


def test_several_items_at_once_and_from_behind(backend: Any, tmp_path: Path) -> None:
    data = Served().run(tmp_path, backend).dataset(NAMES)
    places = [5, -1, 0, 5]
    for item, place in zip(data.__getitems__(places), places, strict=True):
        assert all(torch.equal(value, data[place][name]) for name, value in item.items())
    with pytest.raises(IndexError, match=f"item {len(data)} of {len(data)}"):
        data[len(data)]
    number: Any = torch.tensor(3)
    assert torch.equal(data[number]["positions"], data[3]["positions"])
    no_number: Any = 1.5
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        data[no_number]


def test_a_request_with_gaps_is_left_out_and_said(tmp_path: Path) -> None:
    cached, whole = "cached-00000000", "whole-00000001"
    steps: list[Rows] = [[(cached, 2, 4), (whole, 2, 0)], [(cached, 1, 6), (whole, 1, 2)]]
    run = requests_run(tmp_path, steps, lambda step, rows: {"layer": _rows(rows)}, {cached: 4})
    data = run.dataset("layer/outputs", per="request")
    assert [data.requests[int(item["request"])] for item in data] == [whole]
    assert data.left_out == {cached: "positions 0 to 3 are not there"}
    assert len(run.dataset("layer/outputs")) == 6
    assert "token_ids" not in data[0] and "response" not in data[0]
    with pytest.raises(
        ReadError, match=r"none of its 2 requests has all that is asked for .*: where its prompt"
    ):
        run.dataset("layer/outputs", rows="response")


def _rows(rows: Any) -> torch.Tensor:
    return torch.arange(2.0 * sum(row["rows"] for row in rows)).view(-1, 2)


def test_a_missing_position_in_between_is_a_gap(tmp_path: Path) -> None:
    steps: list[Rows] = [[("a-00000000", 2, 0)], [("a-00000000", 2, 3), ("b-00000001", 1, 0)]]
    run = requests_run(tmp_path, steps, lambda step, rows: {"layer": _rows(rows)})
    data = run.dataset("layer/outputs_cpu", per="request")
    assert data.left_out == {"a-00000000": "positions 2 to 2 are not there"} and len(data) == 1


def test_only_positions_that_all_tensors_have_are_there(backend: Any, tmp_path: Path) -> None:
    served = Served(preempts=False)
    run = served.run(tmp_path, backend)
    data = run.dataset([NAMES[0], "logits/outputs"])
    lasts = sum(1 for rows in served.steps for _ in rows)
    assert len(data) == lasts < sum(map(len, served.ids.values()))
    for item in data:
        assert int(item[NAMES[0]][1]) == int(item["positions"])


def test_what_is_asked_for_wrongly_is_named(tmp_path: Path) -> None:
    run = Served().run(tmp_path, "pt")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"names": "layers_9/outputs"}, "no tensor with rows of requests 'layers_9/outputs'; did you mean"),
        ({"names": []}, "needs names of tensors, each once"),
        ({"names": [NAMES[0], NAMES[0]]}, "needs names of tensors, each once"),
        ({"names": NAMES, "per": "batch"}, 'per=\'batch\' is neither "token" nor "request"'),
        ({"names": NAMES, "rows": "some"}, "rows='some': 'some' names no rows"),
        ({"names": NAMES, "context": 0}, "context=0: it is a number of positions"),
        ({"names": NAMES, "context": 2, "per": "request"}, "not for whole requests"),
        ({"names": NAMES, "context": 99}, "none of its 12 requests has all that is asked for"),
    ]
    for keys, message in cases:
        with pytest.raises((ReadError, MissingError), match=message):
            run.dataset(**keys)


def test_rows_of_different_forms_are_refused(tmp_path: Path) -> None:
    def tensors(step: int, rows: Any) -> dict[str, torch.Tensor]:
        return {"layer": torch.ones(2, 3 + step)}

    run = requests_run(tmp_path, [[("a-00000000", 2, 0)], [("a-00000000", 2, 2)]], tensors)
    with pytest.raises(ReadError, match=r"rows of different forms \(float32 \[3\] and float32 \[4\]\)"):
        run.dataset("layer/outputs")


@pytest.mark.parametrize("name", [LAYER, LOGITS])
def test_samples_of_ordinary_models_are_requests(backend: Any, name: str, tmp_path: Path) -> None:
    run = generated(llama(), tmp_path, padded(PROMPTS), backend=backend)
    data = run.dataset(name, rows="prompt" if name == LAYER else "response", per="request")
    assert len(data) == 3
    for item in data:
        request = run.request(data.requests[int(item["request"])])
        chosen = [request.positions(name).index(each) for each in item["positions"].tolist()]
        assert torch.equal(item[name], request[name][chosen])
        assert torch.equal(item["token_ids"], request.token_ids[item["positions"]])


class Heads(nn.Module):
    """Has its positions behind its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.split = nn.Embedding(64, 8), nn.Identity()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.split(self.embed(input_ids).view(*input_ids.shape, 2, 4).transpose(1, 2))


def test_heads_before_positions_are_read_as_a_whole(backend: Any, tmp_path: Path) -> None:
    model = Heads()
    run = run_of(model, tmp_path, lambda _: model(**padded(PROMPTS)), backend=backend)
    name = "split/outputs_cpu"
    assert run.tensor(f"step_0/{name}").shape == (3, 2, 7, 4)
    data = run.dataset(name, per="request")
    for item in data:
        assert torch.equal(item[name], run.request(data.requests[int(item["request"])])[name])


def test_encoder_and_decoder_are_told_apart(backend: Any, tmp_path: Path) -> None:
    def extra(step: int) -> dict[str, Any]:
        row = {"request_id": "a-00000000", "first_row": 0, "rows": 3 - step, "first_position": 0}
        rows = [row | ({} if step else {"sequence": "encoder"})]
        return {"call_rows": [{"calls": ["layer"], "sets": [{"kind": "tokens", "rows": rows}]}]}

    def tensors(step: int, rows: Any) -> dict[str, torch.Tensor]:
        return {"layer": torch.full((3 - step, 2), float(step))}

    run = requests_run(
        tmp_path, [[("a-00000000", 3, 0)], [("a-00000000", 2, 0)]], tensors, None, backend, extra
    )
    with pytest.raises(ReadError, match=r"has rows of encoder and decoder; name .*@encoder for those"):
        run.dataset("layer/outputs")
    data = run.dataset("layer/outputs@encoder", per="request")
    assert data[0]["layer/outputs@encoder"].tolist() == [[0.0, 0.0]] * 3 and len(data) == 1
    assert torch.equal(run.request("a")["layer/outputs_cpu@encoder"], data[0]["layer/outputs@encoder"])


@pytest.mark.parametrize("name", ["0/outputs", "0/outputs_cpu", "0/outputs@encoder"])
def test_a_tensor_without_rows_of_requests_is_told_and_what_they_take(tmp_path: Path, name: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with tlcore.capture(model, output_dir=str(tmp_path)) as capture:
        model(torch.ones(2, 4))
    told = f"no rows of '{name}' are known to be a request's; outside vLLM they take .*attention_mask"
    with pytest.raises(MissingError, match=told):
        tlcore.open_run(capture.url).dataset(name)


def test_dumps_of_other_tools_have_no_rows_and_say_so(tmp_path: Path) -> None:
    torch.save({"layer": torch.ones(2, 3)}, tmp_path / "dump.pt")
    with pytest.raises(MissingError, match="no tensor with rows of requests"):
        tlcore.open_run(tmp_path / "dump.pt").dataset("layer")


def test_which_call_of_the_model_a_step_is_decides_even_where_steps_are_alike(
    backend: Any, tmp_path: Path
) -> None:
    """The name of a tensor counts calls within one call of the model: one step may hold the second."""
    steps = [[("r-00000001", 2, 2 * step)] for step in range(4)]

    def tensors(step: int, rows: Any) -> dict[str, torch.Tensor]:
        return {"layer": torch.arange(6.0).view(2, 3) + 10 * step}

    def extra(step: int) -> dict[str, Any]:
        sets = [{"kind": "tokens", "rows": json_rows(steps[step])}]
        return {"call_rows": [{"calls": ["layer"], "indices": [step % 2], "sets": sets}]}

    run = requests_run(tmp_path, steps, tensors, backend=backend, extra=extra)
    for name, first in (("layer/outputs_cpu", 0), ("layer_1/outputs", 1)):
        data = run.dataset(name)
        found = {int(item["positions"]): item[name].tolist() for item in data}
        assert sorted(found) == [2 * first, 2 * first + 1, 2 * first + 4, 2 * first + 5]
        for position, row in found.items():
            assert row == (tensors(position // 2, None)["layer"][position % 2]).tolist()


def test_token_ids_take_little_memory_and_may_be_large(backend: Any, tmp_path: Path) -> None:
    steps = [[("a-00000001", 2, 0), ("b-00000002", 2, 0)]]
    ids = {"a-00000001": [1, (1 << 31) - 1], "b-00000002": [3, 1 << 40]}

    def extra(step: int) -> dict[str, Any]:
        return {
            "tokens": [
                {"request_id": name, "prompt": 1, "first_position": 0, "ids": each}
                for name, each in ids.items()
            ]
        }

    run = requests_run(
        tmp_path, steps, lambda step, rows: {"x": torch.ones(4, 2)}, backend=backend, extra=extra
    )
    items = list(run.dataset("x/outputs"))
    assert [int(item["token_ids"]) for item in items] == [*ids["a-00000001"], *ids["b-00000002"]]
    assert items[0]["token_ids"].dtype == torch.int64
    table = run.dataset("x/outputs")._made_of[0][0]
    assert [table.tokens[name].small for name in ids] == [True, False]


class _Masked(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Identity()

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x)
        return result


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_why_rows_are_not_known_is_told_to_whoever_asks_for_them(tmp_path: Path, backend: str) -> None:
    model = _Masked()
    with tlcore.capture(model, output_dir=str(tmp_path), log_step_ids=[], backend=backend) as capture:
        for _ in range(2):
            model(torch.ones(2, 3, 4), attention_mask=torch.ones(2, 1, 3, 3))
    told = r"\(step 0 says: attention_mask has 4 axes, not \[samples, positions\]\)"
    run = tlcore.open_run(capture.url)
    with pytest.raises(MissingError, match=told):
        run.dataset("layer/outputs")
    with pytest.raises(MissingError, match=told):
        run.request("0")
