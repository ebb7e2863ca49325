"""Checking that what a step says it stored is there, whole and unchanged."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress

from ..errors import MissingError, ReadError
from ..layout.checksums import has_checksum
from ..layout.hashes import HASH_PREFIX
from ..layout.names import rank_suffix, shown_numbers, step_dir
from ..layout.run_files import RunFiles
from ..ledger import Counts
from ..protocols import AlikeSteps, StepKinds, SupportsStepKinds, SupportsUnchecked, WholeCheck
from ..record import Json
from .bulk import Payload, read_payloads
from .documents import check_step
from .lasting import lasting_objects
from .sound_structures import files_in, structure_texts
from .stored import Stored

_MOST_RESTS = 1 << 12


def verify_steps(stored: Stored, on_tensor: Callable[[], None] | None) -> tuple[int, list[str]]:
    """How many tensors of all committed steps are sound, and a line for each problem.

    ``on_tensor`` is called after each tensor. Every tensor is read and hashed; the structures must be
    there, be JSON, and refer to stored tensors; what else a format can check, its source does. Where the
    source can prove many steps at once, only what it does not prove is looked at step by step.
    """
    sound = 0
    # What is wrong with a file of many steps is said once.
    bad: dict[str, None] = {}
    with lasting_objects(), ExitStack() as stack:
        proven: dict[int, _Proven] = {}
        for number, ranks in stored.all_ranks():
            for rank in sorted(ranks.committed):
                if rank not in proven:
                    proven[rank] = _Proven(stored, rank)
                    stack.enter_context(closing(proven[rank].checks))
                tensors = proven[rank].tensors(number)
                if tensors is None:
                    count, problems = _verify_step(stored, number, rank, on_tensor)
                    sound += count
                    bad |= dict.fromkeys(problems)
                    continue
                sound += tensors
                if on_tensor is not None:
                    # Of a million, which mostly nobody counts.
                    for _ in range(tensors):
                        on_tensor()
    return sound, list(bad)


def gone(stored: Stored, checked: int, ledger: Counts) -> list[str]:
    """A line where the steps that are there have fewer tensors than a run that has ended says it stored."""
    if checked >= ledger.stored:
        return []
    there = f"its steps ({shown_numbers(stored.numbers())}) have {checked} of them: others are gone"
    return [f"{stored.url}: {ledger.stored} tensors were stored, and {there}"]


def verify_documents(files: RunFiles, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """A line for each of these documents that was changed since; and the names of those without checksums."""
    bad, unchecked = [], []
    for name in names:
        try:
            if not has_checksum(files.json_bytes(name), f"{files.url}/{name}"):
                unchecked.append(name)
        except MissingError:
            # Told by whoever needs what it says.
            continue
        except ReadError as error:
            bad.append(str(error))
    return bad, unchecked


def unchecked_documents(stored: Stored) -> list[str]:
    """The documents that its source has read of a run, and that have no checksum."""
    source = stored.source
    if not isinstance(source, SupportsUnchecked):
        return []
    with stored.asking():
        return sorted(source.unchecked)


class _Proven:
    """The steps of a rank that need not be looked at by themselves; asked for in ascending order."""

    def __init__(self, stored: Stored, rank: int) -> None:
        self._stored = stored
        self._rank = rank
        self.checks = stored.whole_checks(rank)
        self._known: dict[int, int] = {}
        self._sound: set[Hashable] = set()
        self._rests: set[Hashable] = set()
        # Of the last one that was looked at: mostly the next is the same, and hashing it may take long.
        self._like: Hashable | None = None
        self._last = -1
        self._ended = False

    def tensors(self, step: int) -> int | None:
        """How many tensors a step has, where all that it has is sound; None where that is not known."""
        while step > self._last and not self._ended:
            check = next(self.checks, None)
            if check is None:
                self._ended = True
                break
            self._known = self._proven(check)
            self._last = max((each.steps[-1] for each in check.alike), default=self._last)
        return self._known.get(step)

    def _proven(self, check: WholeCheck) -> dict[int, int]:
        found: dict[int, int] = {}
        for each in check.alike:
            # While the documents are looked at, the tensors are read in other threads.
            if self._is_sound(each):
                rests: Sequence[Json | None] = each.rests or [None] * len(each.steps)
                steps = zip(each.steps, rests, strict=True)
                sound = [step for step, rest in steps if _rest_is_sound(self._stored, step, rest)]
                found |= dict.fromkeys(sound, each.tensors)
        for step in check.unsound():
            found.pop(step, None)
        return found

    def _is_sound(self, alike: AlikeSteps) -> bool:
        """Whether the first step's document is; of one like those that are, only what is its own is read."""
        likeness, step = alike.likeness, alike.steps[0]
        if likeness is None or alike.rest is None:
            return not _document_problems(self._stored, step, self._rank)
        if self._is_known(likeness):
            return self._rest_is_sound(step, alike)
        if _document_problems(self._stored, step, self._rank, beside=False):
            return False
        self._like = likeness
        return True

    def _rest_is_sound(self, step: int, alike: AlikeSteps) -> bool:
        kind, rest = alike.rest_kind, alike.rest
        if kind is not None and kind in self._rests:
            return True
        sound = False
        with suppress(ReadError):
            with self._stored.asking():
                document = rest() if rest is not None else None
            sound = document is not None and _rest_is_sound(self._stored, step, document)
        if sound and kind is not None:
            if len(self._rests) >= _MOST_RESTS:
                self._rests.clear()
            self._rests.add(kind)
        return sound

    def _is_known(self, likeness: Hashable) -> bool:
        if self._like is None or likeness == self._like:
            return self._like is not None
        self._sound.add(self._like)
        return likeness in self._sound


