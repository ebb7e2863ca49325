"""SGLang's ``--debug-tensor-dump-output-folder``: a file of a dictionary for each forward pass of a rank."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from tlcore.errors import ReadError
from tlcore.protocols import StepRanks
from tlcore.record import Json
from tlcore.storage import Store

from .documents import Found
from .files import DumpFiles, StoredAt
from .parallel import places
from .plain import described
from .request_rows import Batch, request_rows, vector
from .source import ForeignSource
from .torch_files import TorchFile, torch_file

_PROCESS = re.compile(r"TP(\d{1,6})_PP(\d{1,6})_Rank(\d{1,6})_pid\d+")
_PASS = re.compile(r"Pass(\d{5,9})\.pt")
_BATCH = ".forward_batch_info."
_PROXY = ".pp_proxy_tensors."
_IDS = f"{_BATCH}input_ids"
# Mostly one model; its name is not in the files of a stage that has no batch.
_MODEL = "model"
_KEPT = 4


class SglangFolder(ForeignSource):
    """Results of the modules without children and of the model; the batch is the model's arguments.

    SGLang writes a pass when the model returns, so that the model's result, and what came after it (the
    logits), lie in the file of the pass that follows. They are told with the pass that they are of.
    """

    tool = "sglang-folder"

    def __init__(self, store: Store, run: Json) -> None:
        super().__init__(store, run)
        self._opened: dict[str, dict[str, list[Found]]] = {}

    @classmethod
    def recognise(cls, files: DumpFiles) -> Json | str | None:
        """The folder, or that of a process in it, whose files have a batch."""
        processes = _processes(files)
        ranks = [rank for rank, _ in processes]
        if len(set(ranks)) < len(ranks):
            names = ", ".join(directory for _, directory in processes)
            return f"holds the dumps of several servers ({names}): one a directory, or open one of them"
        passes = [_passes(files, directory) for _, directory in processes]
        if not any(passes):
            return f"has {processes[0][1]}, but no Pass00000.pt in it" if processes[0][1] else None
        name = next(name for each in passes for name in each.values())
        try:
            value = torch_file(files, name, _size(files, name)).value
        except ReadError:
            # Plain files may be called so, too; their format tells what is wrong with it.
            return None if not processes[0][1] else f"{name}: not a file of torch.save"
        if not isinstance(value, dict) or not any(isinstance(key, str) and _IDS in key for key in value):
            return f"{name}: has no *{_IDS}, which SGLang puts into each pass" if processes[0][1] else None
        found: Json = {"world_size": max(ranks) + 1}
        shared = _shared(files) if len(ranks) > 1 else None
        return found if shared is None else {**found, "ranks": shared}

    @classmethod
    def passed_over(cls, files: DumpFiles) -> list[str]:
        """Those that are called otherwise than a pass."""
        directories = [directory for _, directory in _processes(files)]
        names = [name for each in directories for name in files.files_in(each) if name.endswith(".pt")]
        return [name for name in names if _PASS.fullmatch(name.rpartition("/")[2]) is None]

    @cached_property
    def _files(self) -> dict[int, dict[int, str]]:
        """The file of each pass of each rank."""
        return {rank: _passes(self.files, directory) for rank, directory in _processes(self.files)}

    @cached_property
    def steps(self) -> Mapping[int, StepRanks]:
        """The passes, with the ranks that have them."""
        numbers = sorted({number for each in self._files.values() for number in each})
        return {
            number: StepRanks(frozenset(rank for rank, each in self._files.items() if number in each))
            for number in numbers
        }

    def found(self, step: int, rank: int) -> list[Found]:
        """What the pass's file has of it, and what the next one still has of it."""
        passes = self._files[rank]
        own = self._contents(passes[step])["own"]
        after = self._contents(passes[step + 1])["before"] if step + 1 in passes else []
        return [*own, *after]

    def rows(self, step: int, rank: int) -> Sequence[Json] | None:
        """Each request's rows: the batch has every token's position and every request's length."""
        return self._rows_of(rank).get(step)

    def _rows_of(self, rank: int) -> Mapping[int, Sequence[Json] | None]:
        if rank not in self._rows:
            batches = ((number, self._batch(name)) for number, name in self._files[rank].items())
            self._rows[rank] = request_rows(batches)
        return self._rows[rank]

    @cached_property
    def _rows(self) -> dict[int, Mapping[int, Sequence[Json] | None]]:
        return {}

    def _batch(self, name: str) -> Batch | None:
        vectors = {}
        for each in self._contents(name)["own"]:
            if each.direction == "inputs" and each.place is not None and len(each.path) == 1:
                at = StoredAt(name, each.place["at"], each.dtype, each.shape)
                vectors[each.path[0]] = vector(self.files, at) if "strides" not in each.place else None
        positions, lengths = vectors.get("positions"), vectors.get("seq_lens")
        return None if positions is None or lengths is None else Batch(positions, lengths)

    def _contents(self, name: str) -> dict[str, list[Found]]:
        """A file's tensors: what is of its ``own`` pass, and of the pass ``before``."""
        found = self._opened.get(name)
        if found is None:
            file = torch_file(self.files, name, _size(self.files, name))
            found = _sorted_out(list(_tensors(file)))
            while len(self._opened) >= _KEPT:
                self._opened.pop(next(iter(self._opened)), None)
            self._opened[name] = found
        return found


