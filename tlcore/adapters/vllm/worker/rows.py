"""Which rows of a step's tensors belong to which request: read from the model runner, never guessed."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from ....record import Json
from ..salts import is_apart
from .identity import identity, names_items

_RANDOM_SUFFIX = re.compile(r"(.+)-[0-9a-f]{8}\Z", re.DOTALL)
_REPEATING = "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"
_SAMPLE_PREFIX = re.compile(r"\d+_")
# Asking for the class would import transformers for every model.
_TRANSFORMERS = "vllm.model_executor.models.transformers"


class RowError(Exception):
    """The rows cannot be had for this step; the message says why."""


class RowReader:
    """Reads a step's rows from a vLLM model runner.

    ``rows`` is to be called when the step's inputs are prepared.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._batch: Any = None
        self._known: dict[str, Json] = {}
        self._asked: dict[str, tuple[Any, int]] = {}
        self._external: dict[str, str | None] = {}
        self._apart: set[str] = set()
        # Ids of requests that have ended, where others may have the same, and who has one of these.
        self._ended: set[str] = set()
        self._repeated: set[str] = set()
        self.second_version = not hasattr(runner, "input_batch") and hasattr(runner, "prepare_inputs")

    @functools.cached_property
    def before(self) -> tuple[int, ...] | None:
        """How long an axis before that of rows may be, which positions have in several dimensions.

        None where the runner does not tell.
        """
        try:
            engine = self._runner.vllm_config
            draft = getattr(getattr(engine, "speculative_config", None), "draft_model_config", None)
            dimensions = [_dimensions(each) for each in (engine.model_config, draft) if each is not None]
        except (AttributeError, TypeError, ValueError):
            return None
        return tuple(sorted({each for found in dimensions for each in found}))

    @functools.cached_property
    def planes(self) -> tuple[int, ...]:
        """How long an axis may be that the model's states have before that of tokens (Gemma 3n's AltUp)."""
        try:
            found = getattr(self._runner.vllm_config.model_config.hf_text_config, "altup_num_inputs", None)
        except AttributeError:
            return ()
        return () if found is None else (int(found),)

    @functools.cached_property
    def _skips_positions(self) -> bool:
        """Whether positions that nothing is sampled from go through the first layers only."""
        engine = getattr(self._runner, "vllm_config", None)
        asked = getattr(getattr(engine, "cache_config", None), "kv_sharing_fast_prefill", False)
        return bool(asked and getattr(self._runner, "kv_sharing_fast_prefill_eligible_layers", True))

    def skips_some(self, rows: Sequence[Json]) -> bool:
        """Whether some of a step's positions have no rows, or an earlier layer's, behind some layers."""
        return self._skips_positions and any(row["rows"] > 1 + row.get("drafts", 0) for row in rows)

    @functools.cached_property
    def _names_items(self) -> bool:
        return names_items(getattr(self._runner, "vllm_config", None))

    @functools.cached_property
    def batched(self) -> bool:
        """Whether modules of the model may be given a step's tokens as a batch of one sample."""
        model = getattr(self._runner, "get_model", None)
        return model is not None and runs_transformers(model())

    def prepared(self, batch: Any) -> None:
        """Keep the batch that the second model runner has made; it keeps it in a local variable."""
        self._batch = batch

    def forget(self) -> None:
        """Forget the requests noted so far, some of which may end unseen."""
        self._known.clear()
        self._asked.clear()
        self._external.clear()
        self._apart.clear()
        self._ended.clear()
        self._repeated.clear()

    def begin_step(self, scheduler_output: Any) -> None:
        """Drop the batch of the step before, and note where new requests begin, and their prompts.

        To be called for every step, captured or not: later nothing tells how much of a request vLLM took
        from its prefix cache.
        """
        self._batch = None
        for request in getattr(scheduler_output, "finished_req_ids", ()):
            self._known.pop(request, None)
            self._asked.pop(request, None)
            self._external.pop(request, None)
            self._apart.discard(request)
            self._repeated.discard(request)
            if _ids_repeat():
                self._ended.add(request)
        for new in getattr(scheduler_output, "scheduled_new_reqs", ()):
            if new.req_id in self._ended:
                self._repeated.add(new.req_id)
            # One that comes again, after a preemption or with more input, has computed most of it itself.
            first = self._known.get(new.req_id, {}).get("cached", new.num_computed_tokens)
            self._known[new.req_id] = {"cached": int(first), **identity(new, self._names_items)}
            if is_apart(getattr(new, "cache_salt", None)):
                self._apart.add(new.req_id)
            prompt = getattr(new, "prompt_token_ids", None)
            if prompt is None:
                prompt = getattr(new, "prompt_embeds", None)
            if prompt is not None:
                self._asked[new.req_id] = getattr(new, "sampling_params", None), len(prompt)

    @functools.cached_property
    def of_items(self) -> str:
        """The sequence of an encoder's rows, which are none of the prompt's where there is a decoder."""
        model = getattr(getattr(self._runner, "vllm_config", None), "model_config", None)
        return "encoder" if getattr(model, "is_encoder_decoder", False) else ""

    def known_of_item(self, request_id: str) -> Json:
        """What is known of a request besides the rows of an encoder."""
        known: Json = {"external_request_id": external_id(request_id)}
        return {**known, "sequence": self.of_items} if self.of_items else known

    def is_apart(self, request_id: str) -> bool:
        """Whether a request shares no prefix cache with others, as one does that is injected into."""
        return request_id in self._apart

    def asked(self, request_id: str) -> tuple[Any, int] | None:
        """A request's sampling parameters and the length of its prompt; None where that is not known.

        The second model runner keeps neither, so of a request that began before a capture nothing tells.
        """
        state = getattr(self._runner, "requests", {}).get(request_id)
        params, prompt = getattr(state, "sampling_params", None), getattr(state, "num_prompt_tokens", None)
        if params is not None and prompt is not None:
            return params, int(prompt)
        return self._asked.get(request_id)

    def rows(self, scheduler_output: Any) -> list[Json]:
        """The rows, in the batch's order; with speculation, how many of them are ``drafts`` (the last ones).

        Raises RowError when the runner does not hold them in a known form, or its own figures
        contradict each other.
        """
        try:
            parallel = self._runner.vllm_config.parallel_config
            if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
                raise RowError("prefill context parallelism splits requests over ranks")
            version = self._of_second_version if self.second_version else self._of_first_version
            rows = version(scheduler_output)
            repeated = [row["request_id"] for row in rows if row["request_id"] in self._repeated]
            if repeated:
                raise RowError(f"{repeated[0]!r} was the id of another request, as {_REPEATING} lets it be")
            for row in rows:
                row.update(self._known.get(row["request_id"], {}))
            if getattr(self._runner, "speculative_config", None) is not None:
                drafts = scheduler_output.scheduled_spec_decode_tokens
                for row in rows:
                    row["drafts"] = min(len(drafts.get(row["request_id"], ())), row["rows"] - 1)
            return rows
        except (AttributeError, KeyError, TypeError, IndexError) as error:
            raise RowError(f"the model runner is unknown: {type(error).__name__}: {error}") from error

    def _of_first_version(self, scheduler_output: Any) -> list[Json]:
        runner = self._runner
        ids = list(runner.input_batch.req_ids)
        counts = [int(scheduler_output.num_scheduled_tokens[each]) for each in ids]
        total = int(scheduler_output.total_num_scheduled_tokens)
        starts = _integers(runner.query_start_loc)
        rows = _rows(ids, counts, total, starts, _tensor(runner.positions), self._external_ids(ids))
        if getattr(runner, "speculative_config", None) is None:
            # With speculation the host's count is only an upper bound.
            computed = _integers(runner.input_batch.num_computed_tokens_cpu[: len(ids)])
            _agree("positions and computed tokens", [row["first_position"] for row in rows], computed)
        return rows

    def _of_second_version(self, scheduler_output: Any) -> list[Json]:
        batch = self._batch
        if batch is None:
            raise RowError("the model runner prepared no batch")
        counts = [int(each) for each in batch.num_scheduled_tokens]
        starts = _integers(batch.query_start_loc_np)
        ids = list(batch.req_ids)
        return _rows(ids, counts, int(batch.num_tokens), starts, batch.positions, self._external_ids(ids))

    def _external_ids(self, ids: Sequence[str]) -> list[str | None]:
        """Those that the clients gave, told once of each request."""
        known = self._external
        for request in ids:
            if request not in known:
                known[request] = external_id(request)
        return [known[request] for request in ids]


