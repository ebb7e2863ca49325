"""Which tensors the extension deals with itself: what only looks plain is left to Python."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.hotpath.halves import native
from tlcore.hotpath.looking import can_look

PLAIN: dict[str, Callable[[], torch.Tensor]] = {
    "a number": lambda: torch.tensor(1.5),
    "five dimensions": lambda: torch.zeros(1, 2, 3, 1, 2),
    "no elements": lambda: torch.zeros(0, 3),
    "bfloat16": lambda: torch.zeros(3, dtype=torch.bfloat16),
    "one that wants a gradient": lambda: torch.zeros(3, requires_grad=True),
    "one with a history": lambda: torch.zeros(3, requires_grad=True) * 2,
    "a transposed one": lambda: torch.zeros(2, 3).T,
    "a contiguous view": lambda: torch.zeros(4, 3)[1:3],
    "a copy made at the first write": lambda: torch._lazy_clone(torch.zeros(3)),
    "one of a dimension of size one with any stride": lambda: torch.zeros(3, 4)[:1].T,
}
ODD: dict[str, Callable[[], object]] = {
    "six dimensions": lambda: torch.zeros((1,) * 6),
    "turned signs": lambda: torch._neg_view(torch.ones(3)),
    "turned signs, from a complex number": lambda: torch.ones(1, dtype=torch.complex64).conj().imag,
    "conjugated": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "zeros nobody wrote": lambda: torch._efficientzerotensor((3,)),
    "sparse": lambda: torch.ones(3).to_sparse(),
    "without data": lambda: torch.ones(3, device="meta"),
    "a parameter": lambda: torch.nn.Parameter(torch.zeros(3)),
    "no tensor": lambda: [1.0],
}


@pytest.fixture(autouse=True)
def _learned() -> None:
    """The extension knows nothing of tensors before somebody asks whether it can look at them."""
    native()
    assert can_look()


def test_what_was_learned_is_told_again() -> None:
    can_look.cache_clear()
    assert can_look()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_tensors_are_known_as_such(name: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        assert native().is_plain(PLAIN[name]())


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_all_others_are_left_to_python(name: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        assert not native().is_plain(ODD[name]())


def test_tensors_of_a_transform_are_left_to_python() -> None:
    seen: list[bool] = []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(native().is_plain(tensor))
        return (tensor * tensor).sum()

    torch.func.vmap(look)(torch.ones(2, 3))
    torch.func.grad(look)(torch.ones(3))
    assert seen == [False] * 2


def test_a_torch_that_cannot_be_looked_at_is_left_to_python() -> None:
    native()
    exchange = torch.Tensor.__dlpack_c_exchange_api__
    alike = tuple(torch.zeros(2) for _ in range(2))
    try:
        assert not native().learn(torch.Tensor, exchange, alike, alike)
        assert not native().is_plain(torch.zeros(2))
        with pytest.raises(ValueError, match="PyCapsule"):
            native().learn(torch.Tensor, object(), alike, alike)
    finally:
        can_look.cache_clear()
        assert can_look()