def _tensors(file: TorchFile) -> Iterator[tuple[str, Found]]:
    """Each tensor with the name that it has in the dictionary."""
    for path, leaf in file.leaves():
        each = described(file, leaf)
        if each is not None and path:
            yield str(path[0]), each._replace(module=str(path[0]), direction="outputs", path=path[1:])


def _sorted_out(named: Sequence[tuple[str, Found]]) -> dict[str, list[Found]]:
    model = next((key.partition(_BATCH)[0] for key, _ in named if _IDS in key), _MODEL)
    own: list[Found] = []
    batch: list[Found] = []
    before: list[Found] = []
    # What the model returned comes first, before anything of the next pass.
    late = bool(named) and (named[0][0] == model or named[0][0].startswith(f"{model}{_PROXY}"))
    for key, found in named:
        if key.startswith(f"{model}{_BATCH}"):
            name = key.partition(_BATCH)[2]
            batch.append(found._replace(module=model, direction="inputs", path=(name,)))
            continue
        each = found
        if key.startswith(f"{model}{_PROXY}"):
            each = found._replace(module=model, path=(key.partition(_PROXY)[2],))
        # Modules outside the model that ran after it have no parent there.
        late = late and (each.module == model or "." not in each.module)
        (before if late else own).append(each)
    return {"own": [*batch, *own], "before": before}


def _processes(files: DumpFiles) -> list[tuple[int, str]]:
    """The directories of processes with their ranks; the dump itself where it is one's."""
    listed = [(int(found[3]), name) for name in files.directories if (found := _PROCESS.fullmatch(name))]
    return sorted(listed) or [(0, "")]


def _shared(files: DumpFiles) -> list[Json] | None:
    """Each rank's place in the groups that share the model, as the directories are called."""
    found = [each for name in files.directories if (each := _PROCESS.fullmatch(name))]
    sizes = [1 + max(int(each[group]) for each in found) for group in (1, 2)]
    told = {
        int(each[3]): dict(
            zip(
                ("tp_rank", "tp_size", "pp_rank", "pp_size"),
                (int(each[1]), sizes[0], int(each[2]), sizes[1]),
                strict=True,
            )
        )
        for each in found
    }
    return places(told, max(told) + 1)


def _passes(files: DumpFiles, directory: str) -> dict[int, str]:
    names = files.files_in(directory)
    found = {name: _PASS.fullmatch(name.rpartition("/")[2]) for name in names}
    return dict(sorted((int(number[1]), name) for name, number in found.items() if number))


def _size(files: DumpFiles, name: str) -> int:
    return files.files_in(name.rpartition("/")[0]).get(name, 0)
