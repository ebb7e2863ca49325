"""Runs with request rows, as vLLM's have, compared per request and position whatever the batches were."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import tlcore
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session
from tlcore.errors import ConfigError

PROMPTS = {"x": torch.randn(5, 4), "y": torch.randn(3, 4), "z": torch.randn(4, 4)}
Batch = Sequence[tuple[str, int, int]]


def serve(
    out: Path, batches: Sequence[Batch], scale: float = 1.0, last: Callable[[], nn.Module] = nn.ReLU
) -> str:
    """Run batches of (request, first position, end position) through a model that treats rows alone."""
    linear = nn.Linear(4, 4, bias=False)
    linear.weight.data = torch.eye(4) * scale
    root = nn.Sequential(linear, last())
    config = load_config(output_dir=str(out), log_step_ids=[], module_call_match=".")
    session = Session(config, new_run(config))
    session.attach(root)
    for batch in batches:
        rows, first = [], 0
        for request, begin, end in batch:
            row = {"request_id": f"{request}-0a1b2c3d", "external_request_id": request}
            rows.append({**row, "first_row": first, "rows": end - begin, "first_position": begin})
            first += end - begin
        session.begin_step()
        root(torch.cat([PROMPTS[request][begin:end] for request, begin, end in batch]))
        session.end_step(rows=rows)
    session.close()
    return session.url


class Chosen(nn.Module):
    """What a router chooses for each token: two whole numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.topk(2).indices


ORDERED = [[("x", 0, 5), ("y", 0, 3), ("z", 0, 4)]]
REORDERED = [[("z", 0, 4), ("x", 0, 2)], [("x", 2, 5), ("y", 0, 3)]]


@pytest.mark.parametrize("deep", [False, True])
def test_other_batches_of_the_same_requests_agree(tmp_path: Path, deep: bool) -> None:
    result = tlcore.compare(serve(tmp_path, ORDERED), serve(tmp_path, REORDERED), deep=deep)
    assert result.equal and result.counts["missing"] == 0
    assert {each.request for each in result.results} == {"x", "y", "z"}
    # Request x was computed in two pieces: four tensors, four spans.
    assert len(result.results) == 4 * 4


def test_what_two_tokens_chose_of_two_each_is_left_open_and_not_missing(tmp_path: Path) -> None:
    # Of two by two whole numbers nobody can tell which axis is that of tokens.
    a = serve(tmp_path, [[("x", 0, 1), ("y", 0, 1)]], last=Chosen)
    b = serve(tmp_path, [[("x", 0, 1)], [("y", 0, 1)]], last=Chosen)
    for one, other in ((a, b), (b, a)):
        found = tlcore.compare(one, other)
        assert found.equal and found.counts["missing"] == 0
        assert any("shape leaves open whose rows" in note for note in found.notes)
    # What no shape leaves open is missing as before.
    less = serve(tmp_path, [[("x", 0, 1)]], last=Chosen)
    assert {each.module for each in tlcore.compare(a, less).results if not each.agrees} == {"0", "1"}


def test_the_divergence_names_the_request(tmp_path: Path) -> None:
    changed = serve(tmp_path, REORDERED, scale=2.0)
    found = tlcore.compare(serve(tmp_path, ORDERED), changed).to_json()["first_divergence"]
    assert (found["module"], found["born"], found["first_position"]) == ("0", True, 0)


def test_a_request_or_position_that_one_run_lacks_is_missing(tmp_path: Path) -> None:
    whole = serve(tmp_path, ORDERED)
    for batches in ([[("x", 0, 5), ("y", 0, 3)]], [[("x", 0, 5), ("y", 0, 3), ("z", 1, 4)]]):
        part = serve(tmp_path, batches)
        assert {each.request for each in tlcore.compare(whole, part).results if not each.agrees} == {"z"}
        assert not tlcore.compare(part, whole).equal


def test_request_ids_can_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = serve(tmp_path, [[("x", 0, 5), ("y", 0, 3)]])
    monkeypatch.setitem(PROMPTS, "p", PROMPTS["x"])
    monkeypatch.setitem(PROMPTS, "q", PROMPTS["y"])
    b = serve(tmp_path, [[("q", 0, 3), ("p", 0, 5)]])
    assert not tlcore.compare(a, b).equal
    assert tlcore.compare(a, b, requests={"x": "p", "y": "q"}).equal


def serve_tokens(
    out: Path,
    batches: Sequence[Sequence[tuple[str, list[int], int]]],
    hashed: bool,
    embedded: bool,
    cached: int = 0,
    unsampled: Container[int] = (),
) -> str:
    """Run batches of (request id, tokens, first position) through a table; ids tell nothing of the prompt."""
    root = nn.Sequential(nn.Embedding(50, 4), nn.ReLU())
    root[0].weight.data = torch.arange(200.0).reshape(50, 4)
    match = None if embedded else "^1$"
    config = load_config(output_dir=str(out), log_step_ids=[], module_call_match=match)
    session = Session(config, new_run(config))
    session.attach(root)
    prompts: dict[str, list[int]] = {}
    for batch in batches:
        rows, first = [], 0
        for request, tokens, position in batch:
            prompt = prompts.setdefault(request, tokens)
            row = {"request_id": f"{request}-0a1b2c3d", "external_request_id": request, "first_row": first}
            row |= {"rows": len(tokens), "first_position": position, "cached": cached}
            row |= {"unsampled": True} if position in unsampled else {}
            rows.append(row | ({"prompt_hash": f"xxh3-128:{prompt}"} if hashed else {}))
            first += len(tokens)
        session.begin_step()
        root(torch.tensor([token for _, tokens, _ in batch for token in tokens]))
        session.end_step(rows=rows)
    session.close()
    return session.url


