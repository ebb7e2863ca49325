"""Run a few prompts through vLLM's engine with any engine option, the capture of tensors included.

    python3 ./examples/offline_inference/llm_engine_example.py --model HuggingFaceTB/SmolLM2-135M \
        --enforce-eager --intermediate-log-config '{"enabled": true}'

The captured tensors lie in /tmp/vllm_intermediates/<run id>; `tlcore ls` lists them.
"""

from __future__ import annotations

import argparse

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser

PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "The first three prime numbers are",
    "A neural network learns by",
]


def parse_arguments() -> argparse.Namespace:
    """vLLM's own engine options and two of this example."""
    parser = FlexibleArgumentParser(description="Generate a few completions with vLLM's engine.")
    parser = EngineArgs.add_cli_args(parser)
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens to generate for each prompt")
    parser.add_argument("--prompt", action="append", help="a prompt of your own (repeat for several)")
    arguments: argparse.Namespace = parser.parse_args()
    return arguments


def main() -> None:
    """Queue all prompts, then step the engine until every one is answered."""
    arguments = parse_arguments()
    engine = LLMEngine.from_engine_args(EngineArgs.from_cli_args(arguments))
    sampling = SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens)
    prompts = arguments.prompt or PROMPTS
    for number, prompt in enumerate(prompts):
        engine.add_request(f"request-{number}", prompt, sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                print(f"{output.request_id}: {output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