def _rest_is_sound(stored: Stored, step: int, rest: Json | None) -> bool:
    try:
        return rest is None or bool(check_step(rest, f"{stored.url}/{step_dir(step)}", step))
    except ReadError:
        return False


def _document_problems(stored: Stored, step: int, rank: int, beside: bool = True) -> list[str]:
    """What is wrong with a document, and ``beside`` it as far as its format tells that."""
    # What is wrong is told where all records and structures are looked at.
    if _has_sound_kinds(stored, step, rank):
        return list(stored.problems(step, rank)) if beside else []
    try:
        document = stored.document(step, rank)
        # Also those that no tensor needs; they may be made only when they are looked at.
        document.get("structures", {}).values()
    except ReadError as error:
        return [str(error)]
    problems = stored.problems(step, rank) if beside else ()
    return [*problems, *_structure_problems(stored, step, rank, document)]


def _has_sound_kinds(stored: Stored, step: int, rank: int) -> bool:
    """Whether all of a document is known to be sound by the kinds of its parts, and these fit together."""
    source = stored.source
    with suppress(ReadError), stored.asking():
        if isinstance(source, SupportsStepKinds):
            kinds = source.step_kinds(step, rank)
            return kinds is not None and _are_sound(stored, kinds, step, rank)
    return False


def _are_sound(stored: Stored, kinds: StepKinds, step: int, rank: int) -> bool:
    rest, records, structures = kinds
    check_step({**rest, "records": [], "structures": structures}, stored.url, step)
    if not all(stored.sound_records.is_known(each, step) for each in records):
        return False
    skip, ending = len(f"{step_dir(step)}/"), f"{rank_suffix(rank)}.json"
    needed = {f"{each.name[skip:].rpartition('/')[0]}/{each.direction}{ending}" for each in records}
    tensors = {each.name for each in records}
    return needed <= structures.keys() and all(
        tensors.issuperset(each.tensors) and stored.known.is_known(each) for each in structures.values()
    )


def _verify_step(
    stored: Stored, step: int, rank: int, on_tensor: Callable[[], None] | None
) -> tuple[int, list[str]]:
    try:
        document = stored.document(step, rank)
    except ReadError as error:
        return 0, [str(error)]
    sound, bad = 0, []
    for payload in read_payloads(stored, document["records"], keep=False):
        problem = _tensor_problem(stored, payload) if stored.is_hashed else payload.problem
        sound += problem is None
        if problem is not None:
            bad.append(problem)
        if on_tensor is not None:
            on_tensor()
    return sound, bad + _document_problems(stored, step, rank)


def _tensor_problem(stored: Stored, payload: Payload) -> str | None:
    record = payload.record
    name, stated = str(record.get("file", record["name"])), record["hash"]
    if not stated.startswith(HASH_PREFIX):
        return f"{name}: unknown hash {stated!r}"
    found = HASH_PREFIX + payload.digest
    wrong = stored.misfit(record) or payload.problem
    return wrong or (None if found == stated else f"{name}: {found}, step.json says {stated}")


def _structure_problems(stored: Stored, step: int, rank: int, document: Json) -> Iterator[str]:
    records = document["records"]
    files = {f"{record['name']}.pt" for record in records}
    begin = f"{step_dir(step)}/"
    needed = {
        f"{str(record['name']).partition('/')[2].rpartition('/')[0]}/{record['direction']}.json"
        for record in records
    }
    names = sorted(needed)
    for name, text in zip(names, structure_texts(stored.source, step, rank, names), strict=True):
        directory = f"{begin}{name.rpartition('/')[0]}/"
        try:
            known = (
                stored.known.files_of(stored.unchecked_structure(step, rank, name), directory)
                if text is None
                else stored.known.files(text, directory)
            )
            if known is not None and files.issuperset(known):
                continue
            structure = stored.structure(step, rank, name)
        except ReadError as error:
            yield str(error)
            continue
        if text is None:
            stored.known.learn_document(structure, directory)
        else:
            stored.known.learn(text, directory)
        shown = f"{begin}{name.removesuffix('.json')}{rank_suffix(rank)}.json"
        dangling = [file for file in files_in(structure) if file not in files]
        yield from (f"{shown}: refers to {file}, which is not in step.json" for file in dangling)
