"""Engines one after the other in one process, captured in every way; the last one's worker is killed.

``python lives_script.py OUTPUT_DIR``; prints one JSON line.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

REPOSITORY = str(Path(__file__).parents[3])


def processes() -> dict[int, str]:
    """The engines and workers that run below this process, by their titles."""
    from tests.faults.vllm_server import descendants, title_of

    titles = {pid: title_of(pid) for pid in descendants(os.getpid())}
    return {pid: text for pid, text in titles.items() if "VLLM::" in text}


def engine(**keys: Any) -> Any:
    from vllm import LLM

    from tests.models import tiny_llama

    return LLM(str(tiny_llama()), enforce_eager=True, max_model_len=256, max_num_seqs=4, **keys)


def main(output_dir: str) -> dict[str, Any]:
    """Attach, generate and let go of the engine; another with the flag, and a death."""
    from vllm import SamplingParams

    import tlcore.vllm
    from tests.waiting import wait_until

    sampling = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    prompt: Any = {"prompt_token_ids": [3, 4, 5]}
    report: dict[str, Any] = {"left": [], "detached": [], "attached": []}

    def generate(llm: Any) -> None:
        llm.generate([prompt], sampling, use_tqdm=False)

    def ended() -> None:
        gc.collect()
        wait_until(lambda: not processes(), "the engine's processes have ended", 90)
        report["left"].append(processes())

    llm = engine()
    with tlcore.vllm.attach(llm, {"output_dir": output_dir}) as detached:
        generate(llm)
    attached = tlcore.vllm.attach(llm, {"output_dir": output_dir})
    generate(llm)
    del llm
    ended()
    report["detached"] = [detached.status().to_json(), detached.detach().to_json()]
    report["attached"] = [attached.status().to_json(), attached.detach().to_json()]

    llm = engine(intermediate_log_config={"output_dir": output_dir})
    generate(llm)
    llm.collective_rpc("tlcore_stop")
    attached = tlcore.vllm.attach(llm, {"output_dir": output_dir, "log_step_ids": []})
    generate(llm)
    # The worker writes behind the model, which may be done before anything lies there.
    wait_until(lambda: tlcore.open_run(str(attached.status().url)).steps, "a step of the run is stored", 60)
    (worker,) = (pid for pid, text in processes().items() if "Worker" in text)
    os.kill(worker, signal.SIGKILL)
    try:
        generate(llm)
    except Exception as error:
        report["generate"] = type(error).__name__
    report["lost"] = [worker, attached.status().to_json(), attached.detach().to_json()]
    try:
        attached.change(output_dir=output_dir)
    except tlcore.CaptureError as error:
        report["change"] = str(error)
    del llm
    ended()
    return report


if __name__ == "__main__":
    sys.path.insert(0, REPOSITORY)
    sys.stdout.write(f"REPORT {json.dumps(main(sys.argv[1]))}\n")
