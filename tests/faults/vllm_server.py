"""A vLLM server with capture on, its processes, and many requests at once."""

from __future__ import annotations

import concurrent.futures
import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tlcore
from tests.adapters.vllm.server import VllmServer, serving
from tests.models import tiny_llama
from tlcore.reader import list_runs


@dataclass
class Served:
    """A running server, and where its run lies, with the storage_options of a URL."""

    server: VllmServer
    url: str
    options: dict[str, Any] | None = None

    @property
    def directory(self) -> Path:
        """The directory of a run on the local disk."""
        return Path(self.url)

    def run(self) -> tlcore.Run:
        """The run as far as it is stored by now."""
        return tlcore.open_run(self.url, self.options)

    def process_id(self, title: str) -> int:
        """The id of the server's process that calls itself ``VLLM::EngineCore`` or ``VLLM::Worker``."""
        found = {title_of(pid): pid for pid in descendants(self.server.process.pid)}
        matching = [pid for text, pid in found.items() if title in text]
        assert len(matching) == 1, found
        return matching[0]

    def complete(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        """One greedy completion; raises OSError when the server does not answer."""
        body = {"model": str(tiny_llama()), "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(
            f"{self.server.url}/v1/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            result: dict[str, Any] = json.load(answer)
        return result

    def many(self, count: int, at_once: int, tokens: int) -> list[dict[str, Any] | None]:
        """``count`` completions of different lengths, ``at_once`` at a time; None where one failed."""

        def one(number: int) -> dict[str, Any] | None:
            try:
                return self.complete([3 + (number + i) % 500 for i in range(4 + number % 9)], tokens)
            except OSError:
                return None

        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(one, range(count)))


def descendants(pid: int) -> Iterator[int]:
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            yield child
            yield from descendants(child)


def title_of(pid: int) -> str:
    """A process's name for itself; nothing for one that has gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""


@contextmanager
def served(
    directory: Path, config: dict[str, Any], options: dict[str, Any] | None = None
) -> Iterator[Served]:
    """The OpenAI-compatible server over the tiny model, from the moment it answers; then ended.

    Where the configuration has a backend at a URL, the run there is read with ``options``.
    """
    backend = config.get("backend")
    place = backend["url"] if isinstance(backend, dict) and "url" in backend else str(directory / "dumps")
    settings: dict[str, Any] = {
        "model": str(tiny_llama()),
        "enforce-eager": True,
        "max-model-len": 256,
        "no-enable-prefix-caching": True,
        # Few enough that soon each has been used: a block's memory is taken at its first use.
        "num-gpu-blocks-override": 256,
        "intermediate-log-config": {"log_step_ids": [], **config},
    }
    if "://" not in place:
        settings["intermediate-log-config"]["output_dir"] = place
    with serving(directory, settings) as server:
        (run,) = list_runs(place, options)
        yield Served(server, run.path, options)