def runs_transformers(model: Any) -> bool:
    """Whether a model, or a part of it, is transformers' code, for which vLLM has no class of its own."""
    return any(
        each.__module__.startswith(_TRANSFORMERS) for part in model.modules() for each in type(part).__mro__
    )


def _dimensions(model: Any) -> list[int]:
    """The dimensions of a model's positions, where they are several: (dimensions, tokens)."""
    found = [int(getattr(model, "mrope_num_dims", 3))] if model.uses_mrope else []
    other = int(getattr(model, "uses_xdrope_dim", 0))
    return [*found, other] if other else found


def _rows(
    ids: Sequence[str],
    counts: Sequence[int],
    total: int,
    starts: Sequence[int],
    positions: torch.Tensor,
    external_ids: Sequence[str | None],
) -> list[Json]:
    """Rows from the batch's request ids and token counts, held against what the model was given."""
    firsts = [0, *accumulate(counts)]
    _agree("scheduled tokens and their sum", [firsts[-1]], [total])
    _agree("token counts and query_start_loc", firsts, list(starts[: len(ids) + 1]))
    if min(counts, default=1) < 1:
        raise RowError("a request of the batch has no tokens")
    lasts = [end - 1 for end in firsts[1:]]
    edges = torch.tensor([*firsts[:-1], *lasts], device=positions.device)
    found: list[int] = positions[edges].tolist()
    begin, end = found[: len(ids)], found[len(ids) :]
    _agree("positions within a request", [b + n - 1 for b, n in zip(begin, counts, strict=True)], end)
    return [
        {
            "request_id": request,
            "external_request_id": external,
            "first_row": first,
            "rows": count,
            "first_position": position,
        }
        for request, external, first, count, position in zip(
            ids, external_ids, firsts[:-1], counts, begin, strict=True
        )
    ]


