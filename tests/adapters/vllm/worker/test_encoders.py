"""Which modules lie within an encoder, told from the model alone."""

from __future__ import annotations

import pytest
from torch import nn

from tlcore.adapters.vllm.worker.encoders import within_encoders


class _Model(nn.Module):
    """A vision model and a language model beside each other, or in one that holds both."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        holder = nn.Module() if together else self
        holder.add_module(
            "visual", nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"merger": nn.Linear(2, 2)}))
        )
        holder.add_module("projectors", nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))]))
        holder.add_module("language", nn.Sequential(nn.Linear(2, 2)))
        if together:
            holder.__class__ = type("Both", (nn.Module,), {})
            self.model = holder
        self._language = [holder.get_submodule("language")]

    def get_language_model(self) -> nn.Module:
        return self._language[0]


@pytest.mark.parametrize(("together", "prefix"), [(False, ""), (True, "model.")])
def test_what_an_encoders_parts_call_lies_within(together: bool, prefix: str) -> None:
    inner = within_encoders(_Model(together))
    outermost = ("visual", "projectors.0", "projectors.1", "language")
    assert not any(inner(prefix + name) for name in outermost)
    within = ("visual.0", "visual.1.merger", "projectors.1.0")
    assert all(inner(prefix + name) for name in within)
    assert not inner("") and not inner("model") and inner(f"{prefix}visual.unknown")


def test_where_the_language_model_is_not_known_what_holds_others_is_an_encoder() -> None:
    inner = within_encoders(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))))
    assert [inner(name) for name in ("0", "1", "1.0")] == [False, False, True]
