"""`tlcore ls`: the runs in a directory, the steps of a run, or the calls and tensors of a step."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ..errors import ReadError
from ..locations import redact_url
from ..reader import Run, RunSummary, Step, is_run, list_runs, open_run
from ..reader.foreign import is_file
from ..reader.injected import overflowed
from ..reader.runs import near_dumps
from ..record import Json
from .follow import follow
from .losses import cell, losses_of
from .storage_options import add_storage_options, storage_options
from .tables import print_table, printable, size

# Between two looks at a run that is followed.
_PAUSE_S = 1.0
HELP = (
    "List the runs in a directory, or the steps of a run. With --step or --module, list the calls and"
    " tensors of the steps."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="an output_dir, or a run's directory; a path or URL")
    parser.add_argument("--step", type=int, help="list the calls and tensors of this step")
    parser.add_argument("--module", metavar="REGEX", help="only calls of modules in whose name this is found")
    parser.add_argument("--json", action="store_true", help="print JSON, with sizes in bytes")
    parser.add_argument(
        "--follow", action="store_true", help="go on with a running capture's steps as they are committed"
    )
    add_storage_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the listing. Raises ReadError for a bad path, step or regular expression."""
    pattern = _pattern(args.module)
    options = storage_options(args)
    if args.follow:
        if args.step is not None or pattern is not None:
            raise ReadError("--follow lists whole steps: leave out --step and --module")
        return _follow(open_run(args.path, options), args.json)
    many = args.step is None and pattern is None and not is_file(args.path)
    if many and not is_run(args.path, options):
        runs = list_runs(args.path, options)
        if not runs and (near := near_dumps(args.path, options)):
            missing = "".join(f"\n  {each}" for each in near)
            raise ReadError(
                f"{redact_url(args.path)}: holds no runs, and is no dump of another tool{missing}"
            )
        parent, _, _ = args.path.rstrip("/").rpartition("/")
        # Beside a dump of another tool may lie anything.
        if not runs and parent and is_run(parent, options) and not open_run(parent, options).is_foreign:
            advice = f"lies in the run {redact_url(parent)}; list that, with --step or --module"
            raise ReadError(f"{redact_url(args.path)}: {advice}")
        _list_runs(runs, args.json)
        return 0
    opened = open_run(args.path, options)
    if args.step is None and pattern is None:
        _list_steps(opened, args.json)
    else:
        _list_tensors(opened, args.step, pattern, args.json)
    return 0


def _pattern(text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise ReadError(f"--module {text!r} is not a regular expression: {error}") from error


def _list_runs(runs: list[RunSummary], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"runs": [asdict(summary) for summary in runs]}, indent=1))
    elif not runs:
        print("no runs")
    else:
        columns = ["run", "state", "created", "steps", "tensors", "bytes"]
        states = [s.problem or _shown_state(s.state, s.injected) for s in runs]
        rows = [
            [s.run_id, state, s.created, s.steps, s.tensors, size(s.bytes)]
            for s, state in zip(runs, states, strict=True)
        ]
        lost = [cell(summary) for summary in runs]
        if any(lost):
            columns.append("lost at capture")
            rows = [[*row, shown] for row, shown in zip(rows, lost, strict=True)]
        print_table(columns, rows)


def _shown_state(state: str, injected: bool) -> str:
    return f"{state}, injected" if injected else state


def _list_steps(opened: Run, as_json: bool) -> None:
    steps = [opened.step(number) for number in sorted([*opened.steps, *opened.incomplete_steps])]
    if as_json:
        print(
            json.dumps(
                {"run": _described_run(opened), "steps": [_described_step(s) for s in steps]}, indent=1
            )
        )
        return
    print(_headline(opened, losses_of(opened)))
    columns = ["step", "state", "calls", "tensors", "bytes", "ledger"]
    print_table(
        columns, ([s.number, _state(s), len(s.calls), len(s), size(_bytes(s)), _losses(s)] for s in steps)
    )
    for remark in opened.remarks:
        print(printable(f"remark: {remark}"))


def _follow(opened: Run, as_json: bool) -> int:
    """Print each step as it is committed: in columns, or as a JSON object on a line of its own."""

    def line(number: int) -> str:
        step = opened.step(number)
        if as_json:
            return json.dumps(_described_step(step))
        held = f"{len(step.calls)} calls  {len(step)} tensors  {size(_bytes(step))}"
        return f"step {number}  {held}  {_losses(step)}"

    def end() -> str:
        if as_json:
            return json.dumps(_described_run(opened))
        ended = "" if opened.state == "complete" else "; the process that wrote it has ended"
        return _headline(opened, losses_of(opened)) + ended

    return follow(opened, line, end, _PAUSE_S)


