"""What is kept of a tensor: bytes, statistics or both, always or only where NaN or Inf appears."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import nn

import tlcore
from tests.sinks import MemorySink
from tests.toys import Fails, Holder, Shared, model, run
from tlcore.__main__ import main
from tlcore.config.configuration import load_config
from tlcore.engine.hooks import copies
from tlcore.errors import ConfigError, ReadError
from tlcore.reader import MissingError, Skipped
from tlcore.runs.convert import convert
from tlcore.statistics.host import HostStatistics
from tlcore.statistics.summary import KEYS, Statistics

BACKENDS = ("pt", "safetensors")


class Poisons(nn.Module):
    """Gives a NaN in one of two results."""

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> Any:
        return x / 0.0 * 0.0, other + 1


class Body(nn.Module):
    """A sound call, one that makes NaN, and one that passes it on."""

    def __init__(self) -> None:
        super().__init__()
        self.sound = nn.Linear(4, 4)
        self.poison = Poisons()
        self.after = nn.ReLU()

    def forward(self, x: torch.Tensor) -> Any:
        bad, good = self.poison(self.sound(x), x)
        return self.after(bad), good


class Faulty(nn.Module):
    """Contains all of them in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(x)


def tensors_in(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every tensor's node of a structure."""
    if node["type"] == "tensor":
        yield node
    items = node.get("items", ())
    for child in (
        *(items.values() if isinstance(items, dict) else items),
        *node.get("kwargs", {}).get("items", {}).values(),
    ):
        yield from tensors_in(child)


def nodes(sink: MemorySink, step: int = 0) -> dict[str, list[dict[str, Any]]]:
    return {name: list(tensors_in(each)) for name, each in sink.steps[step].structures.items()}


def captured_to(directory: Path, module: nn.Module, steps: int = 2, size: int = 4, **keys: Any) -> Any:
    torch.manual_seed(1)
    with tlcore.capture(
        module, output_dir=str(directory), log_step_ids=[], **{"module_call_match": ".", **keys}
    ) as captured:
        for _ in range(steps):
            module(torch.randn(2, size))
    assert captured.ledger.balanced
    return tlcore.open_run(captured.url)


def test_tensor_is_the_default_and_keeps_no_statistics() -> None:
    assert load_config().capture == "tensor" and load_config().on_condition is None
    sink, _ = run(model())
    assert not [node for found in nodes(sink).values() for node in found if "stats" in node]


def test_statistics_alone_store_no_byte_and_count_as_skipped() -> None:
    sink, captured = run(Shared(), steps=2, size=3, log_step_ids=[], capture="stats")
    assert sink.tensors == {}
    ledger = captured.ledger
    assert ledger.captured == ledger.skipped == ledger.reasons["skipped: statistics only"] == 16
    assert ledger.bytes_stored == 0 < ledger.bytes_captured
    assert sink.steps[1].calls == ["twice", "twice_1", "twice_2", "once"]
    for found in nodes(sink, 1).values():
        (node,) = found
        assert node["skipped"] == "statistics only" and "file" not in node
        assert list(node["stats"]) == list(KEYS)
    assert nodes(sink, 1)["twice_1/outputs.json"][0]["name"] == "step_1/twice_1/outputs_cpu"


def test_both_keep_the_bytes_and_their_statistics() -> None:
    module, sink = model(), MemorySink()
    with tlcore.capture(
        module, module_call_match=".", backend=sink, capture="both", log_post_fwd_inputs=True
    ) as captured:
        module(torch.randn(5, 4))
    assert captured.ledger.stored == captured.ledger.captured == 9
    for found in nodes(sink).values():
        (node,) = found
        tensor = sink.tensors[node["file"].removesuffix(".pt")].double()
        assert node["stats"]["mean"] == pytest.approx(float(tensor.mean()), rel=1e-12)
        assert node["stats"]["std"] == pytest.approx(float(tensor.std(correction=0)), rel=1e-12)
        assert node["stats"]["zeros"] == int((tensor == 0).sum())
    # What ReLU made in place: the same bytes, so the same hash.
    structures = sink.steps[0].structures
    after = structures["1/post_fwd_inputs.json"]["items"][0]["stats"]["hash"]
    assert (
        after
        == structures["1/outputs.json"]["stats"]["hash"]
        == structures["2/inputs.json"]["items"][0]["stats"]["hash"]
    )
    assert after != structures["1/inputs.json"]["items"][0]["stats"]["hash"]


def test_both_stores_what_tensor_stores(tmp_path: Path) -> None:
    one = captured_to(tmp_path / "a", Shared(), size=3)
    module = Shared()
    other = captured_to(tmp_path / "b", module, size=3, capture="both")
    assert one.step(1).names == other.step(1).names
    assert one.step(1).calls == other.step(1).calls


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("capture", ["stats", "both"])
def test_statistics_are_read_back_converted_and_verified(tmp_path: Path, backend: str, capture: str) -> None:
    stored = captured_to(tmp_path / "first", Holder(Shared()), size=3, backend=backend, capture=capture)
    step = stored.step(1)
    order = [(entry["module"], entry["call"], entry["direction"]) for entry in step.described]
    assert order[:3] == [("inner", 0, "inputs"), ("inner.twice", 0, "inputs"), ("inner.twice", 0, "outputs")]
    assert order[-2:] == [("inner.once", 0, "outputs"), ("inner", 0, "outputs")]
    if capture == "both":
        names = [entry["name"] for entry in step.described]
        assert names == step.names
    found = stored.stats("step_1/inner.once/outputs_cpu.pt")
    assert isinstance(found, Statistics) and found.numel == 4 and found.hash
    assert stored.verify() == (20 if capture == "both" else 0)
    with pytest.raises(MissingError, match="did you mean"):
        stored.stats("step_1/inner.once/output_cpu")
    if capture == "stats":
        value = step.call("inner.once").outputs
        assert isinstance(value, Skipped) and value.reason == "statistics only"
    other = next(name for name in BACKENDS if name != backend)
    there = tlcore.open_run(convert(stored, load_config(output_dir=str(tmp_path / "there"), backend=other)))
    back = tlcore.open_run(convert(there, load_config(output_dir=str(tmp_path / "back"), backend=backend)))
    assert there.step(1).described == back.step(1).described == step.described
    assert content_of(back) == content_of(stored)


def content_of(run: tlcore.Run) -> dict[str, Any]:
    """The files of a run; of one in segments, whose boundaries depend on time, all that they say."""
    base = Path(run.url)
    if (base / "segments").exists():
        documents = {f"step_{step}/step.json": run.json(f"step_{step}/step.json") for step in run.steps}
        tensors = {name: run.tensor(name).tolist() for step in run.values() for name in step.names}
        return {"run.json": json.loads((base / "run.json").read_text()), **documents, **tensors}
    return {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}


def test_the_tree_of_any_run_has_the_statistics(tmp_path: Path) -> None:
    trees = []
    for backend in BACKENDS:
        module = model()
        found = captured_to(tmp_path / backend, module, backend=backend, capture="both")
        tree = fsspec.filesystem("tlcore", run=found.url, skip_instance_cache=True)
        trees.append(tree.cat_file("step_0/1/outputs.json"))
    assert trees[0] == trees[1] and b'"stats"' in trees[0]


def test_tlcore_stats_takes_the_captured_statistics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = captured_to(tmp_path / "plain", Faulty().eval(), capture="both")
    for file in Path(plain.url).rglob("*.pt"):
        file.write_bytes(b"nobody needs this")
    assert main(["stats", plain.url, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["tensors"]) == 2 * len(plain.step(0).names)
    assert report["first_nan"]["module"] == "body.poison" and report["first_nan"]["born"] is True
    stats_only = captured_to(tmp_path / "stats", model(), capture="stats")
    assert main(["stats", stats_only.url]) == 0
    assert "skipped" not in capsys.readouterr().out


def test_compare_and_show_go_on_working(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = model()
    a, b = (captured_to(tmp_path / name, module, capture="stats") for name in "ab")
    assert main(["compare", a.url, b.url]) == 2
    assert "no tensor to compare" in capsys.readouterr().err
    c = captured_to(tmp_path / "c", module, capture="both")
    d = captured_to(tmp_path / "d", module)
    assert main(["compare", c.url, d.url]) == 0
    assert main(["compare", a.url, d.url]) != 0
    capsys.readouterr()
    assert main(["show", a.url, "step_0/1"]) == 0
    shown = capsys.readouterr().out
    assert "statistics only" in shown and "hash ml-xxh3-128:" in shown


def test_nonfinite_stores_the_tensor_and_the_inputs_of_its_call() -> None:
    sink, captured = run(Faulty(), on_condition="nonfinite")
    assert set(sink.tensors) == {
        "step_0/body/inputs_0_cpu",
        "step_0/body/outputs_0_cpu",
        "step_0/body.poison/inputs_0_cpu",
        "step_0/body.poison/inputs_1_cpu",
        "step_0/body.poison/outputs_0_cpu",
        "step_0/body.after/inputs_0_cpu",
        "step_0/body.after/outputs_cpu",
    }
    ledger = captured.ledger
    assert ledger.stored == 7 and ledger.skipped == ledger.captured - 7 == 4
    assert ledger.reasons == {"skipped: no NaN or Inf in it or its call": 4}
    assert sink.steps[0].calls == ["body", "body.sound", "body.poison", "body.after"]
    assert set(nodes(sink)) >= {"body.sound/inputs.json", "body.sound/outputs.json"}


def test_nonfinite_gives_the_same_when_memory_is_short() -> None:
    """Then a call's inputs are long handed over when its result is known."""
    sinks = []
    for keys in ({}, {"queue_bytes": 64}, {"queue_bytes": 64, "capture": "both"}):
        torch.manual_seed(2)
        sink, captured = run(
            Faulty(), steps=3, log_step_ids=[], on_condition="nonfinite", log_post_fwd_inputs=True, **keys
        )
        assert captured.ledger.dropped == 0
        sinks.append(sink)
    first, *others = sinks
    for other in others:
        assert set(other.tensors) == set(first.tensors) and first.tensors
        assert all(
            torch.equal(other.tensors[name].nan_to_num(), first.tensors[name].nan_to_num())
            for name in first.tensors
        )
        assert [step.calls for step in other.steps] == [step.calls for step in first.steps]
        assert [step.counts for step in other.steps] == [step.counts for step in first.steps]
    assert dict(others[0].steps[2].structures) == dict(first.steps[2].structures)


def test_nonfinite_with_a_module_that_raises() -> None:
    module, sink = Holder(Fails(ValueError("no"))), MemorySink()
    with tlcore.capture(
        module, module_call_match=".", backend=sink, on_condition="nonfinite", log_step_ids=[]
    ) as captured:
        for value in (1.0, math.inf):
            with pytest.raises(ValueError, match="no"):
                module(torch.tensor([value]))
    assert set(sink.tensors) == {"step_1/inner/inputs_0_cpu"}
    assert captured.ledger.balanced and captured.ledger.captured == 2


def test_nonfinite_and_both_describe_all_and_store_few(tmp_path: Path) -> None:
    for backend in BACKENDS:
        found = captured_to(
            tmp_path / backend, Faulty(), backend=backend, capture="both", on_condition="nonfinite"
        )
        step = found.step(0)
        assert len(step.described) == step.ledger.captured > len(step.names) == step.ledger.stored
        assert {entry["name"] for entry in step.described if entry["stored"]} == set(step.names)
        assert found.verify() == found.ledger.stored


@pytest.mark.parametrize("keys", [{"capture": "both"}, {"on_condition": "nonfinite"}])
def test_max_run_bytes_counts_what_is_stored(keys: dict[str, Any]) -> None:
    sink, captured = run(Faulty(), steps=3, log_step_ids=[], max_run_bytes=100, **keys)
    ledger = captured.ledger
    assert 0 < sum(tensor.nbytes for tensor in sink.tensors.values()) <= 100
    assert ledger.reasons["skipped: max_run_bytes reached"] > 0
    assert ledger.stored == len(sink.tensors) and len(sink.steps) == 3
    if "capture" in keys:
        # The statistics go on.
        assert all("stats" in node for found in nodes(sink, 2).values() for node in found)


def test_statistics_alone_never_reach_max_run_bytes() -> None:
    _, captured = run(model(), steps=3, log_step_ids=[], max_run_bytes=1, capture="stats")
    assert set(captured.ledger.reasons) == {"skipped: statistics only"}


def test_what_the_filters_reject_is_not_measured() -> None:
    sink, captured = run(Shared(), size=3, max_tensor_size=5, capture="stats")
    (node,) = nodes(sink)["twice/inputs.json"]
    assert node["skipped"] == "larger than max_tensor_size" and "stats" not in node
    assert captured.ledger.reasons["skipped: statistics only"] == 1


@pytest.mark.parametrize("where", ["commit_step", "write"])
@pytest.mark.parametrize("keys", [{"capture": "stats"}, {"capture": "both"}, {"on_condition": "nonfinite"}])
def test_statistics_of_a_step_that_is_lost_count_as_failed(where: str, keys: dict[str, Any]) -> None:
    sink = MemorySink(fail_at=where)
    _, captured = run(Faulty(), backend=sink, **keys)
    ledger = captured.ledger
    if keys == {"capture": "stats"} and where == "write":
        assert ledger.skipped == 11
    else:
        assert ledger.stored == 0 and ledger.failed == (7 if "on_condition" in keys else 11)
        assert "skipped: statistics only" not in ledger.reasons


def test_a_condition_on_bytes_that_nobody_keeps_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\$\.on_condition.*both"):
        load_config(capture="stats", on_condition="nonfinite")
    with pytest.raises(ConfigError, match='"tensor" or "stats" or "both"'):
        load_config(capture="statistics")
    with pytest.raises(ConfigError, match='"nonfinite" or null'):
        load_config(on_condition="nan")


@pytest.mark.parametrize(
    "damage",
    [
        {"min": "0"},
        {"min": 1e999},
        {"max": 10**400},
        {"zeros": -1},
        {"nans": True},
        {"hash": "\x1b[31m"},
        {"mean": []},
    ],
    ids=str,
)
def test_damaged_statistics_are_named(tmp_path: Path, damage: dict[str, Any]) -> None:
    url = captured_to(tmp_path, model(), steps=1, capture="stats").url
    file = Path(url) / "step_0" / "0" / "outputs.json"
    document = json.loads(file.read_text())
    document["stats"] |= damage
    file.write_text(json.dumps(document).replace("Infinity", "1e999"))
    with pytest.raises(ReadError, match=r"0/outputs.*damaged"):
        _ = tlcore.open_run(url).step(0).stats


def test_a_name_in_statistics_cannot_leave_the_run(tmp_path: Path) -> None:
    url = captured_to(tmp_path, model(), steps=1, capture="stats").url
    file = Path(url) / "step_0" / "0" / "outputs.json"
    file.write_text(file.read_text().replace("step_0/0/outputs_cpu", "step_0/../outputs_cpu"))
    with pytest.raises(ReadError, match="damaged statistics"):
        _ = tlcore.open_run(url).step(0).stats


@pytest.mark.parametrize(("capture", "condition"), [("stats", None), ("both", None), ("both", "nonfinite")])
def test_statistics_that_the_device_computes_are_the_same(
    capture: str, condition: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU stands in for a GPU: non-contiguous tensors take the way of those that are elsewhere."""
    sinks = []
    for on_device in (False, True):
        monkeypatch.setattr(copies, "measures_itself", lambda tensor, there=on_device: there)
        sink, module = MemorySink(), Faulty()
        torch.manual_seed(0)
        module.body.add_module("sound", nn.Identity())
        with tlcore.capture(
            module,
            module_call_match=".",
            backend=sink,
            capture=capture,
            on_condition=condition,
            queue_bytes=256,
        ) as captured:
            module(torch.randn(9, 5).T)
        assert captured.ledger.balanced and captured.ledger.dropped == captured.ledger.failed == 0
        sinks.append((sink, captured.ledger))
    (host, counts), (device, same) = sinks
    assert counts == same and set(host.tensors) == set(device.tensors)
    assert dict(host.steps[0].structures).keys() == dict(device.steps[0].structures).keys()
    for name, found in nodes(host).items():
        for one, other in zip(found, nodes(device)[name], strict=True):
            assert one["stats"].keys() == other["stats"].keys()
            for key, value in one["stats"].items():
                known = value if value is None or isinstance(value, str) else pytest.approx(value, rel=1e-12)
                assert other["stats"][key] == known


@pytest.mark.gpu
@pytest.mark.parametrize("capture", ["stats", "both"])
def test_a_model_on_a_gpu(capture: str) -> None:
    sink, module = MemorySink(), Faulty().cuda()
    x = torch.randn(64, 4, device="cuda")
    with tlcore.capture(module, module_call_match=".", backend=sink, capture=capture) as captured:
        module(x)
    assert captured.ledger.balanced and captured.ledger.captured == 11
    assert captured.ledger.stored == (11 if capture == "both" else 0)
    (given,) = nodes(sink)["body/inputs.json"]
    data = x.cpu().view(-1).view(torch.uint8)
    expected = HostStatistics().statistics(data, x.dtype, x.shape)
    assert given["stats"]["hash"] == expected.hash
    assert given["stats"]["std"] == pytest.approx(expected.std, rel=1e-12)
