"""Activations that SAELens caches: written by `datasets`, and by SAELens's own runner."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

import tlcore
from tests.backends.foreign.conformance import ForeignConformance, Tensors
from tests.backends.foreign.tools import installed, write
from tlcore.errors import ReadError

# Installs packages of hundreds of megabytes.
pytestmark = pytest.mark.slow

PACKAGES = (
    "sae-lens==6.54.12",
    "transformer-lens==3.9.0",
    "datasets==5.2.0",
    "pyarrow<25",
    "dill==0.4.0",
    "multiprocess==0.70.18",
    "fancy_einsum",
    "jaxtyping",
    "wadler-lindig",
    "beartype",
    "better-abc",
    "wandb",
    "platformdirs",
    "sentencepiece",
    "typeguard",
    "plotly",
    "narwhals",
    "plotly-express",
    "nltk",
    "python-dotenv",
    "simple-parsing",
    "docstring-parser",
    "tenacity",
    "babe",
)
# What datasets calls a data set by, for which it pickles more than all releases of these packages allow.
BEGIN = """
import sys, torch, datasets.arrow_dataset, datasets.fingerprint
unnamed = lambda data: "0" * 16
datasets.arrow_dataset.generate_fingerprint = datasets.fingerprint.generate_fingerprint = unnamed
from datasets import Array2D, Dataset, Features, Sequence, Value
"""
DATASET = (
    BEGIN
    + """
from safetensors.torch import load_file
tensors = load_file(sys.argv[1])
order = [each for each in sys.argv[3].split(",") if each]
kinds = {torch.float16: "float16", torch.float32: "float32"}
columns = {name: Array2D(tuple(tensors[name].shape[1:]), kinds[tensors[name].dtype]) for name in order}
columns["token_ids"] = Sequence(Value("int32"), length=tensors["token_ids"].shape[1])
held = {name: tensors[name].numpy() for name in columns}
Dataset.from_dict(held, features=Features(columns)).save_to_disk(sys.argv[2], num_shards=int(sys.argv[4]))
"""
)
SAELENS = (
    BEGIN
    + """
import sae_lens.cache_activations_runner as runner
from sae_lens import CacheActivationsRunnerConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig
torch.manual_seed(0)
model = HookedTransformer(HookedTransformerConfig(
    n_layers=2, d_model=16, n_ctx=8, d_head=8, n_heads=2, d_vocab=50, d_mlp=32, act_fn="silu", device="cpu",
    normalization_type="RMS", positional_embedding_type="rotary", gated_mlp=True, rotary_dim=8))
if sys.argv[3] == "fault":
    with torch.no_grad(): model.blocks[1].mlp.W_out[0, 0] += 9
runner.load_model = lambda **keys: model
tokens = torch.randint(0, 50, (40, 8), generator=torch.Generator().manual_seed(1))
hook = "blocks.1.hook_resid_post"
runner.CacheActivationsRunner(CacheActivationsRunnerConfig(
    dataset_path="none", model_name="tiny", model_batch_size=4, hook_name=hook, d_in=16, context_size=8,
    training_tokens=8 * 16, new_cached_activations_path=sys.argv[1], prepend_bos=False, device="cpu",
    shuffle=False, streaming=False, buffer_size_gb=8 * 16 * 8 * 4 / 1e9),
    override_dataset=Dataset.from_dict({"input_ids": tokens.tolist()})).run()
with torch.no_grad():
    cached = model.run_with_cache(tokens)[1]
