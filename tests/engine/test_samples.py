"""Whose the rows of a batch are, outside vLLM: real models of transformers, small and random."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.engine.samples import LAYER, LOGITS, PROMPTS, forward, generated, llama, padded, run_of, t5

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", autouse=True)
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_nobodys_and_each_sample_has_its_own_rows(left: bool, tmp_path: Path) -> None:
    run = forward(llama(), tmp_path, padded(PROMPTS, left))
    whole = run.tensor(f"step_0/{LAYER}")
    assert list(run.requests) == ["0", "1", "2"] == [each["request_id"] for each in run.step(0).samples]
    for sample, prompt in enumerate(PROMPTS):
        request = run.request(str(sample))
        begin = whole.shape[1] - len(prompt) if left else 0
        assert torch.equal(request[LAYER], whole[sample, begin : begin + len(prompt)])
        assert request["_root/inputs_input_ids_cpu"].tolist() == prompt
        for name in request:
            dtype, shape = request.dtype_and_shape(name)
            assert (dtype, shape) == (str(request[name].dtype)[6:], list(request[name].shape)), name
        assert request.positions(LAYER) == list(range(len(prompt)))


class TakesFeatures(nn.Module):
    """Takes its batch in one dictionary, as those of sentence-transformers do, and runs past ``__call__``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def forward(self, features: dict[str, Any]) -> Any:
        return self.inner.model.forward(**features)[0]


@pytest.mark.parametrize("names", [None, ["a", "b", "c"]])
def test_a_batch_in_one_dictionary_is_one(names: list[str] | None, tmp_path: Path) -> None:
    model, batch = TakesFeatures(), padded(PROMPTS, False)

    def act(capture: tlcore.capture) -> None:
        if names is None:
            model(batch)
        else:
            with capture.step(rows=names):
                model(batch)

    run = run_of(model, tmp_path, act)
    layer = f"inner.{LAYER}"
    whole = run.tensor(f"step_0/{layer}")
    assert list(run.requests) == (names or ["0", "1", "2"])
    for sample, request in enumerate(map(run.request, run.requests)):
        assert request.token_ids.tolist() == PROMPTS[sample]
        assert torch.equal(request[layer], whole[sample, : len(PROMPTS[sample])])


def test_of_two_dictionaries_with_tokens_neither_is_the_models(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, one: Any, other: Any) -> torch.Tensor:
            found: torch.Tensor = one["input_ids"] + other["input_ids"]
            return found

    batch = padded(PROMPTS, False)
    run = run_of(Pair(), tmp_path, lambda capture: capture._model(batch, batch))
    assert not list(run.requests)


def test_the_same_prompt_alone_padded_and_in_a_batch_compares_equal(tmp_path: Path) -> None:
    model, prompt = llama(), PROMPTS[0]
    alone = forward(model, tmp_path, padded([prompt]))
    others = [forward(model, tmp_path, padded([prompt], left, more=3)) for left in (True, False)]
    for other in others:
        found = tlcore.compare(alone, other)
        assert found.equal and found.counts["missing"] == 0 and len(found.results) > 70
    batch = forward(model, tmp_path, padded(PROMPTS))
    found = tlcore.compare(alone, batch, ignore_missing=True)
    assert found.equal and {each.request for each in found.results} == {"0"}
    assert not tlcore.compare(alone, batch).equal

    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] += 0.5
    changed = forward(model, tmp_path, padded(PROMPTS))
    first = tlcore.compare(alone, changed, ignore_missing=True).first_divergence
    assert first is not None and (first.module, first.born) == ("model.layers.1.mlp.down_proj", True)


def test_what_differs_in_padding_only_is_no_difference_and_masks_are(tmp_path: Path) -> None:
    model, batch = llama(), padded(PROMPTS)
    one = forward(model, tmp_path, batch)
    other = forward(
        model, tmp_path, {**batch, "input_ids": batch["input_ids"] + 40 * (batch["input_ids"] == 0)}
    )
    assert tlcore.compare(one, other).equal
    # Whole tensors of nobody are still compared where both runs have the same rows in the same places.
    masks = [each for each in tlcore.compare(one, other).results if "mask" in str(each.path)]
    assert masks and all(each.request is None for each in masks)


