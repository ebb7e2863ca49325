"""What the filters say about a tensor, decided once for all tensors of one dtype, shape and device."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import torch

from ...errors import ConfigError
from ...layout.dtypes import name_of
from ...layout.row_scale import SCALE_BYTES, packed_shape
from ...ledger import NO_CHANNELS, Outcome
from ...statistics.channels_of_tensors import has_channels
from .run_bytes import RunBytes

# A copy this small is over before another thread could use the interpreter, which is dear to get back.
_SMALL_BYTES = 256 << 10
_LONGEST_TABLE = 4096
_OTHER_DEVICE = "device not in device_names"

Move = Callable[[int, int, int], object]
move_large: Move = ctypes.memmove
_address = ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
# The same function, called without giving up the interpreter's lock.
move_small: Move = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(_address)


def mover(nbytes: int) -> Move:
    """What copies so many bytes, which may overlap."""
    return move_small if nbytes < _SMALL_BYTES else move_large


@dataclass(frozen=True, slots=True)
class TensorFilter:
    """What decides about one tensor from its metadata; devices as of `known_devices`, sizes in elements.

    ``room`` is what the run may still store, where that is asked when tensors are copied.
    """

    devices: frozenset[str]
    max_elements: int | None
    room: RunBytes | None
    # Whether only those are taken that have statistics for each channel.
    channels: bool = False
    # What wider floating tensors are converted to.
    store_dtype: torch.dtype | None = None


def known_devices(names: Iterable[str]) -> frozenset[str]:
    """The devices as ``str(tensor.device)`` has them; a type alone (``cuda``) stands for all of that type.

    Raises ConfigError for a name that means no device to torch.
    """
    return frozenset(map(_known_device, names))


def _known_device(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError("$.device_names", f"{name!r} is no torch device: {error}.") from None
    # Torch takes an index for the CPU, and its tensors have none.
    return device.type if device.type == "cpu" else str(device)


Stored = tuple[torch.dtype, tuple[int, ...]]


def narrower(dtype: torch.dtype, shape: tuple[int, ...], wanted: torch.dtype | None) -> Stored | None:
    """The dtype and shape that a tensor is stored in where ``wanted`` is asked for; None for as it is."""
    if wanted == torch.int8:
        packed = packed_shape(dtype, shape)
        return None if packed is None else (wanted, packed)
    if wanted is None or not dtype.is_floating_point or dtype.itemsize <= wanted.itemsize:
        return None
    return wanted, shape


class TensorSpec:
    """All tensors of one dtype, shape (elements) and device; ``outcome`` is None where they are stored.

    ``kind`` is equal for specs of equal dtype and shape. ``plain`` says that a contiguous tensor's bytes
    need nothing but ``move(target, source, nbytes)``. Of a tensor that is ``measured`` statistics are kept.
    ``placements`` is JSON text on how a rank's part belongs to a distributed tensor, empty for a whole one.
    One that is converted before it is copied had the ``original`` dtype and took ``captured_bytes``.
    ``shown`` are the dtype and shape that it is read in: not those of its bytes where rows have a scale.
    """

    __slots__ = (
        "_of_rows",
        "_variants",
        "captured_bytes",
        "device",
        "dtype",
        "kind",
        "measured",
        "move",
        "nbytes",
        "original",
        "outcome",
        "placements",
        "plain",
        "shape",
        "shown",
    )

    def __init__(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        device: str,
        nbytes: int,
        kind: int,
        outcome: Outcome | None,
        plain: bool = False,
        measured: bool = False,
    ) -> None:
        self.dtype = dtype
        self.shape = shape
        self.device = device
        self.nbytes = nbytes
        self.kind = kind
        self.outcome = outcome
        self.plain = plain
        self.move = mover(nbytes)
        self.measured = measured
        self.placements = ""
        self.original = ""
        self.captured_bytes = nbytes
        self.shown = dtype, shape
        self._variants: dict[tuple[Outcome | None, bool, str], TensorSpec] = {}
        self._of_rows: dict[int, TensorSpec] = {}

    def refused(self, outcome: Outcome, measured: bool = False) -> TensorSpec:
        """The same form for a tensor that is not stored after all."""
        return self if self.outcome is not None else self._variant(outcome, measured)

    def unwanted(self, outcome: Outcome) -> TensorSpec:
        """The same form for a tensor that is left out, whatever else is said of it."""
        return self._variant(outcome, False)

    def with_statistics(self) -> TensorSpec:
        """The same form for a tensor that is stored with its statistics."""
        return self if self.outcome is not None else self._variant(None, True)

    @property
    def is_scaled(self) -> bool:
        """Whether its bytes are rows with a scale."""
        return self.shown[0] != self.dtype

    def as_part(self, placements: str) -> TensorSpec:
        """The same form for a rank's part of a distributed tensor, with these ``placements``."""
        return self._variant(self.outcome, self.measured, placements)

    def of_rows(self, count: int) -> TensorSpec:
        """The form of so many of its rows, those along its first axis."""
        if not self.shape or self.shape[0] == count:
            return self
        known = self._of_rows.get(count)
        if known is None:
            rows, (dtype, shown) = self.shape[0], self.shown
            # No tensor that is copied as it is has such a number.
            kind = -1 - (self.kind << 32 | count)
            shape, nbytes = (count, *self.shape[1:]), self.nbytes // rows * count
            known = TensorSpec(self.dtype, shape, self.device, nbytes, kind, self.outcome)
            known.original, known.captured_bytes = self.original, self.captured_bytes // rows * count
            known.shown = dtype, (count, *shown[1:])
            self._of_rows[count] = known
        return known

    def _variant(self, outcome: Outcome | None, measured: bool, placements: str = "") -> TensorSpec:
        placements = placements or self.placements
        known = self._variants.get((outcome, measured, placements))
        if known is None:
            known = TensorSpec(
                self.dtype, self.shape, self.device, self.nbytes, self.kind, outcome, False, measured
            )
            known.placements = placements
            known.original, known.captured_bytes = self.original, self.captured_bytes
            known.shown = self.shown
            self._variants[outcome, measured, placements] = known
        return known


