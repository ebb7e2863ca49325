"""Token ids and windows of samples outside vLLM: what was read, where its prompt ends, and what is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

import tlcore
import tlcore_schemas
from tests.engine.samples import LAYER, LOGITS, PROMPTS, forward, generated, llama, padded, run_of, t5
from tlcore.config.configuration import load_config
from tlcore.errors import MissingError, ReadError
from tlcore.runs.convert import convert


class Tokenizer:
    """Stands for any object that decodes ids."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


MODULES: dict[str, Any] = {"module_call_match": r"^(model\.layers\.1)?$"}


def _outputs(model: Any, batch: dict[str, torch.Tensor], new: int = 4) -> list[list[int]]:
    """What was read of each sample: its prompt and what was generated, but for the last token."""
    ids = model.generate(**batch, max_new_tokens=new, do_sample=False)[:, batch["input_ids"].shape[1] :]
    return [prompt + more[:-1].tolist() for prompt, more in zip(PROMPTS, ids, strict=False)]


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_a_generations_ids_are_its_prompts_and_what_came(backend: str, tmp_path: Path) -> None:
    model, batch = llama(), padded(PROMPTS)
    expected = _outputs(model, batch)
    run = generated(model, tmp_path, batch, backend=backend, **MODULES)
    other = convert(run, load_config(output_dir=str(tmp_path / "other"), backend="pt"))
    for each in (run, tlcore.open_run(other)):
        for sample, ids in enumerate(expected):
            request = each.request(str(sample))
            prompt = len(PROMPTS[sample])
            assert request.token_ids.tolist() == ids and request.token_ids.dtype is torch.int64
            assert request.prompt_length == prompt and not request.tokens.rejected
            assert request.token_ids_of(LOGITS).tolist() == ids[prompt - 1 :]
            assert request.text(Tokenizer()) == " ".join(map(str, ids))
            assert request.text(Tokenizer(), "prompt") == " ".join(map(str, PROMPTS[sample]))
            assert request.text(Tokenizer(), "response") == " ".join(map(str, ids[prompt:]))
    schema = Draft202012Validator(tlcore_schemas.load("step.v1")["properties"]["tokens"])
    stored = [entry for number in run.steps for entry in run.json(f"step_{number}/step.json")["tokens"]]
    schema.validate(stored)
    # Each id once.
    assert sum(len(entry["ids"]) for entry in stored) == sum(map(len, expected))


