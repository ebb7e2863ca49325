"""What of a call is in no run, and what is made of that when it is replayed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.analysis.replay.test_replay import X, captured
from tlcore.analysis.replay.checkpoints import class_name


def test_what_no_run_holds_is_told_where_it_may_be_why(tmp_path: Path) -> None:
    drops = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    found = tlcore.replay(captured(tmp_path, drops), "step_0/_root", drops)
    assert not found.equal and "it draws random numbers, and from which ones it began" in str(found)
    assert "random" not in str(tlcore.replay(found.run, "step_0/0", drops[0]))
    linear = nn.Sequential(nn.Linear(8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        url = captured(tmp_path, linear)
        assert tlcore.replay(url, "step_0/0", linear[0]).bitwise
    found = tlcore.replay(url, "step_0/0", linear[0])
    assert found.equal and "it was bfloat16 and is float32 now, and whether autocast was on" in str(found)
    assert not tlcore.replay(url, "step_0/0", linear[0], dtype=torch.float32).hints


def test_arguments_that_were_one_tensor_are_one_again_where_that_tells(tmp_path: Path) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.inner(x, x, x, need_weights=False)[0]
            return result

    model = Attends().eval()
    assert tlcore.replay(captured(tmp_path, model), "step_0/inner", model.inner).bitwise

    class Adds(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x.add_(1) * y

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Adds()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.inner(x.clone(), x.clone())
            return result

    assert tlcore.replay(captured(tmp_path, Apart()), "step_0/inner", Adds()).bitwise


@dataclass
class _State:
    hidden: torch.Tensor


def test_an_object_of_which_a_run_has_the_parts_is_asked_for_where_these_do_not_do(tmp_path: Path) -> None:
    class Takes(nn.Module):
        def forward(self, state: Any) -> torch.Tensor:
            result: torch.Tensor = state.hidden + 1
            return result

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.takes = Takes()

        def forward(self, x: torch.Tensor) -> Any:
            return self.takes([_State(x)][0])

    url = captured(tmp_path, Model())
    with pytest.raises(
        tlcore.ReadError, match=r"argument 0 was or held a .*_State, of which a run has the parts"
    ):
        tlcore.replay(url, "step_0/takes", Takes())
    assert tlcore.replay(url, "step_0/takes", Takes(), replace={0: _State(X)}).bitwise
    with pytest.raises(AttributeError):
        tlcore.replay(url, "step_0/takes", Takes(), replace={0: X})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of", "expected"),
    [
        ("transformers.models.bert.modeling_bert.BertModel", "BertModel"),
        ("transformers.models.bert.modeling_bert.BertForMaskedLM", "BertForMaskedLM"),
        # Of another kind of model, or no model at all: as the configuration says.
        ("transformers.models.gpt2.modeling_gpt2.GPT2Model", "BertForSequenceClassification"),
        ("vllm.model_executor.models.bert.BertPoolingModel", "BertForSequenceClassification"),
        ("my.code.AutoConfig", "BertForSequenceClassification"),
        (None, "BertForSequenceClassification"),
    ],
)
def test_a_checkpoint_is_loaded_as_the_class_that_the_run_names(
    tmp_path: Path, of: str | None, expected: str
) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.BertConfig(architectures=["BertForSequenceClassification"]).save_pretrained(tmp_path)
    assert class_name(str(tmp_path), of) == expected
    transformers.BertConfig().save_pretrained(tmp_path)
    assert class_name(str(tmp_path), None) == "AutoModelForCausalLM"
