"""What an engine captures, put together from the answers of all its workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .... import errors
from ....errors import CaptureError, ConfigError
from ....ledger import Counts
from ....record import Json

START, STOP, STATUS = "tlcore_start", "tlcore_stop", "tlcore_status"
FLUSH = "tlcore_flush"
POLL_S = 0.05
# From what matters most to who asks.
_STATES = ("running", "closing", "lost", "closed")


@dataclass(frozen=True, slots=True)
class Status:
    """What an engine captures, or captured last.

    ``state`` is ``idle`` (nothing yet), ``running``, ``closing`` (stopped, still storing), ``closed``, or
    ``lost`` (a process of the engine died before it had stored everything).
    ``ledger`` is the sum over ``ranks``, each rank's own document; ``problem`` says what could not be
    stored, ``waiting`` what of it lies in the spill_dir for now.
    """

    state: str
    run_id: str | None
    url: str | None
    ledger: Counts
    problem: str | None
    ranks: tuple[Json, ...]
    waiting: str | None = None

    def to_json(self) -> Json:
        """The status as JSON data."""
        return {
            "state": self.state,
            "run_id": self.run_id,
            "url": self.url,
            "ledger": self.ledger.to_json(),
            "problem": self.problem,
            "waiting": self.waiting,
            "ranks": list(self.ranks),
        }


def merged(answers: Sequence[Json], expected: int | None = None) -> Status:
    """One status from the answers of all ranks.

    Raises CaptureError (or the ConfigError or BackendError of a worker) when a rank refused, CaptureError
    when ``expected`` ranks should have answered and others did.
    """
    raise_refusal(answers)
    if expected is not None and len({answer["rank"] for answer in answers}) != expected:
        ranks = [answer["rank"] for answer in answers]
        raise CaptureError(f"of {expected} ranks only {ranks} answered, so the others cannot be spoken for")
    states = [str(answer["state"]) for answer in answers]
    state = next((each for each in _STATES if each in states), "idle")
    first: Json = next((answer for answer in answers if answer["state"] == state), {})
    ledger = Counts()
    for answer in answers:
        if answer.get("run_id") == first.get("run_id"):
            ledger.add(Counts.from_json(answer.get("ledger", {})))
    return Status(
        state,
        first.get("run_id"),
        first.get("url"),
        ledger,
        _first(answers, "problem") or _mixed(answers, state),
        tuple(answers),
        _first(answers, "waiting"),
    )


def raise_refusal(answers: Sequence[Json]) -> None:
    """Raise what a rank refused with: CaptureError, or a worker's ConfigError or BackendError."""
    for answer in answers:
        if answer["state"] == "refused":
            kind = getattr(errors, str(answer.get("error")), CaptureError)
            if kind is ConfigError:
                path, _, problem = str(answer["problem"]).partition(": ")
                raise ConfigError(path, problem)
            raise kind(f"rank {answer['rank']}: {answer['problem']}")


def _mixed(answers: Sequence[Json], state: str) -> str | None:
    """Word of ranks that capture nothing, or another run, while the others run."""
    runs = {answer.get("run_id") for answer in answers if answer["state"] == state}
    silent = [answer["rank"] for answer in answers if answer["state"] not in (state, "closing", "closed")]
    if state == "running" and (silent or len(runs) > 1):
        return f"not every rank captures the same run: {sorted(map(str, runs))}, ranks {silent} none"
    return None


def _first(answers: Sequence[Json], key: str) -> str | None:
    return next((str(answer[key]) for answer in answers if key in answer), None)
