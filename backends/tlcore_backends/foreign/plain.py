"""Plain tensors and dictionaries of tensors: ``.safetensors``, ``.npz``, ``.npy`` and `torch.save` files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from tlcore.errors import ReadError
from tlcore.layout.dtypes import item_size
from tlcore.layout.names import PathKey
from tlcore.protocols import Buffer, StepRanks
from tlcore.record import Json

from .arrays import describe_npy, describe_npz, read_array
from .documents import Found, in_model_order
from .files import DumpFiles, StoredAt, read_at
from .pickled import TensorAt, Unknown
from .safetensors_files import safetensors_in
from .source import ONE_RANK, ForeignSource
from .torch_files import TorchFile, torch_file

_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_SUFFIXES = (".safetensors", ".npz", ".npy", *_TORCH)
_PICKLES = (".pkl", ".pickle", ".joblib")
_NUMBERED = re.compile(r"(?:.*?(?:step|pass|iter|iteration|batch)[_\-]?)?(\d+)", re.IGNORECASE | re.DOTALL)
_SIDE = re.compile(r"(?:(.*)\.)?(inputs?|outputs?)(?:\.(.+))?", re.DOTALL)
_DIRECTIONS = {"input": "inputs", "inputs": "inputs", "output": "outputs", "outputs": "outputs"}
_NUMBER = re.compile(r"\d{1,4}")


class PlainSource(ForeignSource):
    """A file, or a directory of them, in which tensors have names.

    A name is that of a module, whose output the tensor is; ``<module>.input[s]`` and ``<module>.output[s]``,
    with what follows, tell more. Files called by a number (``step_3.pt``) are steps, others are together
    step 0. A file of one tensor stands for a module of the file's name.
    """

    tool = "plain"

    @classmethod
    def recognise(cls, files: DumpFiles) -> Json | str | None:
        """Any file of the kinds above, by its content."""
        names = _names(files)
        if not names:
            pickles = [name for name in files.top if name.endswith(_PICKLES)]
            if pickles:
                return f"{pickles[0]}: a pickle is not read; save tensors by torch.save"
            packed = [name for name in files.top if name.endswith(tuple(f"{each}.gz" for each in _SUFFIXES))]
            return f"{packed[0]}: is compressed; unpack it (gunzip)" if packed else None
        try:
            _Contents(files, names[0]).check()
        except ReadError as error:
            return str(error)
        return {"world_size": 1}

    @cached_property
    def _steps(self) -> Mapping[int, Sequence[str]]:
        names = _names(self.files)
        numbers = [_NUMBERED.fullmatch(_stem(name)) for name in names]
        if len(names) > 1 and all(numbers) and len({int(each[1]) for each in numbers if each}) == len(names):
            listed = {int(each[1]): [name] for each, name in zip(numbers, names, strict=True) if each}
            return dict(sorted(listed.items()))
        return {0: names}

    @property
    def steps(self) -> Mapping[int, StepRanks]:
        """Numbered files each, else one."""
        return dict.fromkeys(self._steps, ONE_RANK)

    def found(self, step: int, rank: int) -> list[Found]:
        """The tensors of a step's files. Raises ReadError where two files have one name."""
        result: list[Found] = []
        holder: dict[str, str] = {}
        for name in self._steps[step]:
            own = list(_Contents(self.files, name).found())
            for module in {each.module for each in own}:
                if holder.setdefault(module, name) != name:
                    text = f"{holder[module]} and {name} both have {module!r}: call them step_<number>,"
                    raise ReadError(f"{self.files.url}: {text} or open one of them")
            result += own
        return result

    def whole(self, record: Mapping[str, Any]) -> Buffer:
        """All bytes of a tensor."""
        return read_at(self.files, record) if "at" in record["place"] else read_array(self.files, record)


class _Contents:
    """What is in one file."""

    def __init__(self, files: DumpFiles, name: str) -> None:
        self._files, self._name = files, name

    def check(self) -> None:
        """Raise ReadError for a file that is not of the kind that its name says."""
        if not self._name.endswith(".safetensors"):
            next(iter(self.found()), None)
        else:
            safetensors_in(self._files, self._name)

    def found(self) -> Iterator[Found]:
        """Its tensors by the modules that their names are of."""
        files, name = self._files, self._name
        if name.endswith(".safetensors"):
            tensors = safetensors_in(files, name)[0].items()
            yield from in_model_order(located(key, (), _stored(at)) for key, at in tensors)
        elif name.endswith(".npy"):
            yield describe_npy(files, name, _stem(name))
        elif name.endswith(".npz"):
            for key, each in describe_npz(files, name):
                yield located(key, (), each)
        else:
            yield from torch_tensors(torch_file(files, name, files.top[name]), _stem(name))


def _stored(at: StoredAt) -> Found:
    if item_size(at.dtype) is None:
        return Found("", "", (), skipped=f"there is no dtype {at.dtype} here")
    return Found("", "", (), at.dtype, at.shape, at.place())


def torch_tensors(file: TorchFile, alone: str) -> Iterator[Found]:
    """The tensors of a `torch.save` file by their names; one that has none is ``alone``'s output."""
    for path, leaf in file.leaves():
        key, rest = (str(path[0]), path[1:]) if path else (alone, ())
        if (each := described(file, leaf)) is not None:
            yield located(key, rest, each)


def described(file: TorchFile, leaf: Any) -> Found | None:
    """What is known of a tensor, or of an object that holds some; None for anything else."""
    if isinstance(leaf, TensorAt):
        at = file.at(leaf)
        return Found("", "", (), at.dtype, at.shape, at.place(), device=leaf.device)
    if isinstance(leaf, Unknown) and leaf.tensors:
        return Found("", "", (), skipped=f"in a {leaf.cls}, which is not opened")
    return None


def located(key: str, path: tuple[PathKey, ...], found: Found) -> Found:
    """A tensor as what the name that it has in a dictionary says, and the keys that follow."""
    side = _SIDE.fullmatch(key)
    if side is not None and (side[1] is not None or side[3] is None):
        more = tuple(
            int(part) if _NUMBER.fullmatch(part) else part for part in (side[3] or "").split(".") if part
        )
        return found._replace(module=side[1] or "", direction=_DIRECTIONS[side[2]], path=(*more, *path))
    if path and str(path[0]) in _DIRECTIONS:
        return found._replace(module=key, direction=_DIRECTIONS[str(path[0])], path=path[1:])
    return found._replace(module=key, direction="outputs", path=path)


def _names(files: DumpFiles) -> list[str]:
    return sorted(name for name in files.top if name.endswith(_SUFFIXES))


def _stem(name: str) -> str:
    return name.rpartition(".")[0]