class TensorSpecs:
    """Every form met so far; bounded, since shapes may go on changing for ever."""

    def __init__(self, tensors: TensorFilter) -> None:
        # Called when all specs met so far are forgotten.
        self.on_clear: Callable[[], object] = lambda: None
        self._filter = tensors
        self._known: dict[tuple[object, ...], TensorSpec] = {}
        self._kinds: dict[tuple[torch.dtype, tuple[int, ...]], int] = {}
        self._numbers = itertools.count()

    def find(self, tensor: torch.Tensor) -> TensorSpec:
        """The form of any tensor; raises what torch raises for one that hides its metadata."""
        outcome = _unsupported_class(tensor)
        shape = () if tensor.is_nested else tuple(tensor.shape)
        key = (tensor.dtype, shape, tensor.device, tensor.layout, outcome)
        spec = self._known.get(key)
        if spec is None:
            if len(self._known) >= _LONGEST_TABLE:
                self._clear()
            spec = self._known[key] = self._make(tensor, shape, outcome)
        return spec

    def of_vector(self, vector: torch.Tensor) -> TensorSpec:
        """The form of a vector of ours, to which no filter applies."""
        key = ("vector", vector.numel(), vector.device)
        spec = self._known.get(key)
        if spec is None:
            shape, device = tuple(vector.shape), str(vector.device)
            spec = TensorSpec(vector.dtype, shape, device, vector.nbytes, next(self._numbers), None)
            self._known[key] = spec
        return spec

    def _clear(self) -> None:
        # Numbers of kinds are never used again, so what older specs say of equality stays true.
        self._known.clear()
        self._kinds.clear()
        self.on_clear()

    def _make(self, tensor: torch.Tensor, shape: tuple[int, ...], outcome: Outcome | None) -> TensorSpec:
        dtype, device = tensor.dtype, str(tensor.device)
        count = 0 if tensor.is_nested else tensor.numel()
        outcome = self._judge(tensor, device, count) or outcome
        stored = narrower(dtype, shape, self._filter.store_dtype) if outcome is None else None
        if stored is not None:
            return self._converted(dtype, stored, device, count)
        kind = self._kinds.setdefault((dtype, shape), next(self._numbers))
        # A limit on the run's bytes must be looked at for each tensor.
        plain = outcome is None and tensor.is_cpu and not dtype.is_complex and self._filter.room is None
        return TensorSpec(dtype, shape, device, count * dtype.itemsize, kind, outcome, plain)

    def _converted(self, dtype: torch.dtype, stored: Stored, device: str, count: int) -> TensorSpec:
        into, shape = stored
        kind = self._kinds.setdefault(stored, next(self._numbers))
        spec = TensorSpec(into, shape, device, prod(shape) * into.itemsize, kind, None)
        spec.original, spec.captured_bytes = name_of(dtype), count * dtype.itemsize
        if into == torch.int8:
            spec.shown = dtype, (*shape[:-1], shape[-1] - SCALE_BYTES)
        return spec

    def _judge(self, tensor: torch.Tensor, device: str, count: int) -> Outcome | None:
        limits = self._filter
        if limits.devices and limits.devices.isdisjoint((device, tensor.device.type)):
            return Outcome(None, _OTHER_DEVICE)
        if tensor.layout is not torch.strided:
            return Outcome("skipped", f"unsupported layout {tensor.layout}")
        if tensor.is_quantized:
            return Outcome("skipped", "unsupported quantized dtype")
        if tensor.is_meta:
            return Outcome("skipped", "meta tensor holds no data")
        if limits.max_elements is not None and count > limits.max_elements:
            return Outcome("skipped", "larger than max_tensor_size")
        if limits.channels and not has_channels(tensor.dtype, tensor.shape):
            return NO_CHANNELS
        return None


def _unsupported_class(tensor: torch.Tensor) -> Outcome | None:
    """Why a tensor that is not a plain `torch.Tensor` has no bytes of its own to store, or None."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return Outcome("skipped", "inside a torch.func transform")
    if tensor.is_nested:
        return Outcome("skipped", "unsupported nested tensor")
    cls = type(tensor)
    if cls.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return Outcome("skipped", f"unsupported tensor class {cls.__name__}")
    return None