def test_generation_joins_each_samples_steps(tmp_path: Path) -> None:
    model = llama()
    run = generated(model, tmp_path, padded(PROMPTS))
    assert run.steps == [0, 1, 2, 3] and list(run.requests) == ["0", "1", "2"]
    for sample, prompt in enumerate(PROMPTS):
        request = run.request(str(sample))
        assert request.positions(LAYER) == list(range(len(prompt) + 3)) and not request.gaps(LAYER)
        assert request.positions(LOGITS) == list(range(len(prompt) - 1, len(prompt) + 3))
        # The token that each row of logits gives is the next one that was fed.
        fed = request["_root/inputs_input_ids_cpu"].tolist()
        assert request[LOGITS].argmax(-1).tolist()[:-1] == fed[len(prompt) :]
    alone = generated(model, tmp_path, padded(PROMPTS[1:2]))
    found = tlcore.compare(alone, run, ignore_missing=True)
    assert found.equal and {each.first_position for each in found.results} >= {0, 3, 4, 5}
    assert torch.allclose(alone.request("0")[LAYER], run.request("1")[LAYER], atol=1e-5)


def test_a_generation_in_one_step_reads_as_in_many(tmp_path: Path) -> None:
    model, batch = llama(), padded(PROMPTS)
    many = generated(model, tmp_path, batch)

    def act(capture: tlcore.capture) -> None:
        with capture.step(rows=["a", "b", "c"]):
            model.generate(**batch, max_new_tokens=4, do_sample=False)

    one = run_of(model, tmp_path, act)
    assert one.steps == [0] and list(one.requests) == ["a", "b", "c"]
    for mine, theirs in zip("abc", "012", strict=True):
        request, other = one.request(mine), many.request(theirs)
        assert set(request.names) == set(other.names)
        assert all(torch.equal(request[name], other[name]) for name in other)
    assert tlcore.compare(one, many).equal


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cache", "no cache"])
def test_without_padding_there_need_be_no_mask(options: dict[str, Any], tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    run = generated(llama(), tmp_path, {"input_ids": ids}, options=options)
    assert list(run.requests) == ["0", "1"]
    assert run.request("1").positions(LAYER) == list(range(6))
    assert run.request("1").recomputed(LAYER) == ([0, 1, 2, 3, 4] if options else [])


def test_another_generation_has_other_samples(tmp_path: Path) -> None:
    model, batch = llama(), padded(PROMPTS[:2])

    def act(_: Any) -> None:
        for _round in range(2):
            model.generate(**batch, max_new_tokens=2, do_sample=False)

    run = run_of(model, tmp_path, act)
    assert list(run.requests) == ["0", "1", "2", "3"] and run.request("2").steps == [2, 3]


def test_beams_that_change_places_are_not_joined(tmp_path: Path) -> None:
    run = generated(llama(), tmp_path, padded(PROMPTS[:2]), options={"num_beams": 2})
    assert [len(run.step(number).samples) for number in run.steps] == [4] * len(run.steps)
    assert all(len(run.request(each).steps) == 1 for each in run.requests)


def test_samples_of_one_prompt_are_rows_of_the_batch(tmp_path: Path) -> None:
    model = llama()

    def act(_: Any) -> None:
        model.generate(**padded(PROMPTS[:2]), max_new_tokens=3, do_sample=True, num_return_sequences=2)

    run = run_of(model, tmp_path, act)
    assert list(run.requests) == ["0", "1", "2", "3"]
    assert len({each["prompt_hash"] for each in run.step(0).samples}) == 2
    assert [run.request(each).positions(LAYER) for each in "0123"] == [list(range(7))] * 2 + [
        list(range(5))
    ] * 2


def test_rows_after_a_samples_end_are_nobodys(tmp_path: Path) -> None:
    model, batch = llama(), padded(PROMPTS[:2])
    ids = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, 5:]
    ending = int(ids[0, 1])
    assert ending not in ids[1].tolist() and ending not in ids[0, :1].tolist()
    model.generation_config.eos_token_id = ending
    run = generated(model, tmp_path, batch)
    # Two tokens came, and the second was the end: only the first was fed while the sample lived.
    assert run.request("0").positions(LAYER) == list(range(len(PROMPTS[0]) + 1))
    assert run.request("1").positions(LAYER) == list(range(len(PROMPTS[1]) + 3))
    assert [each.get("ended", False) for each in run.step(3).samples] == [True, False]
    assert tlcore.compare(generated(model, tmp_path, padded(PROMPTS[:1])), run, ignore_missing=True).equal
    alone = generated(model, tmp_path, padded(PROMPTS[:1]))
    assert set(alone.request("0").positions(LAYER)) == set(run.request("0").positions(LAYER))


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_only_the_last_rows_of_chosen_samples(backend: str, tmp_path: Path) -> None:
    model, batch = llama(), padded(PROMPTS)
    whole = generated(model, tmp_path, batch)
    keys: dict[str, Any] = {"rows": "last", "request_ids": ["^[02]$"], "backend": backend}
    run = generated(model, tmp_path, batch, **keys)
    assert list(run.requests) == ["0", "2"]
    for sample in ("0", "2"):
        last, every = run.request(sample), whole.request(sample)
        expected = every.positions(LAYER)[-4:]
        assert last.positions(LAYER) == last.positions(LOGITS) == expected
        assert torch.equal(last[LAYER], every[LAYER][-4:]) and torch.equal(last[LOGITS], every[LOGITS])
    shapes = {record["shape"][0] for number in run.steps for record in run.step(number).records}
    assert shapes == {2}
    assert run.ledger.reasons["skipped: rows of the requests unknown"] > 0


