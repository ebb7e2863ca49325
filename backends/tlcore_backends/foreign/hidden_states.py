"""Hidden states that vLLM itself extracts, and those of speculators: a safetensors file a request."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

from tlcore.errors import ReadError
from tlcore.layout.dtypes import item_size, torch_dtype
from tlcore.protocols import Buffer, StepRanks
from tlcore.record import Json, tensor_from_bytes

from .documents import Found
from .files import DumpFiles, StoredAt, read_at, shown_path
from .safetensors_files import safetensors_in
from .source import ONE_RANK, ForeignSource

_SUFFIX = ".safetensors"
_OTHERS = (".pt", ".pth", ".bin", ".ckpt", ".npy", ".npz")
_KEYS = frozenset(("hidden_states", "token_ids"))
# Of states in eight bits, one scale for each token; they are restored in what speculators restores them in.
_SCALES, _RESTORED = "hidden_states_scales", "bfloat16"
_OF_SPECULATORS = re.compile(r"hs_(\d+)")
# The layers' numbers are not in the files; what a user knows of them `--map` can say.
LAYER = "hidden_states"


class _Held(NamedTuple):
    """What a file has: hidden states, tokens, and scales where the states are in eight bits."""

    states: StoredAt
    tokens: StoredAt
    scales: StoredAt | None


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
            if tensors.keys() - {_SCALES} != _KEYS:
                lacking = ", ".join(sorted(_KEYS - tensors.keys()))
                held = ", ".join(sorted(_KEYS & tensors.keys()))
                return f"{name}: has {held}, but no {lacking}" if lacking else None
            if len(tensors["hidden_states"].shape) not in (2, 3):
                return f"{name}: its hidden states are no [tokens, layers, hidden]"
        return {"world_size": 1}

    @classmethod
    def passed_over(cls, files: DumpFiles) -> list[str]:
        """Tensors in files of other kinds."""
        folder, _ = _files(files)
        return [name for name in files.files_in(folder) if name.endswith(_OTHERS)]

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
        held = self._tensors(step)
        states, tokens = held.states, held.tokens
        result = [Found("", "inputs", ("input_ids",), tokens.dtype, tokens.shape, tokens.place())]
        if len(states.shape) == 2:
            return [*result, _layer(0, states, held.scales)]
        count, layers, width = states.shape
        for layer in range(layers):
            at = states._replace(
                at=states.at + layer * width * (item_size(states.dtype) or 0),
                shape=(count, width),
                strides=(layers * width, 1),
            )
            result.append(_layer(layer, at, held.scales))
        return result

    def whole(self, record: Mapping[str, Any]) -> Buffer:
        """All bytes of a tensor, those in eight bits multiplied by their scales."""
        place = record["place"]
        if "scales" not in place:
            return super().whole(record)
        states, scales = (self._read(place[key]) for key in ("states", "scales"))
        restored = torch_dtype(_RESTORED)
        found = states.to(restored) * scales.to(restored).view(-1, 1)
        data: Buffer = found.view(torch_dtype("uint8")).numpy().reshape(-1).data
        return data

    def _read(self, place: Json) -> Any:
        dtype, shape = place["dtype"], place["shape"]
        size = prod(shape) * (item_size(dtype) or 1)
        data = read_at(self.files, {"place": place, "dtype": dtype, "shape": shape, "bytes": size})
        kind = torch_dtype(dtype)
        assert kind is not None
        return tensor_from_bytes(bytearray(data), kind, shape)

    def rows(self, step: int, rank: int) -> Sequence[Json]:
        """All rows are the request's, from its first position on."""
        name = self._requests[step]
        count = self._tensors(step).tokens.shape[0]
        return [
            {
                "request_id": _request(name),
                "external_request_id": _request(name),
                "first_row": 0,
                "rows": count,
                "first_position": 0,
            }
        ]

    def _tensors(self, step: int) -> _Held:
        name = self._requests[step]
        where = shown_path(self.files, name)
        tensors = safetensors_in(self.files, name)[0]
        if tensors.keys() - {_SCALES} != _KEYS:
            raise ReadError(f"{where}: has {', '.join(tensors)}, not {', '.join(_KEYS)}")
        states, tokens = tensors["hidden_states"], tensors["token_ids"]
        if len(tokens.shape) != 1 or len(states.shape) not in (2, 3) or states.shape[0] != tokens.shape[0]:
            shapes = f"{list(states.shape)} and {list(tokens.shape)}"
            raise ReadError(f"{where}: hidden states and tokens do not fit: {shapes}")
        scales = tensors.get(_SCALES)
        for each in (states, tokens) if scales is None else (states, tokens, scales):
            if item_size(each.dtype) is None:
                raise ReadError(f"{where}: there is no dtype {each.dtype} here")
        if scales is not None and (scales.shape[:1] != tokens.shape or prod(scales.shape) != tokens.shape[0]):
            shapes = f"{list(scales.shape)} for {tokens.shape[0]} tokens"
            raise ReadError(f"{where}: its scales are not one for each token: {shapes}")
        return _Held(states, tokens, scales)


def _layer(number: int, states: StoredAt, scales: StoredAt | None) -> Found:
    """The states of a layer."""
    dtype, place = states.dtype, states.place()
    if scales is not None:
        dtype = _RESTORED
        place = {key: _place_with_kind(at) for key, at in (("states", states), ("scales", scales))}
    return Found(f"{LAYER}.{number}", "outputs", (), dtype, states.shape, place)


def _place_with_kind(at: StoredAt) -> Json:
    return {**at.place(), "dtype": at.dtype, "shape": list(at.shape)}


def _files(files: DumpFiles) -> tuple[str, list[str]]:
    """The folder in which the files lie, and their names."""
    own = sorted(name for name in files.top if name.endswith(_SUFFIX))
    folder = "hidden_states"
    if own or folder not in files.directories:
        return "", own
    return folder, sorted(name for name in files.files_in(folder) if name.endswith(_SUFFIX))


def _request(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(_SUFFIX)