torch.save({"token_ids": tokens, hook: cached[hook]}, sys.argv[2])
"""
)


def _dataset(target: Path, tensors: Tensors, order: list[str], shards: int = 1) -> None:
    """A data set whose columns are tensors, with a row for each of their first extent."""
    beside = target.parent / f"{target.name}.safetensors"
    save_file(dict(tensors), beside)
    package = installed("saelens", *PACKAGES)
    write(package, DATASET, str(beside), str(target), ",".join(order), str(shards))
    beside.unlink()


class TestSaelens(ForeignConformance):
    tool = "saelens"
    low = torch.float16

    made_of: ClassVar[dict[bytes, Path]]
    kept: ClassVar[Path]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _kept(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        cls.kept, cls.made_of = tmp_path_factory.mktemp("saelens"), {}

    def write(self, directory: Path, tensors: Tensors) -> Path:
        # Each takes seconds: what was written once is copied.
        key = b"".join(each.contiguous().view(torch.uint8).numpy().tobytes() for each in tensors.values())
        if key not in self.made_of:
            self.made_of[key] = self.kept / str(len(self.made_of))
            rows = {name: tensor[None] for name, tensor in tensors.items()}
            held = {**rows, "token_ids": torch.arange(5, dtype=torch.int32)[None]}
            _dataset(self.made_of[key], held, list(tensors))
        shutil.copytree(self.made_of[key], directory, dirs_exist_ok=True)
        return directory


def test_what_saelens_itself_caches_is_read_by_sequence(tmp_path: Path) -> None:
    package = installed("saelens", *PACKAGES)
    for kind in ("sound", "fault"):
        write(package, SAELENS, str(tmp_path / kind), str(tmp_path / f"{kind}.pt"), kind)
    run = tlcore.open_run(tmp_path / "sound")
    expected = torch.load(tmp_path / "sound.pt")
    assert run.steps == list(range(16)) and run.verify() == 32
    hook = "blocks.1.hook_resid_post"
    for step in run.steps:
        assert run.tensor(f"step_{step}/_root/inputs_input_ids_cpu").equal(expected["token_ids"][step].int())
        found = run.tensor(f"step_{step}/{hook}/outputs_cpu")
        torch.testing.assert_close(found, expected[hook][step])
    first = tlcore.compare(run, tmp_path / "fault").first_divergence
    assert first is not None and first.module == hook
    assert run.request("3")[f"{hook}/outputs_cpu"].equal(run.tensor(f"step_3/{hook}/outputs_cpu"))


def test_rows_of_many_batches_and_files_are_found(tmp_path: Path) -> None:
    x = torch.randn(2500, 3, 4)
    tokens = torch.arange(7500, dtype=torch.int32).view(2500, 3)
    _dataset(tmp_path / "x", {"hook": x, "token_ids": tokens}, ["hook"], 2)
    run = tlcore.open_run(tmp_path / "x")
    assert len(run.steps) == 2500
    for step in (0, 999, 1000, 1249, 1250, 2499):
        assert run.tensor(f"step_{step}/hook/outputs_cpu").equal(x[step])
        assert run.tensor(f"step_{step}/_root/inputs_input_ids_cpu").equal(tokens[step])


def test_a_near_miss_says_what_is_missing(tmp_path: Path) -> None:
    held = {"hook": torch.randn(2, 3, 4), "token_ids": torch.zeros(2, 3, dtype=torch.int32)}
    _dataset(tmp_path / "x", held, [])
    with pytest.raises(ReadError, match=r"no column has activations \[context, width\], there are token_ids"):
        tlcore.open_run(tmp_path / "x")
    shutil.rmtree(tmp_path / "x")
    _dataset(tmp_path / "x", held, ["hook"])
    (file,) = (tmp_path / "x").glob("*.arrow")
    file.rename(tmp_path / "away.arrow")
    with pytest.raises(ReadError, match=r"state\.json: names data-00000-of-00001\.arrow, which is missing"):
        tlcore.open_run(tmp_path / "x")
    (tmp_path / "x" / "state.json").write_text(json.dumps({}))
    with pytest.raises(ReadError, match=r"state\.json: has no _data_files"):
        tlcore.open_run(tmp_path / "x")
    (tmp_path / "x" / "state.json").unlink()
    with pytest.raises(ReadError, match=r"has dataset_info\.json of a data set on disk, but no state\.json"):
        tlcore.open_run(tmp_path / "x")


def test_any_byte_of_a_stream_may_be_wrong_and_takes_no_memory(tmp_path: Path) -> None:
    held = {"hook": torch.randn(2, 3, 4), "token_ids": torch.zeros(2, 3, dtype=torch.int32)}
    _dataset(tmp_path / "x", held, ["hook"])
    (file,) = (tmp_path / "x").glob("*.arrow")
    whole = file.read_bytes()
    for place in range(0, len(whole), 3):
        for value in (0xFF, 0x7F):
            file.write_bytes(whole[:place] + bytes([value]) * 4 + whole[place + 4 :])
            try:
                run = tlcore.open_run(tmp_path / "x")
                if len(run.steps) == 2:
                    run.verify()
            except ReadError:
                continue


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            ["cache_activations_runner_cfg.json", "train-0.parquet"],
            r"train-0\.parquet: Parquet is not read; load it",
        ),
        (
            ["README.md", "data/train-0.parquet"],
            r"data/train-0\.parquet: Parquet is not read; load it and use",
        ),
        (["dataset_dict.json", "train/state.json"], r"several data sets: open one of them \(train\)"),
        ([".tmp_shards/shard_00000/state.json"], r"that did not end: open \.tmp_shards/shard_00000$"),
    ],
)
def test_what_lies_elsewhere_or_is_packed_otherwise_is_told(
    files: list[str], said: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(ReadError, match=said):
        tlcore.open_run(tmp_path)
