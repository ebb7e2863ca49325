"""Hidden states that vLLM itself extracts, and those of speculators: a safetensors file a request."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property

from tlcore.errors import ReadError
from tlcore.layout.dtypes import item_size
from tlcore.protocols import StepRanks
from tlcore.record import Json

from .documents import Found
from .files import DumpFiles, StoredAt, shown_path
from .safetensors_files import safetensors_in
from .source import ONE_RANK, ForeignSource

_SUFFIX = ".safetensors"
_KEYS = frozenset(("hidden_states", "token_ids"))
_OF_SPECULATORS = re.compile(r"hs_(\d+)")
# The layers' numbers are not in the files; what a user knows of them `--map` can say.
LAYER = "hidden_states"


class HiddenStates(ForeignSource):
    """Each file is a step and holds one request: its tokens, and the hidden states of a few layers.

    The module of the i-th layer is ``hidden_states.<i>``; which layer of the model that is, the files do not
    tell. Of speculators' ``hs_<i>`` the step is i, else steps are the files in the order of their names.
    """

    tool = "hidden-states"

    @classmethod
    def recognise(cls, files: DumpFiles) -> Json | str | None:
        """Safetensors files that have these two tensors and no other; in a folder ``hidden_states``, too."""
        names = _files(files)[1]
        if not names:
            return None
        for name in names[:1]:
            try:
                tensors = safetensors_in(files, name)[0]
            except ReadError:
                # Whatever it is, the format of plain tensors tells what is wrong with it.
                return None
            if not tensors.keys() & _KEYS:
                return None
            if tensors.keys() != _KEYS:
                lacking = ", ".join(sorted(_KEYS - tensors.keys()))
                held = ", ".join(sorted(_KEYS & tensors.keys()))
                return f"{name}: has {held}, but no {lacking}" if lacking else None
            if len(tensors["hidden_states"].shape) not in (2, 3):
                return f"{name}: its hidden states are no [tokens, layers, hidden]"
        return {"world_size": 1}

    @cached_property
    def _requests(self) -> Mapping[int, str]:
        """The file of each step."""
        names = _files(self.files)[1]
        numbers = [_OF_SPECULATORS.fullmatch(_request(name)) for name in names]
        if all(numbers):
            return dict(
                sorted((int(each[1]), name) for each, name in zip(numbers, names, strict=True) if each)
            )
        return dict(enumerate(names))

    @property
    def steps(self) -> Mapping[int, StepRanks]:
        """One a file."""
        return dict.fromkeys(self._requests, ONE_RANK)

    def found(self, step: int, rank: int) -> list[Found]:
        """The tokens, as the model's argument, and each layer's states, as results."""
        states, tokens = self._tensors(step)
        result = [Found("", "inputs", ("input_ids",), tokens.dtype, tokens.shape, tokens.place())]
        shape = states.shape
        if len(shape) == 2:
            return [*result, Found(f"{LAYER}.0", "outputs", (), states.dtype, shape, states.place())]
        count, layers, width = shape
        for layer in range(layers):
            at = states._replace(
                at=states.at + layer * width * (item_size(states.dtype) or 0),
                shape=(count, width),
                strides=(layers * width, 1),
            )
            result.append(Found(f"{LAYER}.{layer}", "outputs", (), at.dtype, at.shape, at.place()))
        return result

    def rows(self, step: int, rank: int) -> Sequence[Json]:
        """All rows are the request's, from its first position on."""
        name = self._requests[step]
        count = self._tensors(step)[1].shape[0]
        return [
            {
                "request_id": _request(name),
                "external_request_id": _request(name),
                "first_row": 0,
                "rows": count,
                "first_position": 0,
            }
        ]

    def _tensors(self, step: int) -> tuple[StoredAt, StoredAt]:
        name = self._requests[step]
        tensors = safetensors_in(self.files, name)[0]
        if tensors.keys() != _KEYS:
            raise ReadError(
                f"{shown_path(self.files, name)}: has {', '.join(tensors)}, not {', '.join(_KEYS)}"
            )
        states, tokens = tensors["hidden_states"], tensors["token_ids"]
        if len(tokens.shape) != 1 or len(states.shape) not in (2, 3) or states.shape[0] != tokens.shape[0]:
            shapes = f"{list(states.shape)} and {list(tokens.shape)}"
            raise ReadError(f"{shown_path(self.files, name)}: hidden states and tokens do not fit: {shapes}")
        if item_size(states.dtype) is None:
            raise ReadError(f"{shown_path(self.files, name)}: there is no dtype {states.dtype} here")
        return states, tokens


def _files(files: DumpFiles) -> tuple[str, list[str]]:
    """The folder in which the files lie, and their names."""
    own = sorted(name for name in files.top if name.endswith(_SUFFIX))
    folder = "hidden_states"
    if own or folder not in files.directories:
        return "", own
    return folder, sorted(name for name in files.files_in(folder) if name.endswith(_SUFFIX))


def _request(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(_SUFFIX)
