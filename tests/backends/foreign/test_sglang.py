"""SGLang's dumper and its folder of tensors: made by hand, and by SGLang's own code where it can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.backends.foreign.conformance import ForeignConformance, Tensors
from tests.backends.foreign.tools import installed, write
from tlcore.__main__ import main
from tlcore.errors import ReadError

PROMPTS = ([5, 3, 9], [1, 7])
SGLANG = "sglang==0.5.23"
# What these files import of the server; nothing of it is called by what writes.
STAND_INS = """
import sys, types
def stand_in(name, **values):
    module = types.ModuleType(name)
    module.__dict__.update(values)
    sys.modules[name] = module
    return module
home = next(each for each in sys.path if "foreign" in each)
for name in ("", ".srt", ".srt.debug_utils"):
    stand_in("sglang" + name).__path__ = [home + "/sglang" + name.replace(".", "/")]
for name in ("layers", "managers", "model_executor", "layers.layer_boundary"):
    stand_in("sglang.srt." + name).__path__ = []
nothing = lambda *args, **keys: None
class ForwardBatch:
    def __init__(self, **values): self.__dict__.update(values)
class LogitsProcessorOutput:
    def __init__(self, logits): self.next_token_logits = logits
PPProxyTensors = type("PPProxyTensors", (), {})
stand_in("sglang.srt.layers.logits_processor", LogitsProcessorOutput=LogitsProcessorOutput)
stand_in("sglang.srt.model_executor.forward_batch_info", ForwardBatch=ForwardBatch,
         PPProxyTensors=PPProxyTensors)
stand_in("sglang.srt.managers.io_struct", sock_recv=nothing, sock_send=nothing, wrap_as_pickle=nothing)
stand_in("sglang.srt.runtime_context", get_parallel=nothing, get_server_args=nothing, get_serving=nothing)
stand_in("sglang.srt.utils", get_device=nothing)
stand_in("zmq")
import torch
from torch import nn
class Norm(nn.Module):
    def forward(self, x, residual): return x * 2, x + residual
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp, self.norm = nn.Linear(4, 4), Norm()
    def forward(self, x): return self.norm(self.mlp(x), x)[0]
class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])
    def forward(self, input_ids, positions, forward_batch):
        x = self.embed_tokens(input_ids)
        for layer in self.layers: x = layer(x)
        return x
class Logits(nn.Module):
    def forward(self, x): return LogitsProcessorOutput(x.sum(-1, keepdim=True))
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.logits_processor = Inner(), Logits()
    def forward(self, input_ids, positions, forward_batch):
        return self.logits_processor(self.model(input_ids, positions, forward_batch))
torch.manual_seed(0)
model = Model()
def batch(ids, positions, lengths, rids):
    ids, positions, lengths = map(torch.tensor, (ids, positions, lengths))
    return ForwardBatch(input_ids=ids, positions=positions, seq_lens=lengths, rids=rids,
                        req_pool_indices=torch.arange(len(rids)))
batches = [batch([5, 3, 9, 1, 7], [0, 1, 2, 0, 1], [3, 2], ["a", "b"]),
           batch([2, 4], [3, 2], [4, 3], ["a", "b"])]
"""
FOLDER = (
    STAND_INS
    + """
from sglang.srt.debug_utils.tensor_dump_forward_hook import register_forward_hook_for_model
register_forward_hook_for_model(model, sys.argv[1], None, 1, 0, 0)
with torch.no_grad():
    for each in batches: model(each.input_ids, each.positions, each)
torch.save(model.state_dict(), sys.argv[2])
"""
)
DUMPER = (
    STAND_INS
    + """
stand_in("sglang.srt.distributed")
stand_in("sglang.srt.layers.dp_attention")
stand_in("sglang.srt.layers.layer_boundary.output", UnreducedOutput=type("U", (), {}))
stand_in("sglang.srt.layers.layer_boundary.residual")
stand_in("sglang.srt.layers.layer_boundary.residual.stream", OwedOutput=type("O", (), {}))
from sglang.srt.debug_utils.dumper import dumper
dumper.configure(enable=True, dir=sys.argv[1], non_intrusive_mode="all", enable_output_console=False)
dumper.register_non_intrusive_dumper(model)
with torch.no_grad():
    for each in batches:
        model(each.input_ids, each.positions, each)
        dumper.step()