def _list_tensors(opened: Run, number: int | None, pattern: re.Pattern[str] | None, as_json: bool) -> None:
    numbers = sorted([*opened.steps, *opened.incomplete_steps]) if number is None else [number]
    steps = [opened.step(n) for n in numbers]
    if as_json:
        listed = [_described_step(step) | {"call_list": list(_calls(step, pattern))} for step in steps]
        print(json.dumps({"run": _described_run(opened), "steps": listed}, indent=1))
        return
    # Of a run that is not closed, the ledger is that of all its steps: too many to be read for one.
    print(_headline(opened, losses_of(opened) if opened.state == "complete" else None))
    rows = [row for step in steps for row in _rows(step, pattern)]
    if not rows:
        print(
            "no call"
            if pattern is None
            else f"no call of a module in whose name {pattern.pattern!r} is found"
        )
        return
    columns = ["step", "call", "tensor", "dtype", "shape", "device", "bytes", "note"]
    if opened.world_size > 1:
        columns.insert(0, "rank")
    else:
        rows = [row[1:] for row in rows]
    print_table(columns, rows)


def _calls(step: Step, pattern: re.Pattern[str] | None) -> Iterator[Json]:
    """Each call of a step whose module matches, with what is stored of it."""
    stored: dict[str, list[Json]] = {}
    for name in step.names:
        directory = name.split("/")[1]
        stored.setdefault(directory, []).append(
            step.record(name) if step.has_record(name) else {"name": name}
        )
    for directory in step.calls:
        call = step.call(directory)
        if pattern is None or pattern.search(call.module):
            records = stored.get(directory, [])
            yield {"call": directory, "module": call.module, "index": call.index, "records": records}


def _rows(step: Step, pattern: re.Pattern[str] | None) -> Iterator[list[Any]]:
    for call in _calls(step, pattern):
        if not call["records"]:
            yield [None, step.number, call["call"], *[None] * 5, "nothing stored"]
        for record in call["records"]:
            stem = record["name"].rpartition("/")[2]
            if "dtype" not in record:
                yield [None, step.number, call["call"], stem, *[None] * 4, "not committed"]
                continue
            shape = "x".join(map(str, record["shape"])) or "scalar"
            yield [
                *(record["rank"], step.number, call["call"], stem, record["dtype"], shape),
                *(record["device"], size(record["bytes"]), _note(record)),
            ]


def _note(record: Json) -> str | None:
    notes = []
    if "part" in record:
        part = record["part"]
        if "unknown" in part:
            notes.append(f"rank {record['rank']}'s own ({part['unknown']})")
        else:
            how = "sum" if part.get("sum") else f"dim {part['dim']}"
            notes.append(f"part {part['tp_rank'] + 1} of {part['tp_size']} ({how})")
    if "alias_of" in record:
        notes.append(f"same as {record['alias_of'].partition('/')[2]}")
    return ", ".join(notes) or None


def _described_run(opened: Run) -> Json:
    return {
        "run_id": opened.id,
        "path": opened.url,
        "state": opened.state,
        "injected": opened.injected is not None,
        "created": opened.created,
        "ranks": list(opened.ranks.values()),
        "ledger": opened.ledger.to_json(),
        "remarks": opened.remarks,
    }


def _described_step(step: Step) -> Json:
    found: Json = {
        "step": step.number,
        "state": _state(step),
        "calls": len(step.calls),
        "tensors": len(step),
        "bytes": _bytes(step),
        "ledger": step.ledger.to_json(),
    }
    beyond = overflowed(step)
    return found | ({"injected_overflowed": dict(beyond)} if beyond else {})


def _headline(opened: Run, losses: str | None) -> str:
    state = _shown_state(opened.state, opened.injected is not None)
    line = printable(f"run {opened.id}  {state}  {opened.created}")
    return line + _ranks(opened) + (f"  {losses}" if losses else "")


def _ranks(opened: Run) -> str:
    """How many ranks wrote the run, for the headline; nothing for a single one."""
    if opened.world_size == 1:
        return ""
    place = opened.ranks.get(0, {})
    groups = (
        ("tp", "tensor"),
        ("pcp", "prefill context"),
        ("pp", "pipeline"),
        ("dp", "data"),
        ("ep", "expert"),
    )
    sizes = [(name, place.get(f"{group}_size", 1)) for group, name in groups]
    shown = ", ".join(f"{name} parallel {count}" for name, count in sizes if count > 1)
    return f"  {opened.world_size} ranks" + (f" ({shown})" if shown else "")


def _state(step: Step) -> str:
    return "complete" if step.complete else "incomplete"


def _bytes(step: Step) -> int:
    return sum(int(record["bytes"]) for record in step.records)


def _losses(step: Step) -> str:
    """The ledger's columns that are not zero, and what was injected that does not fit the model's dtype."""
    counts = step.ledger.to_json()
    columns = ("captured", "stored", "skipped", "dropped", "failed")
    said = [f"{counts[name]} {name}" for name in columns if counts[name]]
    said += [f"{count} injected beyond the range ({what})" for what, count in overflowed(step).items()]
    return ", ".join(said)
