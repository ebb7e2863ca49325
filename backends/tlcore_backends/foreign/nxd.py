"""What Neuron's tensor capture (NxD) writes: a file a tensor, and one that lists them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from tlcore.errors import ReadError
from tlcore.layout.checks import is_shape
from tlcore.layout.dtypes import item_size
from tlcore.layout.names import PathKey
from tlcore.layout.run_files import COUNTS_FROM
from tlcore.protocols import StepRanks
from tlcore.record import Json

from .documents import Found, in_model_order
from .files import DumpFiles, shown_path
from .plain import described
from .source import ONE_RANK, ForeignSource
from .torch_files import torch_file

_METADATA = "capture_metadata.json"
_BEGIN = "captured_tensors_"
_FILE = re.compile(
    r"captured_tensors_(.+?)_step_(\d{1,9})_(?:module_(.+)|(manual_tensor_\d+))\.pt", re.DOTALL
)
# The last such word tells the side: a module may be called so, too.
_SIDE = re.compile(r"(.+)[_.](input|output)s?((?:[_.]\w+)*)", re.DOTALL)
_MISSING = "its file is missing"


class _File(NamedTuple):
    """A file of the dump, as its name and what lists it tell it."""

    name: str
    phase: str
    step: int
    module: str
    direction: str
    path: tuple[PathKey, ...]


class NeuronCapture(ForeignSource):
    """Inputs and outputs of modules, and what code captured by hand, which are modules ``manual_tensor_<i>``.

    Where context encoding and token generation count their steps apart, steps are counted over both.
    """

    tool = "nxd-capture"

    @classmethod
    def recognise(cls, files: DumpFiles) -> Json | str | None:
        """A directory of such files; what lists them may be missing."""
        names = [name for name in files.top if name.startswith(_BEGIN)]
        if not names:
            listed = _METADATA in files.top
            return f"has {_METADATA}, but no {_BEGIN}*.pt" if listed else None
        sound = next((name for name in sorted(names) if _FILE.fullmatch(name)), None)
        if sound is None:
            return f"{min(names)}: is not called {_BEGIN}<phase>_step_<n>_module_<name>_<input or output>.pt"
        try:
            torch_file(files, sound, files.top[sound])
        except ReadError as error:
            return str(error)
        # The tool's first step is 1; where phases count apart, steps are counted here.
        own = [(int(found[2]), found[1]) for name in names if (found := _FILE.fullmatch(name))]
        told = min(own)[0] > 0 and not _count_apart(set(own))
        return {"world_size": 1, COUNTS_FROM: 1} if told else {"world_size": 1}

    @classmethod
    def passed_over(cls, files: DumpFiles) -> list[str]:
        """Those that are called otherwise."""
        return [name for name in files.top if name.endswith(".pt") and _FILE.fullmatch(name) is None]

    @cached_property
    def _listed(self) -> Mapping[str, Json]:
        """What is known of each file beside its name."""
        if _METADATA not in self.files.top:
            return {}
        document: Any = self.files.json(_METADATA)
        held = document.get("tensors") if isinstance(document, dict) else None
        if not isinstance(held, dict) or not all(isinstance(each, dict) for each in held.values()):
            raise ReadError(f"{shown_path(self.files, _METADATA)}: damaged, it lists no tensors")
        return {name.rpartition("/")[2]: each for name, each in held.items()}

    @cached_property
    def _steps(self) -> Mapping[int, list[_File]]:
        names = dict.fromkeys([*sorted(self.files.top), *self._listed])
        files = [each for name in names if (each := _parsed(name, self._listed.get(name, {}))) is not None]
        phases: dict[tuple[int, str], list[_File]] = {}
        for each in files:
            phases.setdefault((each.step, each.phase), []).append(each)
        again = _count_apart(phases)
        ordered = sorted(phases.items(), key=lambda item: item[0][::-1] if again else item[0])
        return {(place if again else key[0]): each for place, (key, each) in enumerate(ordered)}

    @property
    def steps(self) -> Mapping[int, StepRanks]:
        """The steps of all phases."""
        return dict.fromkeys(self._steps, ONE_RANK)

    def found(self, step: int, rank: int) -> list[Found]:
        """The tensors in the order of a model: that in which they came about is not told."""
        return in_model_order(each for file in self._steps[step] for each in self._tensors(file))

    def _tensors(self, file: _File) -> Iterator[Found]:
        if file.name not in self.files.top:
            told = self._listed[file.name]
            each = Found(file.module, file.direction, file.path, skipped=_MISSING)
            dtype = str(told.get("tensor_dtype", "")).removeprefix("torch.")
            shape = told.get("tensor_shape")
            known = item_size(dtype) is not None and is_shape(shape)
            yield each._replace(dtype=dtype, shape=tuple(shape or ())) if known else each
            return
        opened = torch_file(self.files, file.name, self.files.top[file.name])
        for path, leaf in opened.leaves():
            if (found := described(opened, leaf)) is not None:
                yield found._replace(module=file.module, direction=file.direction, path=(*file.path, *path))


def _count_apart(steps: Collection[tuple[int, str]]) -> bool:
    """Whether two phases have a step of one number."""
    return len({step for step, _ in steps}) < len(steps)


def _parsed(name: str, told: Json) -> _File | None:
    """What a file's name and its entry tell; None for another file."""
    found = _FILE.fullmatch(name)
    if found is None:
        return None
    phase, step, manual = found[1], int(found[2]), found[4]
    if manual:
        return _File(name, phase, step, manual, "outputs", ())
    side = _SIDE.fullmatch(found[3])
    module, kind, more = (side[1], side[2], side[3]) if side else (found[3], "output", "")
    # In a file's name the dots may be gone.
    named = told.get("module_name")
    path = tuple(
        int(part) if part.isdigit() and len(part) < 5 else part for part in re.split(r"[_.]", more) if part
    )
    module = named if isinstance(named, str) and named else module
    direction = f"{kind}s"
    if direction == "inputs" and not path:
        path = (0,)
    return _File(name, phase, step, module, direction, path)