torch.save(model.state_dict(), sys.argv[2])
"""
)


def _batch(ids: list[int], positions: list[int], lengths: list[int]) -> dict[str, torch.Tensor]:
    values = {"input_ids": ids, "seq_lens": lengths, "positions": positions}
    return {f"model.forward_batch_info.{name}": torch.tensor(each) for name, each in values.items()}


class TestFolder(ForeignConformance):
    tool = "sglang-folder"

    def write(self, directory: Path, tensors: Tensors) -> Path:
        return self.written(directory, {**tensors, **_batch([5, 3, 9, 1, 7], [0, 1, 2, 0, 1], [3, 2])})

    @staticmethod
    def written(directory: Path, held: dict[str, Any]) -> Path:
        process = directory / "TP0_PP0_Rank0_pid7"
        process.mkdir()
        torch.save(held, process / "Pass00000.pt")
        return directory


class TestDumper(ForeignConformance):
    tool = "sglang-dumper"

    def write(self, directory: Path, tensors: Tensors) -> Path:
        exp = directory / "dump_20260101_000000_000123"
        exp.mkdir()
        for index, (name, tensor) in enumerate(tensors.items(), 1):
            _dumped(exp, f"non_intrusive__{name}.output", tensor, index)
        return directory


def _dumped(directory: Path, name: str, value: Any, index: int, step: int = 0, **more: Any) -> None:
    tags = {
        "step": step,
        "rank": 0,
        "dump_index": index,
        "name": name,
        "recompute_status": "disabled",
        **more,
    }
    text = "___".join(f"{key}={each}" for key, each in tags.items())
    torch.save({"value": value, "meta": {**tags, "world_size": 1}}, directory / f"{text}.pt")


def _reference(weights: Path, prompt: list[int]) -> dict[str, torch.Tensor]:
    """The model of the stand-ins, computed here for one prompt."""
    held = torch.load(weights)
    x = held["model.embed_tokens.weight"][prompt]
    found = {"model.embed_tokens": x}
    for layer in range(2):
        name = f"model.layers.{layer}.mlp"
        x = torch.nn.functional.linear(x, held[f"{name}.weight"], held[f"{name}.bias"])
        found[name] = x
        x = x * 2
    return {**found, "model": x}


@pytest.mark.slow
@pytest.mark.parametrize("script", [FOLDER, DUMPER], ids=("folder", "dumper"))
def test_what_sglang_itself_writes_is_read_per_request(tmp_path: Path, script: str) -> None:
    dump, weights = tmp_path / "dump", tmp_path / "weights.pt"
    dump.mkdir()
    write(installed("sglang", SGLANG), script, str(dump), str(weights))
    run = tlcore.open_run(dump)
    assert run.steps == [0, 1] and run.verify() == run.ledger.stored
    first, second = run.requests
    whole = _reference(weights, [5, 3, 9, 2]), _reference(weights, [1, 7, 4])
    for request, expected in zip((first, second), whole, strict=True):
        found = run.request(request)
        for module, tensor in expected.items():
            # The last pass's result was never written by the folder dump.
            held = found[f"{module}/outputs_cpu"]
            torch.testing.assert_close(held, tensor[: len(held)])
            assert len(held) == len(tensor) or module == "model"
    assert len(run.step(0).call("model.layers.1.norm").outputs) == 2
    assert run.step(0).call("logits_processor").outputs is not None


def test_a_result_that_lies_in_the_next_pass_is_told_with_its_own(tmp_path: Path) -> None:
    process = tmp_path / "TP0_PP0_Rank0_pid7"
    process.mkdir()
    for number in range(2):
        held = {"model.norm": torch.full((2, 1), number), **_batch([1, 2], [0, 1], [2])}
        late = {"model": torch.tensor([number - 1]), "logits_processor": torch.tensor([number - 1])}
        torch.save({**(late if number else {}), **held}, process / f"Pass0000{number}.pt")
    for path in (tmp_path, process):
        run = tlcore.open_run(path)
        assert run.tensor("step_0/model/outputs_cpu").item() == 0
        assert run.tensor("step_0/logits_processor/outputs_cpu").item() == 0
        assert run.tensor("step_1/model.norm/outputs_cpu").tolist() == [[1], [1]]
        assert not [name for name in run.step(1).names if "step_1/model/outputs" in name]


def test_a_request_goes_on_only_where_no_other_could(tmp_path: Path) -> None:
    process = tmp_path / "TP0_PP0_Rank0_pid7"
    process.mkdir()
    passes = [
        _batch([5, 3, 1, 7, 8], [0, 1, 0, 1, 2], [2, 3]),
        _batch([2, 4], [2, 3], [3, 4]),
        # Both are at position 4 or began there: nothing tells which is which.
        _batch([6, 6, 9], [3, 3, 0], [4, 4, 1]),
        _batch([6, 6], [0, 5], [9, 9]),
    ]
    for number, held in enumerate(passes):
        torch.save({"model.norm": torch.zeros(5, 1), **held}, process / f"Pass0000{number}.pt")
    run = tlcore.open_run(tmp_path)
    rows = [run.step(number).rows for number in range(4)]
    ids = [None if each is None else [row["request_id"] for row in each] for each in rows]
    assert ids == [["0.0", "0.1"], ["0.0", "0.1"], ["2.0", "2.1", "2.2"], None]


Passes = list[tuple[list[int], list[int]]]
# Positions and lengths of each pass, and the names that requests have.
GOING_ON: dict[str, tuple[Passes, list[Any]]] = {
    "a prompt in pieces": (
        [([0, 1], [2]), ([2, 3, 4], [5]), ([5], [6])],
        [["0.0"], ["0.0"], ["0.0"]],
    ),
    "a prompt in pieces beside others that decode": (
        [([0, 1, 2], [3]), ([3, 0, 1], [4, 2]), ([4, 2, 3], [5, 4]), ([5, 4], [6, 5])],
        [["0.0"], ["0.0", "1.1"], ["0.0", "1.1"], ["0.0", "1.1"]],
    ),
    "others begin while one waits": (
        [([0, 1, 2], [3]), ([0, 1, 2, 3], [4]), ([3, 4], [4, 5])],
        [["0.0"], ["1.0"], ["0.0", "1.0"]],
    ),
    "a prefix from the cache, as long as one that has ended": (
        [([0, 1], [2]), ([2], [3]), ([3, 4, 5], [6]), ([6], [7])],
        [["0.0"], ["0.0"], ["2.0"], ["2.0"]],
    ),
    "the same but for its last token": (
        [([0, 1, 0, 1, 2], [2, 3]), ([2, 3], [3, 4]), ([4], [5]), ([3], [4])],
        [["0.0", "0.1"], ["0.0", "0.1"], ["0.1"], ["3.0"]],
    ),
    "a pass that does not tell": (
        [([0, 1], [2]), ([0, 5], [9, 9]), ([2], [3])],
        [["0.0"], None, ["2.0"]],
    ),
}


@pytest.mark.parametrize("what", GOING_ON)
def test_a_request_goes_on_where_its_positions_tell(tmp_path: Path, what: str) -> None:
    process = tmp_path / "TP0_PP0_Rank0_pid7"
    process.mkdir()
    passes, expected = GOING_ON[what]
    for number, (positions, lengths) in enumerate(passes):
        held = {"model.norm": torch.zeros(5, 1), **_batch([1] * len(positions), positions, lengths)}
        torch.save(held, process / f"Pass0000{number}.pt")
    run = tlcore.open_run(tmp_path)
    rows = [run.step(number).rows for number in range(len(passes))]
    assert [each and [row["request_id"] for row in each] for each in rows] == expected


def test_names_of_the_dumper_tell_what_a_tensor_is(tmp_path: Path) -> None:
    x = torch.ones(2)
    names = (
        "non_intrusive__model.layers.0.mlp.inputs.0",
        "non_intrusive__model.layers.0.mlp.output.1",
        "grad__non_intrusive__model.layers.0.mlp.output.1",
        "non_intrusive__inputs.x",
        "positions",
        "param__model.norm.weight",
        "hidden___states",
    )
    for index, name in enumerate(names):
        _dumped(tmp_path, name, x * index, index)
    _dumped(tmp_path, "attn", {"q": x, "note": "text"}, 20, layer_id=3, phase="decode")
    _dumped(tmp_path, "attn", x, 21, step=4, layer_id=3)
    torch.save(x, tmp_path / "forward_pass_id=5___rank=0___dump_index=30___name=bare.pt")
    run = tlcore.open_run(tmp_path)
    assert run.steps == [0, 4, 5]
    assert [name.removeprefix("step_0/") for name in run.step(0).names] == [
        "model.layers.0.mlp/inputs_0_cpu",
        "model.layers.0.mlp/outputs_1_cpu",
        "model.layers.0.mlp/grad_outputs_1_cpu",
        "_root/inputs_x_cpu",
        "_root/inputs_positions_cpu",
        "param.model.norm.weight/outputs_cpu",
        "hidden___states/outputs_cpu",
        "layers.3.attn.phase=decode/outputs_q_cpu",
    ]
    assert run.step(4).names == ["step_4/layers.3.attn/outputs_cpu"]
    assert run.tensor("step_5/bare/outputs_cpu").equal(x)


def test_a_near_miss_says_what_is_missing(tmp_path: Path) -> None:
    for pid in (7, 8):
        (tmp_path / f"TP0_PP0_Rank0_pid{pid}").mkdir()
    with pytest.raises(ReadError, match="holds the dumps of several servers"):
        tlcore.open_run(tmp_path)
    (tmp_path / "TP0_PP0_Rank0_pid8").rmdir()
    with pytest.raises(ReadError, match=r"has TP0_PP0_Rank0_pid7, but no Pass00000\.pt in it"):
        tlcore.open_run(tmp_path)
    torch.save({"model.norm": torch.ones(1)}, tmp_path / "TP0_PP0_Rank0_pid7" / "Pass00000.pt")
    with pytest.raises(ReadError, match=r"Pass00000\.pt: has no \*\.forward_batch_info\.input_ids"):
        tlcore.open_run(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    torch.save(torch.ones(1), other / "step=0___name=x.pt")
    assert tlcore.open_run(other).document["backend"] == "plain"
    for name in ("dump_a", "dump_b"):
        (tmp_path / "two" / name).mkdir(parents=True)
        _dumped(tmp_path / "two" / name, "x", torch.ones(1), 1)
    with pytest.raises(ReadError, match=r"several dumps of SGLang's dumper \(dump_a, dump_b\)"):
        tlcore.open_run(tmp_path / "two")


def test_of_a_name_it_is_said_which_tags_it_lacks(tmp_path: Path) -> None:
    for name, lacking in (
        ("step=0___name=x", "rank=, dump_index="),
        ("step=a___rank=0___dump_index=1___name=x", "step="),
        ("curr_step=0___rank=0___dump_index=1", "name="),
    ):
        place = tmp_path / lacking
        place.mkdir()
        (place / f"{name}.pt").write_bytes(b"")
        with pytest.raises(ReadError, match=f"{name}.pt: has tags in its name, but no {lacking}\n"):
            tlcore.open_run(place)


def _by_two_ranks(directory: Path, fault: int | None = None, **parallel: Any) -> Path:
    """A projection's result by columns, and one of which each rank has a summand."""
    directory.mkdir()
    whole = torch.arange(12.0).view(3, 4)
    for rank in range(2):
        info = {"tp_rank": rank, "tp_size": 2, "pp_rank": 0, "pp_size": 1, **parallel}
        meta = {"step": 0, "rank": rank, "world_size": 2, "sglang_parallel_info": info}
        tensors = {
            ("model.layers.0.mlp.up_proj", "t h[tp] # dp:=x"): whole[:, 2 * rank :][:, :2].clone(),
            ("model.layers.0.mlp.down_proj", "t h[tp:partial]"): whole * (0.25 + rank / 2),
            ("model.layers.0.mlp", "t h"): whole.clone(),
            ("model.norm", None): whole.clone(),
        }
        for index, ((name, dims), tensor) in enumerate(tensors.items(), 1):
            if fault == index and rank == 1:
                tensor[2, 1] += 1
            tags = f"step=0___rank={rank}___dump_index={index}___name=non_intrusive__{name}.output"
            told = meta if dims is None else {**meta, "dims": dims}
            torch.save({"value": tensor, "meta": told}, directory / f"{tags}.pt")
    return directory


