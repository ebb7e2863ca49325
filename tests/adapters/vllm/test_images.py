"""Whose images an encoder works on: held against transformers in float32, and nobody else's are stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.adapters.vllm.helpers import REPOSITORY, report
from tests.adapters.vllm.images import MIXED, SMALLS, ImageTruth
from tlcore.reader import Run

pytestmark = pytest.mark.slow
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "images_script.py")
PIXELS = "model.vision_model.embeddings.patch_embedding/inputs_0_cpu"
FEATURES, STATES = "model.connector/outputs_cpu", "model.text_model.norm/outputs_0_cpu"
# Of an image that two requests share, the encoder's rows are those of one of them.
SHARED = (0, 5)
_SMALL_RUNS = ("smalls", "small")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = report(SCRIPT, str(tmp_path_factory.mktemp("images")))
    return {**found, "truth": ImageTruth(Path(found["model"]))}


def _owned(run: Run) -> Iterator[tuple[str, str, torch.Tensor]]:
    """The rows of each tensor whose owner is known: the name without its step, the client's id, the rows."""
    for step in map(run.step, run.steps):
        for record in step.records:
            for span in step.row_spans(record):
                rows = step[record["name"]][span.begin : span.begin + span.length]
                yield record["name"].split("/", 1)[1], span.row["request_id"].rpartition("-")[0], rows


def _rows_of(run: Run, name: str) -> dict[str, torch.Tensor]:
    """A tensor's rows over all steps, by the client's id."""
    found: dict[str, list[torch.Tensor]] = {}
    for each, request, rows in _owned(run):
        if each == name:
            found.setdefault(request, []).append(rows)
    return {request: torch.cat(rows) for request, rows in found.items()}


def _wrong(said: dict[str, Any], name: str) -> list[str]:
    """Requests whose rows in a run are not what transformers computes of their images and tokens."""
    run, truth = tlcore.open_run(said[name]["url"]), said["truth"]
    pixels, features = _rows_of(run, PIXELS), _rows_of(run, FEATURES)
    found = []
    for place, (request, tokens) in enumerate(zip(said[name]["ids"], said[name]["tokens"], strict=True)):
        asked = (SMALLS if name in _SMALL_RUNS else MIXED)[place]
        if request not in {each.rpartition("-")[0] for each in run.requests}:
            continue
        if name in _SMALL_RUNS or place != SHARED[1]:
            mine = pixels.get(request, torch.empty(0, 3, 32, 32))
            if not torch.equal(mine, truth.tiles(asked)):
                found.append(f"{request}: pixels")
            elif asked.images and not torch.allclose(features[request], truth.features(asked), atol=1e-4):
                found.append(f"{request}: features")
        rows = run.request(request)
        positions = rows.positions(STATES)
        if positions != list(range(len(tokens) - 1)) or not torch.allclose(
            rows[STATES], truth.states(asked, tokens)[positions], atol=2e-4, rtol=2e-3
        ):
            found.append(f"{request}: states")
    return found


def test_images_and_tokens_are_their_requests(said: dict[str, Any]) -> None:
    for name in ("all", "smalls", "small", *(f"one {chosen}" for chosen in range(len(MIXED)))):
        assert _wrong(said, name) == [], name
    run = tlcore.open_run(said["all"]["url"])
    calls = [set(run.step(number).calls) for number in run.steps]
    assert sum("model.vision_model" in each for each in calls) > 1, "the encoder ran once"


def test_in_a_data_set_placeholders_of_images_have_their_own_rows_and_ids(said: dict[str, Any]) -> None:
    """An image stands for many positions of one token: rows and ids stay side by side."""
    run, truth = tlcore.open_run(said["all"]["url"]), said["truth"]
    data = run.dataset(STATES, per="request")
    assert not data.left_out and data.has_token_ids
    items = {data.requests[int(item["request"])].rpartition("-")[0]: item for item in data}
    assert items.keys() == set(said["all"]["ids"])
    pairs = zip(said["all"]["ids"], said["all"]["tokens"], MIXED, strict=True)
    for request, tokens, asked in pairs:
        item = items[request]
        assert item["token_ids"].tolist() == tokens[:-1]
        assert item["positions"].tolist() == list(range(len(tokens) - 1))
        expected = truth.states(asked, tokens)[: len(tokens) - 1]
        assert torch.allclose(item[STATES], expected, atol=2e-4, rtol=2e-3)
    assert any(asked.images for asked in MIXED)


def test_swapped_owners_are_found(said: dict[str, Any]) -> None:
    assert any(text.endswith("pixels") for text in _wrong(said, "swapped"))


def test_of_chosen_requests_no_others_images_are_stored(said: dict[str, Any]) -> None:
    """Whatever is stored of whatever tensor, its owner known or not."""
    everything = _bytes_by_owner(tlcore.open_run(said["all"]["url"]))
    for chosen, request in enumerate(said["all"]["ids"]):
        run = tlcore.open_run(said[f"one {chosen}"]["url"])
        others = set().union(*(rows for owner, rows in everything.items() if owner != request))
        others -= everything[request]
        stored = set().union(
            *(_distinct(step[name]) for step in map(run.step, run.steps) for name in step.names)
        )
        assert stored and not stored & others
        assert stored <= everything[request]
        assert run.ledger.balanced and (chosen == 1 or run.ledger.stored > 100)


def test_of_a_chosen_request_all_of_its_images_are_stored(said: dict[str, Any]) -> None:
    for name, asked in [(f"one {i}", MIXED[i]) for i in (0, 2, 3, 4)] + [("small", SMALLS[1])]:
        pixels = _rows_of(tlcore.open_run(said[name]["url"]), PIXELS)
        assert [each.tolist() for each in pixels.values()] == [said["truth"].tiles(asked).tolist()], name


def _bytes_by_owner(run: Run) -> dict[str, set[bytes]]:
    found: dict[str, set[bytes]] = {}
    for _, request, rows in _owned(run):
        found.setdefault(request, set()).update(_distinct(rows))
    return found


def _distinct(tensor: torch.Tensor) -> set[bytes]:
    """The rows that say something: of more than a few numbers, of which not all are alike."""
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(-1, 1)
    return {row.numpy().tobytes() for row in rows if row.numel() > 16 and row.unique().numel() > 1}
