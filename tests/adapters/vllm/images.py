"""A tiny model that reads images, its requests, and what transformers computes of them in float32.

An image is cut into tiles, and stands for four tokens a tile, with others between them; asked for small, it
is one tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.models import write_tokenizer

TILE, TILE_TOKENS = 32, 4
SMALL = {"size": {"longest_edge": TILE}}
_SPECIAL = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
_TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


@dataclass(frozen=True)
class Asked:
    """A request: text before, between and behind its images, each the seed and size of one."""

    text: Sequence[int]
    images: Sequence[tuple[int, int, int]] = ()
    small: bool = False

    def pictures(self) -> list[Image.Image]:
        return [
            Image.fromarray(np.random.default_rng(seed).integers(0, 256, (high, wide, 3), dtype=np.uint8))
            for seed, high, wide in self.images
        ]

    def prompt(self, image_token: int) -> dict[str, Any]:
        """As vLLM takes it."""
        ids = [self.text[0]]
        for token in self.text[1 : 1 + len(self.images)]:
            ids += [image_token, token]
        found: dict[str, Any] = {"prompt_token_ids": ids + list(self.text[1 + len(self.images) :])}
        if self.images:
            found["multi_modal_data"] = {"image": self.pictures()}
            found["mm_processor_kwargs"] = SMALL if self.small else {}
        return found


# One image and several, none, of one size and of others, and one that two requests share.
MIXED = [
    Asked([5, 6, 7, 8], [(1, 28, 56), (2, 40, 40)]),
    Asked([9, 10, 11]),
    Asked([12, 13, 14], [(3, 28, 56)]),
    Asked([15, 16], [(4, 40, 40)], small=True),
    Asked([17, 18, 19], [(5, 28, 56)]),
    Asked([20, 21, 22], [(2, 40, 40)]),
]
# Tiles, images and requests are as many.
SMALLS = [Asked([5 + i, 30 + i], [(10 + i, 32, 32)], small=True) for i in range(3)]


def write_model(directory: Path) -> None:
    """A random model with images, and its processor."""
    from transformers import (
        AutoTokenizer,
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3Processor,
    )
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    write_tokenizer(directory)
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    tokenizer.add_tokens([*_SPECIAL, *_TILES], special_tokens=True)
    text = {
        "model_type": "llama", "vocab_size": 640, "hidden_size": 128, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": TILE, "patch_size": 8,
    }  # fmt: skip
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        text_config=text,
        vision_config=vision,
        scale_factor=2,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Idefics3ForConditionalGeneration(config).float()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
    model.save_pretrained(directory)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * TILE}, max_image_size={"longest_edge": TILE})
    Idefics3Processor(images, tokenizer, image_seq_len=TILE_TOKENS).save_pretrained(directory)


class ImageTruth:
    """The model's own tiles, image features and last states."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @cached_property
    def _model(self) -> Any:
        from transformers import Idefics3ForConditionalGeneration

        return Idefics3ForConditionalGeneration.from_pretrained(str(self._directory), dtype=torch.float32)

    def inputs(self, asked: Asked) -> dict[str, torch.Tensor]:
        """The tiles of a request's images, one after the other."""
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

        made = Idefics3ImageProcessorPil.from_pretrained(str(self._directory))
        found = made([asked.pictures()], return_tensors="pt", **(SMALL if asked.small else {}))
        return {key: found[key] for key in ("pixel_values", "pixel_attention_mask")}

    def tiles(self, asked: Asked) -> torch.Tensor:
        return self.inputs(asked)["pixel_values"][0] if asked.images else torch.empty(0, 3, TILE, TILE)

    def features(self, asked: Asked) -> torch.Tensor:
        """What the images are turned into: [tiles, tokens, size]."""
        with torch.inference_mode():
            found = self._model.model.get_image_features(**self.inputs(asked), return_dict=True)
        return torch.as_tensor(found.pooler_output)

    def states(self, asked: Asked, tokens: Sequence[int]) -> torch.Tensor:
        """The last hidden state of each position."""
        more = self.inputs(asked) if asked.images else {}
        with torch.inference_mode():
            found = self._model(torch.tensor([list(tokens)]), output_hidden_states=True, **more)
        return torch.as_tensor(found.hidden_states[-1][0])
