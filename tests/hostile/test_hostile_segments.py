"""Small segments that claim much: refused, or read within a bound, in a process that has little memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tlcore
from tests.hostile.files import sound
from tests.reading import read_all
from tests.rewriting import without_checksum
from tlcore.errors import ReadError, VerifyError
from tlcore_backends.safetensors import whole_check
from tlcore_backends.safetensors.index import SegmentIndex

pytestmark = pytest.mark.slow

__all__ = ["sound"]

MIB = 1 << 20
INDEX = "segments/rank_0_000000_steps_0.json"
DATA = "segments/rank_0_000000.safetensors"
CATALOGUE = "segments/catalogue_rank_0.json"
Change = Callable[[Any], object]


def index(change: Change, steps: int = 1) -> Callable[[Path], object]:
    """Change the index of a run, whose one step is there so many times, all alike."""

    def apply(run: Path) -> None:
        document = json.loads(without_checksum((run / INDEX).read_bytes()))
        columns = document["steps"]
        for key in columns:
            columns[key] = columns[key] * steps
        columns["number"] = list(range(steps))
        change(document)
        (run / INDEX).unlink()
        (run / CATALOGUE).unlink()
        name = INDEX if steps == 1 else INDEX.replace("_0.json", f"_0-{steps - 1}.json")
        (run / name).write_text(json.dumps(document, separators=(",", ":")))

    return apply


def catalogue(*names: str) -> Callable[[Path], object]:
    """Name these indexes as a rank's segments."""

    def apply(run: Path) -> None:
        entries = [{"index": name, "files": []} for name in names]
        document = {**json.loads((run / CATALOGUE).read_text()), "segments": entries}
        (run / CATALOGUE).unlink()
        (run / CATALOGUE).write_text(json.dumps(document))

    return apply


def run_of_numbers(key: str) -> Change:
    return lambda document: document["plans"][0].update({key: [0, 1 << 39]})


def many_plans(document: Any) -> None:
    """Each has all of many arrays, in a few letters."""
    document["arrays"] = [document["arrays"][0]] * 20_000
    plan = {"calls": [0, 1], "structures": [0, 0], "arrays": [0, 20_000], "extents": [0, 20_000]}
    document["plans"] = [plan] * 5000
    document["steps"]["plan"] = list(range(5000))


def repeated_structures(document: Any) -> None:
    document["structures"].append(["a/b.json", [0] * 100_000])
    document["plans"][0]["structures"] = [4, 1] * 500_000


def repeated_rows(document: Any) -> None:
    """A hundred thousand request rows, each of a hundred thousand numbers, in half a megabyte."""
    document["skeletons"].append([0] * 100_000)
    document["changes"].append([])
    document["rows"] = [[1, 1] * 100_000]
    document["steps"]["rows"] = [0]


def repeated_changes(document: Any) -> None:
    """One number, changed a million times for each of a hundred thousand request rows."""
    document["skeletons"].append({"request_id": "a", "rows": 0})
    document["changes"].append([0, 1] * MIB)
    document["rows"] = [[1, 1] * 100_000]
    document["steps"]["rows"] = [0]


def repeated_hashes(document: Any) -> None:
    """Twenty thousand arrays with the hashes of one, which has 12 MB of them."""
    document["arrays"][0]["hashes"] = "AAAA" * (4 * MIB)
    document["arrays"] += [document["arrays"][2]] * 20_000
    document["plans"][0].update(arrays=[0, 20_005], extents=[0, 20_005])


def repeated_extents(document: Any) -> None:
    document["extents"] = [[2] * MIB]
    document["plans"] = document["plans"] * 5000
    document["steps"]["plan"] = list(range(5000))


def repeated_files(document: Any) -> None:
    document["files"] = document["files"] * 200_000


def file_outside(document: Any) -> None:
    document["files"][0]["file"] = "../../outside/secret"


def hashes_of_another_kind(document: Any) -> None:
    document["arrays"][0]["hashes"] = [[]] * MIB