# The second prompt begins as the first one goes on after its end.
FIRST = [
    [("0", [1, 2], 0), ("1", [1, 2, 3, 4], 0), ("2", [7], 0)],
    [("0", [3], 2), ("1", [9], 4), ("2", [8], 1)],
]
SECOND = [
    [("0", [7], 0), ("1", [1, 2, 3, 4], 0)],
    [("0", [8], 1), ("1", [9], 4), ("2", [1, 2], 0)],
    [("2", [3], 2)],
]


@pytest.mark.parametrize(("hashed", "embedded"), [(True, False), (False, True), (True, True)])
def test_requests_are_found_by_their_prompts(tmp_path: Path, hashed: bool, embedded: bool) -> None:
    a, b = (serve_tokens(tmp_path, batches, hashed, embedded) for batches in (FIRST, SECOND))
    found = tlcore.compare(a, b)
    assert found.equal and found.counts["missing"] == 0
    assert found.notes == ([] if embedded else ["A and B captured only what fits ^1$"])
    assert {result.request for result in found.results} == {"0", "1", "2"}


def test_without_prompts_ids_are_used_and_said_so(tmp_path: Path) -> None:
    a, b = (serve_tokens(tmp_path, batches, False, False) for batches in (FIRST, SECOND))
    found = tlcore.compare(a, b)
    assert not found.equal
    assert "matched by their ids" in found.notes[0]
    assert tlcore.compare(a, b, requests={"0": "2", "1": "1", "2": "0-0a1b2c3d"}).equal


def test_positions_from_the_prefix_cache_are_named_and_not_missing(tmp_path: Path) -> None:
    prompt = [("0", [1, 2, 3, 4], 0)]
    whole = serve_tokens(tmp_path, [prompt], False, True)
    rest = serve_tokens(tmp_path, [[("0", [3, 4], 2)]], False, True, cached=2)
    for a, b, run in ((whole, rest, "B"), (rest, whole, "A")):
        found = tlcore.compare(a, b, requests={"0": "0"})
        assert found.equal and found.counts["missing"] == 0
        assert found.notes == [
            f"{run} took 2 leading positions of 1 requests from its prefix cache and has no values of them"
        ]
    less = serve_tokens(tmp_path, [[("0", [4], 3)]], False, True, cached=2)
    assert not tlcore.compare(whole, less, requests={"0": "0"}).equal


def test_logits_at_the_ends_of_chunks_are_named_and_not_missing(tmp_path: Path) -> None:
    """Where a prompt is prefilled in pieces, vLLM computes logits of each piece's last token, for nothing."""
    whole = serve_tokens(tmp_path, [[("0", [4], 3)]], False, True)
    for unsampled, equal in ((True, True), (False, False)):
        pieces = serve_tokens(
            tmp_path, [[("0", [2], 1)], [("0", [4], 3)]], False, True, unsampled={1} if unsampled else ()
        )
        for a, b, run in ((whole, pieces, "A"), (pieces, whole, "B")):
            found = tlcore.compare(a, b, requests={"0": "0"})
            assert found.equal == equal and bool(found.counts["missing"]) != equal
            said = f"{run} computed no logits at 1 positions at which the other run's chunks of prompts ended"
            assert any(note.startswith(said) for note in found.notes) == equal


def test_a_prompt_that_one_run_lacks_is_missing(tmp_path: Path) -> None:
    a = serve_tokens(tmp_path, [[("0", [1, 2], 0), ("1", [5], 0)]], True, True)
    b = serve_tokens(tmp_path, [[("0", [1, 2], 0), ("1", [6], 0)]], True, True)
    found = tlcore.compare(a, b)
    assert {result.request for result in found.results if result.status == "missing"} == {"1", "1 of B"}
    assert found.notes[0] == "2 requests have no counterpart with the same prompt in the other run"


def test_equal_prompts_pair_in_order(tmp_path: Path) -> None:
    a = serve_tokens(tmp_path, [[("0", [1], 0), ("1", [1], 0)], [("0", [2], 1), ("1", [3], 1)]], True, True)
    b = serve_tokens(tmp_path, [[("8", [1], 0), ("9", [1], 0)], [("9", [3], 1), ("8", [2], 1)]], True, True)
    assert tlcore.compare(a, b).equal


def test_a_request_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    a = serve(tmp_path, ORDERED)
    with pytest.raises(ConfigError, match="no request of B has the id 'nobody'; it has x, y, z"):
        tlcore.compare(a, a, requests={"x": "nobody"})
