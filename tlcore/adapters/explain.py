"""Down to the operator, of two runs that are there already: their text is run again where they part.

A comparison names a module where the runs have no operators. Each side is then made again by its engine, in a
process of its own, in one pass over the tokens of the request in which they part, and compared anew.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..analysis import Comparison, compare
from ..analysis.results import Divergence
from ..errors import ConfigError, ReadError
from ..layout.directions import is_operator
from ..layout.dtypes import torch_dtype
from ..layout.names import shown_module
from ..reader import Run
from ..record import Json
from .processes import ENVIRONMENT, from_here, need, run_module

ENGINES: Mapping[str, str] = {"transformers": "tlcore.adapters.again", "vllm": "tlcore.adapters.vllm.again"}
# All modules; the operators of what holds the layers; those of a layer.
_ROUNDS = 3
_NUMBER = re.compile(r"\d")
# Where transformers puts the code of checkpoints that bring their own.
_REMOTE_CODE = "transformers_modules"
# What wraps its models, too.
_OF_TRANSFORMERS = (_REMOTE_CODE, "peft")


@dataclass(frozen=True)
class Maker:
    """What makes a run again: a checkpoint; where not given, the run tells with which engine and dtype.

    ``arguments`` go to `vllm.LLM`, or to transformers' ``from_pretrained``; of B, None means A's, where the
    engine is the same. ``of`` is the class of which the run was, where it says so.
    """

    model: str
    engine: str | None = None
    dtype: str | None = None
    arguments: Mapping[str, Any] | None = None
    of: str | None = None


class Texts(NamedTuple):
    """The token ids of each request, and of a model with encoder and decoder what the encoder was given."""

    prompts: list[list[int]]
    encoded: list[list[int]]


@dataclass(frozen=True)
class Explanation:
    """The comparison of the runs as they were, and those of what was captured again; the last one tells."""

    first: Comparison
    again: Sequence[Comparison]
    makers: tuple[Maker, Maker]
    tokens: int = 0

    @property
    def divergence(self) -> Divergence | None:
        """Where the runs part, as nearly as it is known."""
        return (self.again[-1] if self.again else self.first).first_divergence

    @property
    def found(self) -> bool:
        """Whether an operator was named."""
        return self.divergence is not None and self.divergence.operator is not None

    def __str__(self) -> str:
        first = self.first.first_divergence
        if first is None:
            return "no value of A and B differs: there is nothing to explain"
        if self.divergence is not None:
            return f"{self.divergence}{self._why_no_operator(self.divergence)}"
        how = " and ".join(dict.fromkeys(f"{each.engine} with {each.model}" for each in self.makers))
        return (
            f"A and B part in {shown_module(first.module)}, but made again by {how}, in one pass over the"
            f" same {self.tokens} tokens, they agree. They part in something that this pass lacks: other"
            " weights or settings, a cache, other requests in the batch, compiled code, an adapter"
        )

    def _why_no_operator(self, found: Divergence) -> str:
        """Why the last captures show no operator, and what to do then; nothing where they show one."""
        if found.operator is not None or not self.again:
            return ""
        if not found.born:
            given = shown_module(found.module)
            return f"; no operator can be named: what {given} is given was not captured, or differs already"
        module = (found.within if found.direction == "inputs" else found.module) or ""
        name = shown_module(module)
        last = self.again[-1]
        if not _asked_for(last, module):
            return f"; {last.advice}" if last.advice else ""
        seen = (*last.results, *(last.origin.left_out if last.origin is not None else ()))
        if any(each.module == module and is_operator(each.direction) for each in seen):
            return (
                f"; all operators that its code uses agree as far as they were compared: {name} computes what"
                " differs beside them, from something else than tensors, or in one that it changes in place"
            )
        other = " or with --engine transformers" if "vllm" in (each.engine for each in self.makers) else ""
        return (
            f"; no operator can be named: the code of {name} calls no function of torch by which it could"
            " be heard, but a kernel of its engine's. What it is given agrees, so look at what it was made"
            f" with (heads, scale, masks, window), or explain A and B with another kernel{other}"
        )

    def to_json(self) -> Json:
        """A JSON object."""
        first, last = self.first.first_divergence, self.divergence
        return {
            "a": self.first.a,
            "b": self.first.b,
            "first_divergence": None if first is None else first.to_json(),
            "again": [[each.a, each.b] for each in self.again],
            "divergence": None if last is None else last.to_json(),
            "verdict": str(self),
        }


def _asked_for(comparison: Comparison, module: str) -> bool:
    """Whether operators of a module of A were captured, if it used any."""
    runs = () if comparison.origin is None else comparison.origin.runs[:1]
    return any(re.search(str(each), module) for run in runs for each in run.config.get("ops") or ())


@dataclass(frozen=True)
class _Question:
    """What to capture of each side: patterns of modules (None: all), and of those whose operators."""

    modules: tuple[list[str] | None, list[str] | None] = (None, None)
    operators: tuple[list[str], list[str]] = ([], [])


def explain(
    first: Comparison,
    makers: tuple[Maker, Maker],
    directory: Path,
    compare_again: Callable[[str, str], Comparison] = compare,
    timeout_s: float = 900.0,
) -> Explanation:
    """Capture A and B again, with the operators of the module in which ``first`` sees them part.

    ``directory``, which must not be there, gets the runs and the log of each process; ``compare_again``
    compares them. Raises ConfigError where it is not known how to make a run, ReadError where the runs hold
    no token ids, ProcessError where an engine fails.
    """
    if first.first_divergence is None or first.origin is None:
        return Explanation(first, [], makers)
    known = _known(makers[0], first, 0), _known(makers[1], first, 1)
    if makers[1].arguments is None and known[0].engine == known[1].engine:
        known = known[0], replace(known[1], arguments=known[0].arguments)
    texts = Texts([], [])
    rounds: list[Comparison] = []
    question = _question(first, everything=True)
    while question is not None and len(rounds) < _ROUNDS:
        texts = texts if texts.prompts else _texts(first)
        urls = [
            _captured(known[side], texts, question, side, directory / f"{len(rounds)}_{label}", timeout_s)
            for side, label in enumerate("ab")
        ]
        rounds.append(compare_again(*urls))
        question = _question(rounds[-1], everything=False)
    return Explanation(first, rounds, known, sum(map(len, [*texts.prompts, *texts.encoded])))


def _known(maker: Maker, first: Comparison, side: int) -> Maker:
    assert first.origin is not None
    engine = maker.engine or _engine_of(first.origin.runs[side], "AB"[side])
    if engine not in ENGINES:
        raise ConfigError("--engine", f"{engine!r} is not one of {', '.join(ENGINES)}.")
    need(engine, "explain")
    model = _model_of(first.origin.runs[side])
    return Maker(
        from_here(maker.model, "--model"),
        engine,
        maker.dtype or _dtype_of(first, side),
        maker.arguments,
        model if model.partition(".")[0] in ("transformers", _REMOTE_CODE) else None,
    )


def _model_of(run: Run) -> str:
    environment = run.document.get("environment")
    return str(environment.get("model", "")) if isinstance(environment, Mapping) else ""


def _engine_of(run: Run, label: str) -> str:
    model = _model_of(run)
    engine = model.partition(".")[0]
    engine = "transformers" if engine in _OF_TRANSFORMERS else engine
    if engine in ENGINES:
        return engine
    of = f"of {model}" if model else "which does not say of what model it is"
    raise ConfigError(
        "--engine" if label == "A" else "--engine-b",
        f"{label} is {run.url}, {of}; that is made by none of {', '.join(ENGINES)}.",
        "Say which of them can make it again.",
    )


def _dtype_of(first: Comparison, side: int) -> str | None:
    """The floating dtype that most of a run's tensors have; a configuration may tell the checkpoint's."""
    dtypes = Counter(each.dtypes[side] for each in first.results)
    floating = (
        name for name, _ in dtypes.most_common() if (dtype := torch_dtype(name)) and dtype.is_floating_point
    )
    return next(floating, None)


def _question(comparison: Comparison, everything: bool) -> _Question | None:
    """What to capture next; None where the comparison says all that is to be known."""
    found = comparison.first_divergence
    if found is None or found.operator is not None:
        return None
    if comparison.advice is None:
        return _Question() if everything else None
    inside = (found.within if found.direction == "inputs" else found.module) or ""
    names = inside, _name_in_b(comparison, inside)
    below = [[f"^{re.escape(name)}([.]|$)" if name else ".*"] for name in names]
    # A layer's operators are few enough to be all captured; a model's are those of its own code.
    own = below if _NUMBER.search(inside) else [[f"^{re.escape(name)}$"] for name in names]
    return _Question((below[0], below[1]), (own[0], own[1]))


def _name_in_b(comparison: Comparison, module: str) -> str:
    """A module of A as B calls it."""
    assert comparison.origin is not None
    run = comparison.origin.runs[1]
    for each in comparison.results:
        if each.module == module and each.names[1] is not None:
            step, call, _ = each.names[1].split("/", 2)
            return run.step(int(step.rpartition("_")[2])).call(call, each.rank).module
    return module


def _texts(first: Comparison) -> Texts:
    """The tokens of the request in which the runs part, as A has them.

    Where the comparison is not by request, or A has none, those of all requests of that step.
    """
    found = first.first_divergence
    assert found is not None and first.origin is not None
    problems = []
    for side, run in enumerate(first.origin.runs):
        try:
            return _texts_in(run, found, side)
        except ReadError as error:
            problems.append(str(error))
    raise ReadError(f"what the runs were given is not known, so they cannot be made again: {problems[0]}")


def _texts_in(run: Run, found: Divergence, side: int) -> Texts:
    name = found.result.names[side] or ""
    step = run.step(int(name.partition("/")[0].rpartition("_")[2] or found.step))
    if found.result.request is not None and side == 0:
        request = found.result.request
        # Rows of an encoder's are told as those of a sequence of the request.
        return _texts_of(run, [request if request in run.requests else request.rpartition("@")[0]])
    requests = sorted({str(each["request_id"]) for each in step.token_entries})
    if not requests:
        raise ReadError(f"{run.url}: step {step.number} has no token ids")
    return _texts_of(run, requests)


def _texts_of(run: Run, requests: Sequence[str]) -> Texts:
    found = [run.request(each) for each in requests]
    encoded = [[ids for _, ids in sorted(each.tokens.encoder.items())] for each in found]
    return Texts([each.token_ids.tolist() for each in found], encoded if any(encoded) else [])


def _captured(
    maker: Maker, texts: Texts, question: _Question, side: int, place: Path, timeout_s: float
) -> str:
    """The URL of a run of the prompts, in one pass."""
    config: Json = {
        "output_dir": str(place / "runs"),
        "module_call_match": question.modules[side],
        "log_step_ids": [0],
    }
    if question.operators[side]:
        config["ops"] = question.operators[side]
    settings = {
        "model": maker.model,
        "dtype": maker.dtype,
        "arguments": dict(maker.arguments or {}),
        "prompts": texts.prompts,
        "encoded": texts.encoded,
        "of": maker.of,
        "config": config,
    }
    module = ENGINES[maker.engine or ""]
    return str(run_module(module, settings, place, timeout_s, ENVIRONMENT)["url"])
