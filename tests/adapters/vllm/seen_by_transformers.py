"""A tiny LLaVA that vLLM runs by transformers' code, its requests with images, and what is right of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.models import write_tokenizer

SIZE, IMAGE = 32, "<image>"
# Text tokens, of which an image stands before each but the first, and the seeds of the images.
ASKED: list[tuple[list[int], list[int]]] = [
    ([5, 7, 8], [1]),
    ([9, 10, 11, 12], []),
    ([13, 14, 15], [2, 3]),
    ([16, 17], [1]),
]


def pictures(seeds: Sequence[int]) -> list[Image.Image]:
    """Random images, one a seed."""
    shape = (SIZE, SIZE, 3)
    return [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)) for seed in seeds
    ]


def _image_processor() -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def write_model(directory: Path) -> None:
    """A random checkpoint in float32, and its processor."""
    from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    write_tokenizer(directory)
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    text = {
        "model_type": "llama", "vocab_size": 640, "hidden_size": 128, "intermediate_size": 128,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8, "projection_dim": 64,
    }  # fmt: skip
    token = tokenizer.convert_tokens_to_ids(IMAGE)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=token, vision_feature_layer=-1
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        LlavaForConditionalGeneration(config).float().save_pretrained(directory)
    LlavaProcessor(
        _image_processor(), tokenizer, patch_size=8, vision_feature_select_strategy="default",
        image_token=IMAGE, num_additional_image_tokens=1,
    ).save_pretrained(directory)  # fmt: skip


class SeenTruth:
    """The checkpoint's own states in float32."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint

    @cached_property
    def _model(self) -> Any:
        from transformers import LlavaForConditionalGeneration

        return LlavaForConditionalGeneration.from_pretrained(str(self._checkpoint), dtype=torch.float32)

    def of(self, tokens: Sequence[int], seeds: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """The hidden states of each layer: ``[positions, size]``."""
        given = dict(_image_processor()(pictures(seeds), return_tensors="pt")) if seeds else {}
        with torch.inference_mode():
            found = self._model(torch.tensor([list(tokens)]), output_hidden_states=True, **given)
        return tuple(each[0] for each in found.hidden_states)