def test_right_padding_does_not_pass_for_the_last_row(tmp_path: Path) -> None:
    model, batch = llama(), padded(PROMPTS, left=False)
    run = forward(model, tmp_path, batch, rows="last")
    logits = model(**batch).logits
    for sample, prompt in enumerate(PROMPTS):
        found = run.request(str(sample))[LOGITS]
        assert torch.allclose(found[0], logits[sample, len(prompt) - 1], atol=1e-5)


def test_what_is_stored_whole_is_not_taken_for_the_rows_of_somebody(tmp_path: Path) -> None:
    run = forward(llama(), tmp_path, padded(PROMPTS[:1]), rows="last")
    cosines = [record for record in run.step(0).records if "rotary" in record["name"]]
    assert cosines and all(
        run.step(0).row_spans(each)[0].length == 1 for each in cosines if each["shape"][0] == 1
    )
    run = forward(llama(), tmp_path, padded(PROMPTS[:1], more=2), rows="last")
    masks = [
        each for each in run.step(0).records if each["name"].endswith("layers.0/inputs_attention_mask_cpu")
    ]
    assert [each["shape"] for each in masks] == [[1, 1, 7, 7]] and not run.step(0).row_spans(masks[0])


def test_rows_are_counted_again_in_each_batch_of_one_step(tmp_path: Path) -> None:
    model = llama()
    first, second = padded(PROMPTS), padded(PROMPTS[:2], left=False)

    def act(capture: tlcore.capture) -> None:
        with capture.step():
            model(**first)
            model(**second)

    run = run_of(model, tmp_path, act)
    assert list(run.requests) == ["0", "1", "2", "3", "4"]
    whole = run.tensor("step_0/model.layers.1_1/outputs_cpu")
    assert torch.equal(run.request("4")[LAYER], whole[1, : len(PROMPTS[1])])


