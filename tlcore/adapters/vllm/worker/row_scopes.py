"""Which rows the running part of a step has, told from the methods of the model runner that run it.

The target model's pass has a row for each scheduled token, its logits one for each position that is
sampled from, the logits of ``prompt_logprobs`` those of one request's prompt, an encoder works on items
(images) of single requests. Where a vLLM release has none of these methods, the rows of what they call
stay unknown.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ....engine.filters.rows import Given, StepRows
from ....layout.rows import ANY, NO_ROWS, Row, RowSet
from ....record import Json
from .encoders import within_encoders
from .items import item_sets
from .later_rows import LaterRows
from .row_sets import Sets, pooled, rows_of, sampled, token_set, where
from .rows import RowError, RowReader
from .tokens import TokenReader

if TYPE_CHECKING:
    from ....engine.row_injection import RowInjection

log = logging.getLogger("vllm.tlcore")
# Their poolers give each request's tokens apart.
_TOKENWISE = frozenset({"token_embed", "token_classify", "plugin"})
# The classes of what makes one row of a request's.
_POOLED = frozenset({"CLSPool", "LastPool", "MeanPool"})


class RowScopes:
    """Tells a step's `StepRows` which rows come next; nothing of it can break a step."""

    def __init__(self, runner: Any, reader: RowReader, tokens: TokenReader) -> None:
        self._runner = runner
        self._reader = reader
        self._tokens = tokens
        self._inner: Callable[[str], bool] | None = None
        self._keeps_ids = False
        # Makes the entries of the step's token ids.
        self.tokens: Callable[[], list[Json]] | None = None
        self._step: StepRows | None = None
        self._injection: RowInjection | None = None
        self._scheduled: Any = None
        self.rows: list[Json] | None = None
        self._unsampled: frozenset[str] = frozenset()
        self.problem: str | None = None
        self._warned: set[str] = set()
        self.wrap(runner, "_prepare_inputs", after=self._prepared)
        self.wrap(runner, "_preprocess", self._preprocess)
        self.wrap(runner, "_execute_mm_encoder", _nothing)
        self.wrap(runner, "_model_forward", self._forward, self._sampled_next)
        self.wrap(runner, "_pool", self._pool)
        self._wrap_items(runner)
        self._wrap_prompt_logits(runner)
        if reader.second_version:
            self._wrap_second_version(runner)

    def begin(
        self,
        step: StepRows,
        scheduler_output: Any,
        keeps_ids: bool = False,
        injection: RowInjection | None = None,
    ) -> None:
        """A captured step begins, of which token ids are kept or not, and into which results are injected."""
        self._step, self._scheduled, self._injection = step, scheduler_output, injection
        self._keeps_ids = keeps_ids
        step.before = self._reader.before
        step.inner = self._inner
        self.rows = self.problem = self.tokens = None
        self._unsampled = frozenset()

    def end(self) -> None:
        """The step is over."""
        self._step = None

    def enter(self, sets: Sets, main: bool = False) -> None:
        """What is called from now on has these rows."""
        if self._step is not None:
            self._step.enter(sets, main)

    # What the wrapped methods mean

    def _prepared(self, output: Any, *args: Any, **kwargs: Any) -> None:
        scheduled = kwargs.get("scheduler_output", args[0] if args else self._scheduled)
        try:
            rows = self.rows = self._reader.rows(scheduled)
        except RowError as error:
            self.problem = str(error)
            raise
        if self._step is not None:
            requests = [row["request_id"] for row in rows]
            prompts = self._tokens.prompts(requests)
            self._unsampled = self._cut_short(rows, prompts)
            of_items = {(request, self._reader.of_items): length for (request, _), length in prompts.items()}
            self._step.batch(requests, {**of_items, **prompts}, self._unsampled)
            if self._injection is not None:
                self._injection.batch(self._given(rows, output, prompts))
            if self._keeps_ids:
                self._take_tokens(rows, output, self._step)

    def _given(
        self, rows: Sequence[Row], batch: Any, prompts: Mapping[tuple[str, str], int]
    ) -> Iterator[Given]:
        """What the model is given of each request; of prompt embeddings, no token."""
        ids = self._tokens.given(rows, batch)
        for row in rows:
            request, first = str(row["request_id"]), row["first_row"]
            own = [-1] * row["rows"] if ids is None else ids[first : first + row["rows"]].tolist()
            yield Given(row, own, prompts.get((request, "")), self._reader.is_apart(request))

    def _cut_short(self, rows: Sequence[Row], prompts: Mapping[tuple[str, str], int]) -> frozenset[str]:
        """The requests of which the step does not reach the end, so that nothing is sampled for them."""
        mask = getattr(self._runner, "discard_request_mask", None)
        if mask is not None:
            return frozenset(str(row["request_id"]) for row, cut in zip(rows, mask.np, strict=False) if cut)
        ends = ((str(row["request_id"]), row["first_position"] + row["rows"]) for row in rows)
        return frozenset(request for request, end in ends if end < prompts.get((request, ""), 0))

    def _take_tokens(self, rows: list[Json], batch: Any, step: StepRows) -> None:
        try:
            self.tokens = self._tokens.take(rows, batch, step.chooses)
        except Exception as error:
            self.warn("the token ids of some requests are not known", error)

    def _wrap_second_version(self, runner: Any) -> None:
        """The second model runner has fewer methods to go by; what they do not tell stays unknown."""
        self.wrap(runner, "prepare_inputs", after=self._batch_ready)
        self.wrap(getattr(runner, "model_state", None), "get_mm_embeddings", _nothing)
        self.wrap(runner, "sample", self._sample)
        for name in ("compute_prompt_logprobs", "compute_prompt_token_id_logprobs"):
            self.wrap(getattr(runner, "prompt_logprobs_worker", None), name, _nothing)

    def _batch_ready(self, batch: Any, *args: Any, **kwargs: Any) -> None:
        self._reader.prepared(batch)
        self._prepared(batch, self._scheduled)
        if self.rows is not None:
            padded = max(0, int(batch.num_tokens_after_padding) - int(batch.num_tokens))
            self._enter_pass(self._tokens_of_pass(self.rows, padded), self.rows)

    def _sample(self, hidden: Any, batch: Any, *args: Any, **kwargs: Any) -> Sets:
        if self.rows is None:
            return NO_ROWS
        logits = sampled(self.rows, self._unsampled)
        return [logits] if logits.length == len(batch.logits_indices) else NO_ROWS

    def _forward(self, *args: Any, **kwargs: Any) -> Sets:
        positions = kwargs.get("positions", args[1] if len(args) > 1 else None)
        if self.rows is None or positions is None:
            return NO_ROWS
        padded = max(0, int(positions.shape[-1]) - sum(row["rows"] for row in self.rows))
        encoded = sum(map(len, kwargs.get("encoder_outputs") or ()))
        return self._enter_pass(self._tokens_of_pass(self.rows, padded, encoded), self.rows)

    def _enter_pass(self, tokens: RowSet, rows: Sequence[Json]) -> Sets:
        """The model's pass begins, with these rows of its tokens; an encoder's calls are none of it."""
        self._count_anew()
        self.enter([tokens], main=True)
        if self._reader.skips_some(rows):
            # What the skipped positions have after the last layer is of an earlier one.
            self.enter(NO_ROWS)
            self.warn("whose the rows are is not told of prompts", RowError("kv_sharing_fast_prefill is on"))
        return self._current()

    def _tokens_of_pass(self, rows: Sequence[Row], padded: int, encoded: int = 0) -> RowSet:
        reader = self._reader
        return token_set(rows, padded, reader.planes, encoded, reader.batched)

    def _sampled_next(self, output: Any, *args: Any, **kwargs: Any) -> None:
        # Only the logits are computed after the pass, and mostly nobody captures them.
        rows, unsampled = self.rows, self._unsampled
        if rows is None:
            self.enter(NO_ROWS)
        else:
            self.enter([RowSet("sampled", LaterRows(lambda: sampled(rows, unsampled).rows))])

    def _preprocess(self, *args: Any, **kwargs: Any) -> Sets:
        """The tokens that are embedded apart from the model's pass."""
        if self.rows is None:
            return NO_ROWS
        if not getattr(self._runner, "supports_mm_inputs", False) and getattr(
            self._runner, "enable_prompt_embeds", False
        ):
            total = sum(row["rows"] for row in self.rows)
            return [RowSet("tokens", where(self.rows, self._runner.is_token_ids.np[:total].tolist()))]
        return [RowSet("tokens", self.rows)]

    def _pool(self, *args: Any, **kwargs: Any) -> Sets:
        if self.rows is None:
            return NO_ROWS
        tasks = {params.task for params in self._runner.input_batch.pooling_params.values()}
        tokens = RowSet("tokens", self.rows, vectors=True)
        if tasks & _TOKENWISE and tokens.length in self._chunks_before():
            # That chunk is given to the pooler beside the step's tokens, and has a row for each of its own.
            tokens = replace(tokens, single=((tokens.length, ANY),))
        if not tasks & _TOKENWISE:
            if len(tasks) > 1:
                return [tokens]
            return [tokens, pooled(self.rows, self._unsampled, self._pools_first(*tasks))]
        # A request's result has all its tokens, also those of earlier steps.
        ends = [row["first_position"] + row["rows"] for row in self.rows]
        return NO_ROWS if len(ends) > 1 and tokens.length in ends else [tokens]

    def _chunks_before(self) -> set[int]:
        """How many rows earlier steps left of each request, for what is pooled of all its tokens."""
        states = getattr(self._runner.input_batch, "pooling_states", {})
        return {len(each) for state in states.values() for each in state.hidden_states_cache}

    def _pools_first(self, task: str) -> bool:
        """Whether what the model pools of a request is its first row."""
        pooler = getattr(self._runner.get_model(), "pooler", None)
        pooler = getattr(pooler, "poolers_by_task", {}).get(task, pooler)
        parts = pooler.modules() if isinstance(pooler, nn.Module) else ()
        return {name for each in parts if (name := type(each).__name__) in _POOLED} == {"CLSPool"}

    def _wrap_items(self, runner: Any) -> None:
        """vLLM times each call of an encoder, and says so of which items it is."""
        original = getattr(runner, "timed_encoder_operation", None)
        if original is None:
            return

        @contextmanager
        def timed(should_time: bool, refs: Any, first: int, count: int, *more: Any) -> Iterator[Any]:
            with original(should_time, refs, first, count, *more) as given:
                if self._step is None:
                    yield given
                    return
                if self._inner is None:
                    self._guarded(self._learn_encoders)
                with self._in(lambda: self._items(refs[first : first + count])):
                    yield given

        runner.timed_encoder_operation = timed

    def _items(self, refs: Sequence[Any]) -> Sets:
        # Of the images of a step some are encoded by a call of their own, whoever else's are.
        self._count_anew()
        return item_sets(self._runner, refs, self._reader.known_of_item)

    def _count_anew(self, begin: int = 0) -> None:
        if self._step is not None:
            self._step.count_anew(begin)

    def _learn_encoders(self) -> None:
        self._inner = within_encoders(self._runner.get_model())
        if self._step is not None:
            self._step.inner = self._inner

    def _wrap_prompt_logits(self, runner: Any) -> None:
        original = getattr(runner, "_get_prompt_logprobs_dict", None)
        if original is None:
            return

        @functools.wraps(original)
        def prompt_logits(hidden: Any, *args: Any, **kwargs: Any) -> Any:
            if self._step is None or not getattr(runner, "num_prompt_logprobs", True):
                return original(hidden, *args, **kwargs)
            with (
                self._in(lambda: NO_ROWS),
                _watched(runner.get_model(), "compute_logits", self._logits_of(hidden)),
            ):
                return original(hidden, *args, **kwargs)

        runner._get_prompt_logprobs_dict = prompt_logits

    def _logits_of(self, hidden: torch.Tensor) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Logits of a part of the step's hidden states belong to the request whose rows that part is."""

        def watch(compute: Callable[..., Any]) -> Callable[..., Any]:
            def compute_logits(states: Any, *args: Any, **kwargs: Any) -> Any:
                with self._in(lambda: self._part_of(hidden, states)):
                    return compute(states, *args, **kwargs)

            return compute_logits

        return watch

    def _part_of(self, hidden: torch.Tensor, states: torch.Tensor) -> Sets:
        # Behind the logits that are sampled from, whichever of the step's prompts it is.
        self._count_anew(1)
        if self.rows is None or hidden.untyped_storage().data_ptr() != states.untyped_storage().data_ptr():
            return NO_ROWS
        first, rest = divmod(int(states.storage_offset() - hidden.storage_offset()), hidden.stride(0))
        count = int(states.shape[0])
        for row in self.rows:
            skipped = first - row["first_row"]
            if rest == 0 and skipped >= 0 and skipped + count <= row["rows"]:
                position = row["first_position"] + skipped
                return [RowSet("prompt", [rows_of(row, 0, count, position)])]
        return NO_ROWS

    # Wrapping

    def wrap(
        self,
        owner: Any,
        name: str,
        before: Callable[..., Sets] | None = None,
        after: Callable[..., None] | None = None,
        on: Callable[[bool], None] | None = None,
    ) -> None:
        """Let a method tell of rows: ``before`` says those of what it calls, ``after`` hears its result.

        ``on`` hears True when it begins and False when it is over. A method that is not there tells nothing.
        """
        original = getattr(owner, name, None)
        if original is None:
            return

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._step is None:
                return original(*args, **kwargs)
            if before is None:
                output = original(*args, **kwargs)
            else:
                with self._in(lambda: before(*args, **kwargs), on):
                    output = original(*args, **kwargs)
            if after is not None:
                self._guarded(lambda: after(output, *args, **kwargs))
            return output

        setattr(owner, name, wrapped)

    @contextmanager
    def _in(self, sets: Callable[[], Sets], on: Callable[[bool], None] | None = None) -> Iterator[None]:
        """What is called in the block has these rows; afterwards those from before."""
        before, first = self._current(), self._first()
        self.enter(NO_ROWS)
        self._guarded(lambda: self.enter(sets()))
        if on is not None:
            on(True)
        try:
            yield
        finally:
            if on is not None:
                on(False)
            if self._step is not None:
                self._step.first = first
            self.enter(before)

    def _current(self) -> Sets:
        return NO_ROWS if self._step is None else self._step.sets

    def _first(self) -> Mapping[str, int]:
        return {} if self._step is None else self._step.first

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            self.warn("the rows of some tensors are not known", error)

    def warn(self, what: str, error: Exception) -> None:
        """Log a problem the first time."""
        if what not in self._warned:
            self._warned.add(what)
            log.warning("%s (said once): %s", what, error, exc_info=not isinstance(error, RowError))


def _nothing(*args: Any, **kwargs: Any) -> Sets:
    return NO_ROWS


@contextmanager
def _watched(
    owner: Any, name: str, watch: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Let a method of one object go through ``watch`` in the block."""
    own = vars(owner)
    before = own.get(name)
    own[name] = watch(getattr(owner, name))
    try:
        yield
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before