def test_ranks_are_joined_as_the_dumper_says(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    names = ["mlp.up_proj", "mlp.down_proj", "mlp"]
    held = {**{f"model.layers.0.{name}": whole for name in names}, "model.norm": whole}
    torch.save(held, tmp_path / "one.pt")
    dump = _by_two_ranks(tmp_path / "dump")
    run = tlcore.open_run(dump)
    assert run.ranks[1]["tp_rank"] == 1 and run.ranks[1]["tp_size"] == 2
    for name in names[:2]:
        assert run.tensor(f"step_0/model.layers.0.{name}/outputs_cpu", unshard=True).equal(whole)
    for found in (tlcore.compare(tmp_path / "one.pt", dump), tlcore.compare(dump, tmp_path / "one.pt")):
        assert found.equal and len(found.results) == 2 + 2 * 2
    for index, (name, rank) in enumerate(zip(held, (0, 0, 1, 1), strict=True), 1):
        bad = tlcore.compare(tmp_path / "one.pt", _by_two_ranks(tmp_path / f"bad{index}", index))
        assert [(each.module, each.rank) for each in bad.results if not each.agrees] == [(name, rank)]


def test_of_ranks_of_which_little_is_told_nothing_is_taken_for_granted(tmp_path: Path) -> None:
    odd: tuple[dict[str, Any], ...] = ({"tp_size": 1}, {"tp_size": "2"}, {"pp_rank": 1})
    for number, parallel in enumerate(odd):
        dump = _by_two_ranks(tmp_path / str(number), **parallel)
        assert not tlcore.open_run(dump).ranks
    dump = _by_two_ranks(tmp_path / "dump")
    for file in dump.glob("*rank=0*"):
        file.unlink()
    assert not tlcore.open_run(dump).ranks


def test_the_folders_names_tell_how_ranks_share_the_model(tmp_path: Path) -> None:
    for rank in range(4):
        process = tmp_path / f"TP{rank % 2}_PP{rank // 2}_Rank{rank}_pid{rank}"
        process.mkdir()
        held = {f"model.layers.{rank // 2}.mlp": torch.ones(2, 1), **_batch([1, 2], [0, 1], [2])}
        torch.save(held, process / "Pass00000.pt")
    run = tlcore.open_run(tmp_path)
    assert [(each["tp_rank"], each["pp_rank"]) for each in run.ranks.values()] == [
        (0, 0),
        (1, 0),
        (0, 1),
        (1, 1),
    ]
    assert run.ranks[0]["tp_size"] == run.ranks[0]["pp_size"] == 2


def test_a_listing_says_what_a_dump_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "dump"
    folder.mkdir()
    assert main(["ls", str(folder)]) == 0 and capsys.readouterr().out == "no runs\n"
    place = folder / "TP0_PP0_Rank0_pid7"
    place.mkdir()
    torch.save({"model.layers.0.mlp": torch.ones(2)}, place / "Pass00000.pt")
    assert main(["ls", str(folder)]) == 2
    assert "Pass00000.pt: has no *.forward_batch_info.input_ids" in capsys.readouterr().err
