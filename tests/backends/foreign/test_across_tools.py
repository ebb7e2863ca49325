"""A Llama's fault, found between a capture and each tool's dump, which has the names of the tool."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tlcore
from tests.backends.foreign import (
    test_msprobe,
    test_nxd,
    test_polygraphy,
    test_saelens,
    test_sglang,
    test_transformer_engine,
    test_transformers_debugger,
)

TOKENS = [5, 3, 9, 1, 7, 2]
FAULT = "model.layers.1.mlp.down_proj"
Tensors = dict[str, torch.Tensor]


def _llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 50, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()


def _captured(directory: Path, fault: bool = False) -> tuple[str, Tensors]:
    """A capture of all modules, and what each gave."""
    model = _llama()
    if fault:
        with torch.no_grad():
            model.get_submodule(FAULT).weight[0] += 1
    with torch.no_grad(), tlcore.capture(model, output_dir=str(directory)) as capture:
        model(torch.tensor([TOKENS]))
    step = tlcore.open_run(str(capture.url)).step(0)
    outputs = {
        str(each["module"]): step.tensor(each["name"])
        for each in step.records
        if each["direction"] == "outputs" and each["module"] and str(each["module"]) != "model"
    }
    return str(capture.url), {name: each for name, each in outputs.items() if "rotary" not in name}


def _named(tensors: Tensors, *rows: tuple[str, str]) -> Tensors:
    """Those that a row is for, under its name."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rows:
            if re.fullmatch(pattern, name):
                found[re.sub(f"^{pattern}$", replacement, name)] = tensor
    return found


def _sglang_folder(directory: Path, tensors: Tensors) -> Path:
    """Leaves, without a batch's dimension; norms give the normed state and the residual."""
    held: dict[str, Any] = {
        name: [each[0], each[0] * 3] if "post_attention_layernorm" in name else each[0]
        for name, each in tensors.items()
        if name.rpartition(".")[2] not in ("mlp", "self_attn")
        and not re.fullmatch(r"model\.layers\.\d+", name)
    }
    batch = test_sglang._batch(TOKENS, list(range(6)), [6])
    return test_sglang.TestFolder.written(directory, {**held, **batch})


def _sglang_dumper(directory: Path, tensors: Tensors) -> Path:
    batch = {"input_ids": TOKENS, "positions": list(range(6)), "seq_lens": [6]}
    for index, (name, values) in enumerate(batch.items()):
        test_sglang._dumped(directory, name, torch.tensor(values), index)
    for index, (name, tensor) in enumerate(tensors.items(), 10):
        test_sglang._dumped(directory, f"non_intrusive__{name}.output", tensor[0], index)
    return directory


def _megatron(directory: Path, tensors: Tensors) -> Path:
    """SGLang's dumper within Megatron, which has [tokens, samples, width]."""
    for index, (name, tensor) in enumerate(_in_megatron(tensors).items()):
        test_sglang._dumped(directory, f"non_intrusive__{name}.output", tensor.transpose(0, 1), index)
    return directory


def _in_megatron(tensors: Tensors) -> Tensors:
    layer = r"model\.layers\.(\d+)"
    return _named(
        tensors,
        (r"model\.embed_tokens", "module.module.embedding.word_embeddings"),
        (layer, r"module.module.decoder.layers.\1"),
        (rf"{layer}\.input_layernorm", r"module.module.decoder.layers.\1.input_layernorm"),
        (rf"{layer}\.post_attention_layernorm", r"module.module.decoder.layers.\1.pre_mlp_layernorm"),
        (rf"{layer}\.self_attn\.o_proj", r"module.module.decoder.layers.\1.self_attention.linear_proj"),
        (rf"{layer}\.mlp\.down_proj", r"module.module.decoder.layers.\1.mlp.linear_fc2"),
        (r"model\.norm", "module.module.decoder.final_layernorm"),
        (r"lm_head", "module.module.output_layer"),
    )


def _transformer_engine(directory: Path, tensors: Tensors) -> Path:
    """TransformerEngine is given the layers' names by Megatron."""
    named = {name: tensor.transpose(0, 1) for name, tensor in _in_megatron(tensors).items()}
    return test_transformer_engine.TestTransformerEngine().write(directory, named)


def _msprobe(directory: Path, tensors: Tensors) -> Path:
    named = {f"module.{name}": each for name, each in tensors.items()}
    return test_msprobe.TestMsprobe().write(directory, named)


def _polygraphy(directory: Path, tensors: Tensors) -> Path:
    layer = r"model\.layers\.(\d+)"
    named = _named(
        tensors,
        (r"model\.embed_tokens", "/model/embed_tokens/Gather_output_0"),
        (rf"{layer}\.self_attn\.o_proj", r"/model/layers.\1/self_attn/o_proj/MatMul_output_0"),
        (rf"{layer}\.mlp\.(\w+)_proj", r"/model/layers.\1/mlp/\2_proj/MatMul_output_0"),
        (r"lm_head", "logits"),
    )
    return test_polygraphy.TestPolygraphy().write(directory, named)


def _nxd(directory: Path, tensors: Tensors) -> Path:
    """The model that is captured is the one within."""
    named = {name.removeprefix("model."): each for name, each in tensors.items()}
    return test_nxd.TestNeuronCapture().write(directory, named)


