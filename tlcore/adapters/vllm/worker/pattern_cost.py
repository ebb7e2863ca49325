"""Patterns that came over HTTP: none may take the engine longer than a moment.

A regular expression may take longer than anybody waits, and nothing interrupts one. So they are tried on the
model's own names first, in a process that ends when its processor time is used up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator

from ....config.configuration import Config
from ....config.patterns import parse_pattern
from ....errors import CaptureError, ConfigError

_PROCESSOR_S = 2
# Of a machine that is busy with much else.
_LONGEST_S = 120.0
# Says which pattern it is about to try.
_TRY = f"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({_PROCESSOR_S}, {_PROCESSOR_S}))
patterns, names = json.load(sys.stdin)
for number, text in enumerate(patterns):
    print(number, flush=True)
    pattern = re.compile(text)
    for name in names:
        pattern.search(name)
print("over", flush=True)
"""


def check_cost(config: Config, names: Iterable[str]) -> None:
    """Raise ConfigError where a pattern takes too long on these names, CaptureError where none is tried."""
    patterns = list(_patterns(config))
    if not patterns:
        return
    given = json.dumps([[text for _, text in patterns], sorted(names)])
    command = (sys.executable, "-I", "-S", "-c", _TRY)
    try:
        tried = subprocess.run(command, input=given, capture_output=True, text=True, timeout=_LONGEST_S)
        said = tried.stdout.split()
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CaptureError(f"the patterns of the configuration could not be tried: {error}") from None
    if not said:
        raise CaptureError(f"the patterns of the configuration could not be tried: {tried.stderr[-500:]}")
    if said[-1] != "over":
        path = patterns[int(said[-1])][0]
        problem = f"the pattern takes more than {_PROCESSOR_S} s on the names of the model's modules."
        raise ConfigError(path, problem, "Repeat nothing that repeats or chooses by itself, as (a+)+ does.")


def _patterns(config: Config) -> Iterator[tuple[str, str]]:
    """The patterns that are held against names, each with its path."""
    injected = () if config.inject is None else config.inject.modules
    for key, texts in (
        ("module_call_match", config.module_call_match),
        ("ops", config.ops),
        ("inject.modules", injected),
    ):
        for place, text in enumerate(texts or ()):
            path = f"$.{key}[{place}]"
            yield path, parse_pattern(text, path)[0].pattern