def test_encoder_and_decoder_have_rows_of_their_own(tmp_path: Path) -> None:
    model, batch = t5(), padded(PROMPTS, left=False)
    target = padded([[0, 4, 5], [0, 6], [0, 7, 8, 9]], left=False)
    decoder = {f"decoder_{key}": value for key, value in target.items()}
    run = run_of(model, tmp_path, lambda _: model(**batch, **decoder))
    request = run.request("1")
    embedded = "encoder.embed_tokens/outputs_cpu", "decoder.embed_tokens/outputs_cpu"
    lengths = [len(request[name]) for name in embedded if name in request]
    assert request["encoder/outputs_last_hidden_state_cpu"].shape == (3, 32)
    assert request["decoder/outputs_last_hidden_state_cpu"].shape == (2, 32)
    assert request["decoder.block.0.layer.1.EncDecAttention.k/outputs_cpu"].shape == (3, 32)
    assert request[LOGITS].shape == (2, 64) and lengths == [3, 2][: len(lengths)]


@pytest.mark.parametrize("target", [[0, 6, 3], [0, 0, 6], [0, 6, 0]], ids=["full", "left", "right"])
def test_what_a_decoder_starts_with_is_no_padding_though_that_has_its_number(
    tmp_path: Path, target: list[int]
) -> None:
    model, batch = t5(), padded(PROMPTS, left=False)
    model.config.pad_token_id = model.generation_config.pad_token_id = 0
    ids = torch.tensor([[0, 4, 5], target, [0, 7, 8]])
    run = run_of(model, tmp_path, lambda _: model(**batch, decoder_input_ids=ids))
    if 0 in target[1:]:
        assert "which positions are padding is not known" in run.step(0).documents[0]["rows_unavailable"]
        return
    assert list(run.requests) == ["0", "1", "2"]
    request = run.request("1")
    assert request.token_ids.tolist() == target
    assert request["decoder/outputs_last_hidden_state_cpu"].shape == (3, 32)
    assert [*request.tokens.encoder.values()] == PROMPTS[1]


def test_an_encoder_as_long_as_the_decoder_is_not_taken_for_it(tmp_path: Path) -> None:
    model, batch = t5(), padded(PROMPTS, left=False)
    decoder = {
        f"decoder_{key}": value for key, value in padded([[0, 4, 5], [0, 6], [0] * 7], left=False).items()
    }
    request = run_of(model, tmp_path, lambda _: model(**batch, **decoder)).request("1")
    assert not [name for name in request if "EncDecAttention.k" in name]
    assert request["encoder/outputs_last_hidden_state_cpu"].shape == (3, 32)


def test_a_generation_of_encoder_and_decoder(tmp_path: Path) -> None:
    model, batch = t5(), padded(PROMPTS, left=False)

    def act(capture: tlcore.capture) -> None:
        with capture.step(rows=["a", "b", "c"]):
            model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None)

    request = run_of(model, tmp_path, act).request("b")
    assert request.positions("decoder/outputs_last_hidden_state_cpu") == [0, 1, 2, 3]
    assert request.positions("encoder/outputs_last_hidden_state_cpu") == [0, 1, 2]
    assert request.positions(LOGITS) == [0, 1, 2, 3]


def test_the_ids_of_encoder_and_decoder_are_one_where_steps_are_outermost_calls(tmp_path: Path) -> None:
    model, batch = t5(), padded(PROMPTS, left=False)
    run = generated(model, tmp_path, batch, step="outermost", options={"eos_token_id": None})
    assert list(run.requests) == ["0", "1", "2"] and len(run.request("1").steps) == 5


def test_positions_in_the_weights_of_another_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    run = generated(
        transformers.GPT2LMHeadModel(config).eval(), tmp_path, padded(PROMPTS), options={"pad_token_id": 1}
    )
    # GPT-2's projections work on a view [positions of all samples, width].
    name = "transformer.h.0.mlp.c_fc/outputs_cpu"
    assert run.request("0").positions(name) == list(range(8))


BAD = [
    ({"attention_mask": torch.ones(2, 1, 3, 3)}, "attention_mask has 4 axes"),
    ({"attention_mask": torch.tensor([[1, 1, 2], [1, 1, 1]])}, "values other than 0 and 1"),
    ({"attention_mask": torch.ones(2, 2)}, "attention_mask has the shape"),
    ({"attention_mask": torch.ones(2, 3), "position_ids": torch.tensor([[0, 1, 0], [0, 1, 2]])}, "packed"),
    ({"input_ids": torch.tensor([[0, 6, 7], [8, 9, 10]])}, "no attention_mask"),
]