def test_ids_that_are_fed_again_are_stored_once(tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    run = generated(llama(), tmp_path, {"input_ids": ids}, options={"use_cache": False}, **MODULES)
    request = run.request("1")
    assert request.prompt_length == 3 and request.token_ids.tolist()[:3] == [8, 9, 10]
    assert len(request.token_ids) == 6 == len(request.positions(LAYER))
    stored = [entry for number in run.steps for entry in run.json(f"step_{number}/step.json")["tokens"]]
    assert sum(len(entry["ids"]) for entry in stored) == 12


@pytest.mark.parametrize("keys", [{"log_token_ids": False}, {"request_ids": "^0$"}], ids=str)
def test_ids_that_are_not_to_be_stored_are_not(keys: dict[str, Any], tmp_path: Path) -> None:
    run = forward(llama(), tmp_path, padded(PROMPTS), **keys, **MODULES)
    entries = run.json("step_0/step.json").get("tokens", [])
    assert [each["request_id"] for each in entries] == ([] if "log_token_ids" in keys else ["0"])
    if not entries:
        with pytest.raises(MissingError, match="no token ids: it was captured without them"):
            run.request("1").token_ids  # noqa: B018
        assert run.request("1").prompt_length is None


def test_ids_of_steps_that_were_not_captured_are_not_made_up(tmp_path: Path) -> None:
    run = generated(llama(), tmp_path, padded(PROMPTS), log_step_ids=[0, 1, 3], **MODULES)
    assert sorted(run.request("1").tokens.known) == [0, 1, 2, 3] and run.request("1").prompt_length == 3
    # Whose cache has grown since is not known, so that a sample of its own goes on at position 5.
    request = run.request("4")
    assert request.positions(LAYER) == [5] == list(request.tokens.known) and request.prompt_length is None
    with pytest.raises(ReadError, match="ids of 5 positions are not known, the first is 0"):
        request.token_ids  # noqa: B018


WINDOWS: list[tuple[Any, Any]] = [
    ("prompt", lambda p, prompt: p < prompt),
    ("response", lambda p, prompt: p >= prompt),
    ({"from": -2, "to": "prompt"}, lambda p, prompt: prompt - 2 <= p < prompt),
    ({"from": 2, "to": 6}, lambda p, prompt: 2 <= p < 6),
]


@pytest.mark.parametrize(("rows", "holds"), WINDOWS, ids=[str(rows) for rows, _ in WINDOWS])
@pytest.mark.parametrize("left", [True, False])
def test_windows_hold_the_same_rows_as_the_whole(rows: Any, holds: Any, left: bool, tmp_path: Path) -> None:
    model, batch = llama(), padded(PROMPTS, left)
    capture = generated if left else forward
    whole = capture(model, tmp_path, batch, **MODULES)
    run = capture(model, tmp_path, batch, rows=rows, **MODULES)
    for sample, prompt in enumerate(PROMPTS):
        every = whole.request(str(sample))
        places = [i for i, p in enumerate(every.positions(LAYER)) if holds(p, len(prompt))]
        request = run.request(str(sample))
        if not places:
            assert LAYER not in request
            continue
        assert request.positions(LAYER) == [every.positions(LAYER)[i] for i in places]
        assert torch.equal(request[LAYER], every[LAYER][places])
        assert torch.equal(request.token_ids, every.token_ids)
        assert request.token_ids_of(LAYER).tolist() == request["_root/inputs_input_ids_cpu"].tolist()


def _chunks(model: Any, rows: Any = None) -> Any:
    """A prompt of five tokens in two calls, the second on top of the first one's cache, then a token."""

    def act(capture: tlcore.capture) -> None:
        ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
        cache = None
        for begin, end in ((0, 3), (3, 5), (5, 6)):
            with capture.step(rows=rows):
                out = model(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values

    return act


def test_where_a_prompt_ends_is_not_guessed_but_may_be_said(tmp_path: Path) -> None:
    model = llama()
    unsaid = run_of(model, tmp_path, _chunks(model), **MODULES)
    assert unsaid.request("0").prompt_length is None
    assert unsaid.request("0").token_ids.tolist() == [5, 6, 7, 8, 9, 10]
    with pytest.raises(ReadError, match="where its prompt ends is not known"):
        unsaid.request("0").text(Tokenizer(), "prompt")

    cut = run_of(model, tmp_path, _chunks(model), rows="response", **MODULES)
    # Of the calls whose place in the prompt is not known nothing is stored, and it is said why.
    assert all(not cut.tensor(name).numel() for name in cut.step(0)) and not list(cut.step(1))
    assert "several positions came on top of a cache" in cut.json("step_1/step.json")["rows_unavailable"]

    named = [{"request_id": "a", "prompt": 5}]
    said = run_of(model, tmp_path, _chunks(model, named), rows="response", **MODULES).request("a")
    assert (said.prompt_length, said.positions(LAYER)) == (5, [5])


def test_an_encoders_input_is_all_prompt(tmp_path: Path) -> None:
    model, ids = t5(), torch.tensor([[5, 6, 7, 8]])

    def act(_: Any) -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=torch.tensor([[0, 3]]))

    def captured(rows: Any) -> Any:
        return run_of(model, tmp_path, act, rows=rows, module_call_match=r"^encoder\.block\.0$").request("0")

    whole = captured("all")
    assert whole.tokens.encoder == {0: 5, 1: 6, 2: 7, 3: 8}
    assert whole.prompt_length == 2 and whole.token_ids.tolist() == [0, 3]
    name = "encoder.block.0/outputs_0_cpu"
    for rows, kept in (("prompt", 4), ("response", 0), ({"from": -1}, 1)):
        request = captured(rows)
        assert (len(request.positions(name)) if name in request else 0) == kept
