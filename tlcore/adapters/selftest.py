"""The self-test of a checkpoint: engines, then transformers, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..analysis.selftest.exercised import WAYS as WAYS
from ..analysis.selftest.judge import TOLERANCES, Asked, Verdict, judge
from ..analysis.selftest.layers import LAYERS
from ..analysis.selftest.reference import Reference
from ..errors import ConfigError
from ..reader import open_run
from ..record import Json
from .processes import ENVIRONMENT, ProcessError, from_here, need, run_module
from .reference import FILE
from .vllm.selftest import ENGINES, make_prompts


@dataclass(frozen=True)
class Settings:
    """What is tested: a checkpoint for transformers, in which dtype, and in which of the ``WAYS``."""

    model: str
    dtype: str = "float32"
    ways: Sequence[str] = WAYS
    # Of each process.
    timeout_s: float = 900.0
    arguments: Json = field(default_factory=dict)
    trust_remote_code: bool = False
    seed: int = 0


def check(settings: Settings) -> None:
    """Raises ConfigError for what is not known, TlcoreError, saying what to install, for what is missing."""
    for way in settings.ways:
        if way not in WAYS:
            raise ConfigError("--ways", f"{way!r} is not one of {', '.join(WAYS)}.")
    if settings.dtype not in TOLERANCES:
        raise ConfigError("--dtype", f"{settings.dtype!r} is not one of {', '.join(TOLERANCES)}.")
    from_here(settings.model, "MODEL")
    need("transformers", "selftest")
    if set(settings.ways) - {"transformers"}:
        need("vllm", "selftest")


def selftest(
    settings: Settings,
    directory: Path,
    on_verdict: Callable[[Verdict], None] = lambda verdict: None,
    on_log: Callable[[str], None] = lambda text: None,
) -> list[Verdict]:
    """Test each way, with all that is captured in ``directory``; ``on_log`` gets what a failed process said.

    Raises TlcoreError where there is nothing to hold anything against.
    """
    check(settings)
    found: dict[str, Json] = {}
    failed: list[Verdict] = []
    for engine, (_, ways) in ENGINES.items():
        chosen = [way for way in ways if way in settings.ways]
        if chosen:
            try:
                found |= _engine(settings, engine, chosen, directory)
            except ProcessError as error:
                on_log(f"{', '.join(chosen)}: {error}")
                failed += [Verdict(way, problems=[f"the engine failed: {error.problem}"]) for way in chosen]
    reference, own = _reference(settings, found, directory)
    if "transformers" in settings.ways:
        found |= own
    verdicts = []
    for way in settings.ways:
        verdict = next((each for each in failed if each.way == way), None)
        if verdict is None:
            verdict = judge_way(way, found[way], reference, settings.dtype)
        on_verdict(verdict)
        verdicts.append(verdict)
    return verdicts


def judge_way(way: str, captured: Json, reference: Reference, dtype: str) -> Verdict:
    """What is said of one way, as its process answered."""
    asked = [Asked(each["id"], each["tokens"], each["prompt"]) for each in captured["requests"]]
    return judge(way, open_run(captured["url"]), asked, reference, TOLERANCES[dtype])


def _engine(settings: Settings, engine: str, ways: list[str], directory: Path) -> dict[str, Json]:
    arguments = dict(settings.arguments)
    if settings.trust_remote_code:
        arguments["trust_remote_code"] = True
    told = _told(settings) | {"engine": engine, "ways": ways, "arguments": arguments}
    answer = run_module(
        "tlcore.adapters.vllm.selftest", told, directory / engine, settings.timeout_s, ENVIRONMENT
    )
    found: dict[str, Json] = answer["ways"]
    return found


def _reference(
    settings: Settings, found: dict[str, Json], directory: Path
) -> tuple[Reference, dict[str, Json]]:
    from safetensors.torch import load_file

    requests = [request for way in found.values() for request in way["requests"]]
    sequences = [list(each) for each in sorted({tuple(request["tokens"]) for request in requests})]
    prompts = [list(each) for each in sorted({tuple(each["tokens"][: each["prompt"]]) for each in requests})]
    if not found:
        # Without an engine nobody knows the vocabulary; these are in any one.
        prompts = sequences = make_prompts(256, settings.seed)
    told = _told(settings) | {
        "sequences": sequences,
        "prompts": prompts,
        "trust_remote_code": settings.trust_remote_code,
    }
    place = directory / "transformers"
    answer = run_module("tlcore.adapters.reference", told, place, settings.timeout_s, ENVIRONMENT)
    layers = {int(number): rows for number, rows in load_file(place / FILE).items()}
    return Reference(sequences, layers), answer["ways"]


def _told(settings: Settings) -> Json:
    return {
        "model": from_here(settings.model, "MODEL"),
        "dtype": settings.dtype,
        "modules": [LAYERS],
        "seed": settings.seed,
    }
