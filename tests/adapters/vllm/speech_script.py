"""Captures requests of an encoder and decoder together, in another order and alone, and prints a JSON line.

``python speech_script.py OUTPUT_DIR``
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.adapters.vllm.helpers import answered, say_and_end
from tests.models import write_tokenizer

RATE = 16_000
# Of each request the decoder's prompt.
PROMPTS = [[512, 20], [512, 513, 21], [512, 513, 514, 22]]


def write_model(directory: Path) -> None:
    """A random Whisper of two layers, and its processor."""
    from transformers import (
        AutoTokenizer,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
    )

    write_tokenizer(directory)
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    tokenizer.add_special_tokens({"pad_token": "</s>"})
    tokenizer.add_tokens(["<|startoftranscript|>", "<|en|>", "<|transcribe|>"], special_tokens=True)
    sounds = WhisperFeatureExtractor(
        feature_size=16, sampling_rate=RATE, hop_length=160, chunk_length=1, n_fft=400
    )
    WhisperProcessor(sounds, tokenizer).save_pretrained(directory)
    config = WhisperConfig(
        vocab_size=640,
        num_mel_bins=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        d_model=64,
        max_source_positions=50,
        max_target_positions=64,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(config).float()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
    model.save_pretrained(directory)


def main(output_dir: str) -> dict[str, Any]:
    """A run of all, one of all in another order, one with other sounds, and one of each request alone."""
    from vllm import LLM, SamplingParams

    import tlcore.vllm

    model = Path(output_dir) / "model"
    model.mkdir()
    write_model(model)
    llm = LLM(str(model), dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=4)
    sampling = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)

    def capture(chosen: Sequence[int], first_seed: int = 0) -> dict[str, Any]:
        asked: list[Any] = [
            {
                "encoder_prompt": {
                    "prompt": "",
                    "multi_modal_data": {"audio": (_sound(first_seed + each), RATE)},
                },
                "decoder_prompt": {"prompt_token_ids": PROMPTS[each]},
            }
            for each in chosen
        ]
        with tlcore.vllm.attach(llm, output_dir=output_dir, log_step_ids=[]) as attached:
            outputs = llm.generate(asked, sampling, use_tqdm=False)
        return answered(attached.url, outputs)

    every = range(len(PROMPTS))
    return {
        "all": capture(every),
        "turned": capture(every[::-1]),
        "other": capture(every, 10),
        "alone": [capture([each]) for each in every],
    }


def _sound(seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal(RATE).astype("float32")


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    say_and_end(main(*sys.argv[1:]))