def _saelens(directory: Path, tensors: Tensors) -> Path:
    hooks = _named(
        tensors,
        (r"model\.layers\.(\d+)\.mlp", r"blocks.\1.hook_mlp_out"),
        (r"model\.layers\.(\d+)", r"blocks.\1.hook_resid_post"),
    )
    held = {**hooks, "token_ids": torch.tensor([TOKENS], dtype=torch.int32)}
    test_saelens._dataset(directory / "data", held, list(hooks))
    return directory / "data"


def _states(tensors: Tensors) -> Tensors:
    """What vLLM's extraction stores of one request: chosen layers side by side, and its tokens."""
    layers = [tensors[f"model.layers.{layer}"][0] for layer in range(3)]
    return {"hidden_states": torch.stack(layers, 1), "token_ids": torch.tensor(TOKENS)}


def _hidden_states(directory: Path, tensors: Tensors) -> Path:
    save_file(_states(tensors), directory / "cmpl-7.safetensors")
    return directory


def _speculators(directory: Path, tensors: Tensors) -> Path:
    (directory / "hidden_states").mkdir()
    save_file(_states(tensors), directory / "hidden_states" / "hs_0.safetensors")
    return directory


def _safetensors(directory: Path, tensors: Tensors) -> Path:
    save_file({name: each.contiguous() for name, each in tensors.items()}, directory / "any.safetensors")
    return directory / "any.safetensors"


def _npz(directory: Path, tensors: Tensors) -> Path:
    arrays: dict[str, Any] = {name: each.numpy() for name, each in tensors.items()}
    np.savez(directory / "any.npz", **arrays)
    return directory / "any.npz"


def _torch(directory: Path, tensors: Tensors) -> Path:
    torch.save({name: {"output": each} for name, each in tensors.items()}, directory / "any.pt")
    return directory / "any.pt"


WRITERS: dict[str, tuple[Callable[[Path, Tensors], Path], str, int]] = {
    "sglang-folder": (_sglang_folder, FAULT, 20),
    "sglang-dumper": (_sglang_dumper, FAULT, 30),
    "megatron": (_megatron, FAULT, 18),
    "transformer-engine": (_transformer_engine, FAULT, 18),
    "msprobe": (_msprobe, FAULT, 30),
    "polygraphy": (_polygraphy, FAULT, 14),
    "nxd-capture": (_nxd, FAULT, 30),
    "saelens": (_saelens, "model.layers.1.mlp", 6),
    "safetensors": (_safetensors, FAULT, 30),
    "npz": (_npz, FAULT, 30),
    "pt": (_torch, FAULT, 30),
}
# The files do not tell which layers these are.
STATES = {"hidden-states": _hidden_states, "speculators": _speculators}
LAYERS = (
    r"^model\.layers\.(\d+)$=hidden_states.\1",
    r"^hidden_states\.(\d+)$=model.layers.\1",
)
SLOW = ("saelens",)
AS_TRANSFORMERS = ("sglang-folder", "sglang-dumper", "safetensors", "npz", "pt")


@pytest.mark.parametrize(
    "tool", [pytest.param(each, marks=[pytest.mark.slow] if each in SLOW else []) for each in WRITERS]
)
def test_a_fault_is_found_under_the_names_of_the_other_tool(tmp_path: Path, tool: str) -> None:
    write, expected, least = WRITERS[tool]
    url, sound = _captured(tmp_path / "a")
    faulty = _captured(tmp_path / "b", fault=True)[1]
    for name in ("sound", "faulty"):
        (tmp_path / name).mkdir()
    dumps = write(tmp_path / "sound", sound), write(tmp_path / "faulty", faulty)
    clean = tlcore.compare(url, dumps[0], ignore_missing=True)
    assert clean.equal and len(clean.results) >= least, str(clean)
    for pair in ((url, dumps[1]), (dumps[1], url)):
        first = tlcore.compare(*pair, ignore_missing=True).first_divergence
        assert first is not None and first.module == expected
    if tool not in AS_TRANSFORMERS:
        assert any("modules are called differently" in str(note) for note in clean.notes)


@pytest.mark.parametrize("tool", STATES)
def test_a_fault_is_found_in_the_layers_whose_states_were_extracted(tmp_path: Path, tool: str) -> None:
    url, sound = _captured(tmp_path / "a")
    faulty = _captured(tmp_path / "b", fault=True)[1]
    dumps = []
    for name, tensors in (("sound", sound), ("faulty", faulty)):
        (tmp_path / name).mkdir()
        dumps.append(STATES[tool](tmp_path / name, tensors))
    for place, other in enumerate(LAYERS):
        pairs = [(url, each) if place == 0 else (each, url) for each in dumps]
        clean = tlcore.compare(*pairs[0], maps=[other], ignore_missing=True)
        assert clean.equal and len(clean.results) == 4, str(clean)
        first = tlcore.compare(*pairs[1], maps=[other], ignore_missing=True).first_difference
        assert first is not None and first.result.module in ("hidden_states.1", "model.layers.1")


@pytest.mark.slow
def test_a_fault_is_found_against_the_debugger_of_transformers(tmp_path: Path) -> None:
    url = _captured(tmp_path / "a")[0]
    dumps = []
    for name in ("sound", "faulty"):
        model = _llama()
        if name == "faulty":
            with torch.no_grad():
                model.get_submodule(FAULT).weight[0] += 1
        dumps.append(tmp_path / name)
        test_transformers_debugger.debug(model, dumps[-1], torch.tensor([TOKENS]))
    assert tlcore.compare(url, dumps[0], ignore_missing=True).equal
    for pair in ((url, dumps[1]), (dumps[1], url)):
        first = tlcore.compare(*pair, ignore_missing=True).first_divergence
        assert first is not None and first.module == FAULT