def _agree(what: str, one: list[int], other: list[int]) -> None:
    if one != other:
        raise RowError(f"{what} disagree")


def _integers(values: Any) -> list[int]:
    """The integers of an array or tensor, or of a buffer that has an array beside its device tensor."""
    array = getattr(values, "np", values)
    return [int(each) for each in (array.tolist() if hasattr(array, "tolist") else array)]


def _tensor(values: Any) -> torch.Tensor:
    """A tensor, or the device tensor of a buffer pair."""
    tensor: torch.Tensor = values if isinstance(values, torch.Tensor) else values.gpu
    return tensor


def _ids_repeat() -> bool:
    """Whether a request's id is its client's, and so may be that of a later one as well."""
    return os.environ.get(_REPEATING, "0") not in ("", "0")


def external_id(request_id: str) -> str | None:
    """The id that the client gave, where vLLM's internal one lets it be told for certain.

    vLLM appends ``-`` and eight random hex digits; of a request with several samples each child also
    gets ``<n>_`` in front, which a client's own id may begin with as well: then None.
    """
    if _ids_repeat():
        return None if _SAMPLE_PREFIX.match(request_id) else request_id
    found = _RANDOM_SUFFIX.match(request_id)
    return found[1] if found and not _SAMPLE_PREFIX.match(request_id) else None