@pytest.mark.parametrize(("given", "why"), BAD, ids=["4 axes", "values", "shape", "packed", "no mask"])
def test_what_is_not_known_is_said_and_given_to_nobody(
    given: dict[str, Any], why: str, tmp_path: Path
) -> None:
    class Takes(llama().__class__):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None) -> Any:
            return self.model.embed_tokens(input_ids)

    model = llama()
    model.__class__ = Takes
    given = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), **given}
    run = run_of(model, tmp_path, lambda _: model(**given))
    assert why in run.step(0).documents[0]["rows_unavailable"]
    assert not run.requests and not run.step(0).samples
    with tlcore.capture(model, output_dir=str(tmp_path), rows="last") as capture:
        model(**given)
    assert capture.ledger.stored == 0 and why in capture.remarks[0]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def test_named_samples_of_any_model(tmp_path: Path) -> None:
    model, x = Mlp(), torch.randn(3, 4)

    def act(capture: tlcore.capture) -> None:
        with capture.step(rows=["a", None, "b"]):
            model(x)

    run = run_of(model, tmp_path, act)
    assert list(run.requests) == ["a", "b"]
    assert torch.equal(run.request("b")["inner/inputs_0_cpu"], x[2:])
    kept = run_of(model, tmp_path, act, request_ids="b")
    assert torch.equal(kept.tensor("step_0/inner/inputs_0_cpu"), x[2:])


def test_named_ranges_of_sequences(tmp_path: Path) -> None:
    model, x = Mlp(), torch.randn(2, 5, 4)
    named = [{"request_id": "a", "first": 2, "rows": 3, "first_position": 7}, {"request_id": "b", "rows": 4}]

    def act(capture: tlcore.capture) -> None:
        with capture.step(rows=named):
            model(x)

    run = run_of(model, tmp_path, act)
    a, b = run.request("a"), run.request("b")
    assert torch.equal(a["inner/inputs_0_cpu"], x[0, 2:]) and a.positions("inner/inputs_0_cpu") == [7, 8, 9]
    assert torch.equal(b["inner/inputs_0_cpu"], x[1, :4])
    last = run_of(model, tmp_path, act, rows="last")
    assert torch.equal(last.tensor("step_0/inner/inputs_0_cpu"), torch.stack([x[0, 4], x[1, 3]]))


def test_a_batch_of_another_size_than_named_is_nobodys(tmp_path: Path) -> None:
    model = llama()

    def act(capture: tlcore.capture) -> None:
        with capture.step(rows=["a", "b"]):
            model(**padded(PROMPTS))

    run = run_of(model, tmp_path, act)
    assert not run.requests
    assert run.step(0).documents[0]["rows_unavailable"] == "rows names 2 sequences, and the batch has 3"


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ("ab", "is no list"),
        ([1, 2], r"rows\[0\] is 1; give an id"),
        (["a", "a"], "names 'a' twice"),
        ([{"request_id": "a", "begin": 1}], "unknown key 'begin'"),
        ([{"request_id": "a", "rows": 0}], "rows=0 is not a number of positions"),
    ],
)
def test_bad_rows_are_refused(rows: Any, why: str, tmp_path: Path) -> None:
    with (
        tlcore.capture(Mlp(), output_dir=str(tmp_path)) as capture,
        pytest.raises(tlcore.CaptureError, match=why),
    ):
        capture.step(rows=rows)


def test_nothing_is_left_in_the_model_and_outputs_are_the_same(tmp_path: Path) -> None:
    model, batch = llama(), padded(PROMPTS)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    expected = model.generate(**batch, max_new_tokens=3, do_sample=False)
    with tlcore.capture(model, output_dir=str(tmp_path), log_step_ids=[0, 2], step="outermost"):
        assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False), expected)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
