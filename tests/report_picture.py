"""The README's picture of the HTML report: ``python -m tests.report_picture [FILE]`` makes it again.

SmolLM2 runs a prompt twice, the second time with another epsilon in one norm.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import tlcore
from tests.browser import launched, opened
from tests.models import smollm2
from tlcore.analysis.report import page
from tlcore.analysis.report.tokens import load_tokenizer

PICTURE = Path(__file__).parents[1] / "examples" / "report.png"
PROMPT = "The first layer where two runs part is the one to look at; all behind it only passes it on."
_MODULES = [r"layers\.\d+$", r"layers\.1[123]\.(input_layernorm|post_attention_layernorm|mlp|self_attn)$"]
_SIZE = {"width": 1120, "height": 760}


def report(directory: Path) -> Path:
    """The report on the two runs, both below a directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2())
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    batch = tokenizer(PROMPT, return_tensors="pt")
    urls = []
    for epsilon in (1e-5, 0.03):
        model.model.layers[12].post_attention_layernorm.variance_epsilon = epsilon
        options: dict[str, Any] = {"module_call_match": _MODULES, "backend": "safetensors"}
        with torch.inference_mode(), tlcore.capture(model, output_dir=str(directory), **options) as capture:
            model(**batch)
        urls.append(capture.url)
    file = directory / "report.html"
    file.write_text(page(tlcore.compare(*urls), load_tokenizer(str(smollm2()))), encoding="utf-8")
    return file


def draw(target: Path) -> None:
    """Write the picture: the map, with its first divergence."""
    with tempfile.TemporaryDirectory(prefix="tlcore-picture-") as name:
        file = report(Path(name))
        with launched() as browser, opened(browser, file) as (shown, troubles):
            shown.set_viewport_size(_SIZE)
            section = shown.locator("section", has=shown.locator("#map"))
            # A cell of the first divergence is told, not the equal one that comes first.
            shown.locator("#goto").click()
            for _ in range(4):
                shown.keyboard.press("ArrowRight")
            shown.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            section.screenshot(path=target)
    assert troubles == []


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
