"""Everything that reads a run, for tests that hand it a run it must refuse or survive."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import fsspec

import tlcore
from tlcore.__main__ import main
from tlcore.errors import TlcoreError
from tlcore.reader import Run, Step, list_runs
from tlcore.reader.dataset.items import Per


def attempt(call: Callable[[], Any]) -> str | None:
    """The message of the TlcoreError that a call raised, or None; any other exception passes through."""
    try:
        call()
    except TlcoreError as error:
        return str(error)
    return None


def _every_access(run: Run) -> Iterator[Callable[[], Any]]:
    for number in [*run.steps, *run.incomplete_steps]:
        step = run.step(number)
        yield from (partial(getattr, step, name) for name in ("records", "rows", "ledger", "complete"))
        names, calls = _values(step, "names"), _values(step, "calls")
        yield partial(getattr, step, "names")
        yield partial(getattr, step, "calls")
        yield from (partial(step.tensor, name) for name in names)
        for call in calls:
            for name in ("inputs", "outputs", "post_fwd_inputs", "operators", "module", "index"):
                yield partial(_of_call, step, call, name)


def _values(step: Step, name: str) -> list[str]:
    try:
        return list(getattr(step, name))
    except TlcoreError:
        return []


def _of_call(step: Step, call: str, name: str) -> Any:
    return getattr(step.call(call), name)


def read_all(path: str | Path) -> list[str]:
    """Read a run by the Python interface in every way; returns the messages of what was refused."""
    try:
        run = tlcore.open_run(path)
    except TlcoreError as error:
        return [str(error)]
    found: list[str | None] = []
    for name in ("state", "steps", "ledger", "config", "created", "id"):
        found.append(attempt(partial(getattr, run, name)))
    with contextlib.suppress(TlcoreError):
        found += [attempt(call) for call in _every_access(run)]
    for name in _names(run):
        found.append(attempt(partial(_as_items, run, name)))
    found += [
        attempt(run.verify),
        attempt(lambda: list_runs(Path(path).parent)),
        attempt(lambda: _walk(path)),
    ]
    return [message for message in found if message is not None]


def _names(run: Run) -> list[str]:
    """A few tensors' names without their step."""
    try:
        return [name.partition("/")[2] for number in run.steps[:2] for name in run.step(number).names[:4]]
    except TlcoreError:
        return []


def _as_items(run: Run, name: str) -> None:
    """Read a tensor's rows as a data set; a run may claim more items than can be read."""
    for per in get_args(Per):
        data = run.dataset(name, per=per)
        list(islice(data, 4))
        list(islice(data.loader(2), 2))


def _walk(path: str | Path) -> None:
    """Read the whole ``tlcore://`` tree; a tool would copy it below a directory of its own."""
    tree = fsspec.filesystem("tlcore", run=str(path), skip_instance_cache=True)
    for name in tree.find("", withdirs=True):
        assert ".." not in name.split("/") and not name.startswith("/") and "\0" not in name
        if tree.isfile(name):
            with contextlib.suppress(TlcoreError):
                tree.cat_file(name)


def command(*words: str) -> tuple[int, str]:
    """Run ``tlcore`` in this process; returns its exit status and all that it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(words)
    return status, out.getvalue()


def run_commands(
    path: str | Path, sound: str | Path, scratch: Path, html: bool = True
) -> dict[str, tuple[int, str]]:
    """Every command on a run, with ``sound`` as the run to compare with and ``scratch`` to write into.

    Returns each one's exit status and output. No command may crash or print control characters.
    """
    run, other = str(path), str(sound)
    lines: dict[str, list[str]] = {
        "ls": ["ls", run],
        "ls --json": ["ls", run, "--json"],
        "ls --module": ["ls", run, "--module", "."],
        "ls --module --json": ["ls", run, "--module", ".", "--json"],
        "ls parent": ["ls", str(Path(run).parent)],
        "show tensor": ["show", run, "step_0/linear/outputs_cpu"],
        "show call": ["show", run, "step_0/leaf"],
        "show call --json": ["show", run, "step_0/leaf", "--json"],
        "verify": ["verify", run],
        "verify --json": ["verify", run, "--json"],
        "convert pt": ["convert", run, str(scratch / "pt"), "--backend", "pt"],
        "convert safetensors": ["convert", run, str(scratch / "safetensors"), "--backend", "safetensors"],
        "compare": ["compare", run, other, "--verbose"],
        "compare with itself": ["compare", run, run, "--deep"],
        "compare markdown": ["compare", run, other, "--format", "markdown"],
        "compare json": ["compare", run, other, "--format", "json"],
    }
    if html:
        report = str(scratch / "r.html")
        lines["compare html"] = ["compare", other, run, "--format", "html", "--output", report]
    found = {name: command(*words) for name, words in lines.items()}
    for name, (status, text) in found.items():
        assert status in (0, 1, 2), name
        assert "Traceback" not in text, f"{name}: {text}"
        assert all(char.isprintable() or char == "\n" for char in text), f"{name} steers the terminal"
    return found