def long_header(run: Path) -> None:
    """A header of millions of empty lists, as large as the index says."""
    length = 64 * MIB
    data = length.to_bytes(8, "little") + b"[" + b"[]," * ((length - 2) // 3) + b"0]"
    (run / DATA).unlink()
    (run / DATA).write_bytes(data + bytes(length + 8 - len(data)))
    index(lambda document: document["files"][0].update(bytes=length + 8))(run)


def names_of_steps(count: int) -> list[str]:
    million = 1 << 20
    return [
        f"segments/rank_0_{number:06}_steps_{number * million}-{(number + 1) * million - 1}.json"
        for number in range(count)
    ]


def empty_indexes(run: Path) -> None:
    (run / CATALOGUE).unlink()
    for name in names_of_steps(2000):
        (run / name).touch()


def damaged_index(run: Path) -> None:
    """Many steps by its name, and large enough for them."""
    (run / CATALOGUE).unlink()
    (run / INDEX).unlink()
    (run / INDEX.replace("_0.json", f"_0-{MIB // 8}.json")).write_text("[" + "0," * MIB)


DIGITS = "9" * 5000
# What is done to the run, and what some reader must say about it.
ATTACKS: dict[str, tuple[Callable[[Path], object], str]] = {
    **{
        f"a plan with more {key} than there are": (index(run_of_numbers(key)), "leads out of|says nothing of")
        for key in ("calls", "structures", "arrays", "extents")
    },
    "plans that have everything": (index(many_plans, 5000), "twice|more tensors than any segment's"),
    "a structure half a million times": (index(repeated_structures), "one of the structures twice"),
    "rows that repeat a large value": (index(repeated_rows), "more parts than any step's"),
    "changes that repeat": (index(repeated_changes), "a change of what is not there"),
    "hashes of many arrays": (index(repeated_hashes), ""),
    "hashes that are a list": (index(hashes_of_another_kind), "not in base64"),
    "extents of many plans": (index(repeated_extents, 5000), ""),
    "a file many times": (index(repeated_files), "no name that is its own"),
    "a file outside": (index(file_outside), "no name that is its own"),
    "a header of empty lists": (long_header, "holds more than"),
    "a catalogue of two billion steps": (catalogue(*names_of_steps(2000)), ""),
    "a name of a billion steps": (catalogue("segments/rank_0_000000_steps_0-999999999.json"), "it names"),
    "a rank of many digits": (catalogue(f"segments/rank_{DIGITS}_000000_steps_0.json"), "it names"),
    "a number of many digits": (catalogue(f"segments/rank_0_{DIGITS}_steps_0.json"), "it names"),
    "a name of many ranges": (catalogue(INDEX.replace("_0.", f"_{','.join(['0-9'] * 10**6)}.")), "it names"),
    "empty indexes of two billion steps": (empty_indexes, "which 1048576 steps do not fit into"),
    "a damaged index of many steps": (damaged_index, "damaged, not JSON"),
}

READER = """
import json, os, resource, sys, time
from pathlib import Path
import fsspec
import tlcore
from tests.reading import attempt, command
from tlcore.runs.convert import convert

def peak():
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024

def read(path, other):
    run = tlcore.open_run(path)
    yield lambda: run.step(0).records
    yield lambda: run.step(0).rows
    yield lambda: run.json("step_0/leaf/outputs.json")
    yield lambda: run.tensor("leaf/inputs_0_cpu")
    yield lambda: run.tensor("step_0/linear/outputs_cpu")
    yield lambda: len(run.steps)
    yield run.verify

sound, *runs = map(Path, sys.argv[1:])
list(map(attempt, read(sound, sound)))
command("compare", str(sound), str(sound))
size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30),) * 2)
for run in runs:
    before, begin = peak(), time.monotonic()
    said = [each for each in map(attempt, read(run, sound)) if each]
    print(json.dumps({"run": run.parent.name, "grown": peak() - before, "seconds": time.monotonic() - begin,
                      "said": [each[:2000] for each in said]}), flush=True)
"""


@pytest.fixture(scope="module")
def answers(sound: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process with a gigabyte of memory has to say of each attack."""
    directory = tmp_path_factory.mktemp("attacks")
    runs = []
    for number, (spoil, _) in enumerate(ATTACKS.values()):
        run = Path(shutil.copytree(sound["segments"], directory / f"{number}" / "run"))
        spoil(run)
        runs.append(str(run))
    done = subprocess.run(
        [sys.executable, "-c", READER, str(sound["segments"]), *runs],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return dict(zip(ATTACKS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_small_segment_takes_little_memory_whatever_it_claims(answers: dict[str, Any], attack: str) -> None:
    said = "\n".join(answers[attack]["said"])
    assert re.search(ATTACKS[attack][1], said), said[:3000]
    assert "machine's memory" not in said
    assert answers[attack]["grown"] < 500 * MIB, answers[attack]


def test_of_a_damaged_index_of_many_steps_little_is_said(sound: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(sound["segments"], tmp_path / "run"))
    damaged_index(run)
    with pytest.raises(VerifyError) as found:
        tlcore.open_run(run).verify()
    assert len(found.value.bad) == 1


def test_what_a_step_says_beside_stands_in_for_nothing(sound: dict[str, Path], tmp_path: Path) -> None:
    """Records that nobody hashed must not take the place of those that were."""
    run = Path(shutil.copytree(sound["segments"], tmp_path / "run"))
    records = tlcore.open_run(run).step(0).documents[0]["records"]
    records[0]["hash"] = "xxh3-128:" + "0" * 32
    index(lambda document: document["skeletons"][0].update(extra={"records": records}))(run)
    assert any("'extra' is no object, or has what the index says itself" in each for each in read_all(run))
    with pytest.raises(VerifyError):
        tlcore.open_run(run).verify()


def kinds_of_steps(arrays: int, steps: int, constant: bool) -> SegmentIndex:
    """Steps each of which has another number of rows, of other arrays."""
    entry = {"name": "a/outputs_cpu", "dtype": "float32", "shape": [None, 3], "file": 0, "offset": 0}
    entry |= {"hashes": "A" * 24, "constant": constant}
    plans = [
        {"calls": [], "structures": [], "arrays": [step % 7, arrays], "extents": [0, arrays]}
        for step in range(steps)
    ]
    columns = {key: [0] * steps for key in ("extents", "started", "took", "details", "change")}
    document = {
        **{key: [] for key in ("calls", "structures", "rows", "skeletons", "changes")},
        **{"layout": 2, "rank": 0, "files": [{"file": DATA, "bytes": 1 << 40}], "extents": [[1]]},
        **{"arrays": [entry] * (arrays + 7), "plans": plans},
        "steps": {**columns, "number": list(range(steps)), "plan": list(range(steps))},
    }
    return SegmentIndex(document, "index")


@pytest.mark.parametrize("limit", ["_MOST_OF_KINDS", "_MOST_LOOKED_AT", "_MOST_DISTINCT"])
def test_kinds_of_steps_are_looked_at_together_up_to_a_bound(
    monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    found = kinds_of_steps(arrays=30, steps=20, constant=True)
    assert whole_check._by_file(found, [])
    monkeypatch.setattr(whole_check, limit, 19)
    with pytest.raises(ReadError, match="too much to be looked at together"):
        whole_check._by_file(found, [])
