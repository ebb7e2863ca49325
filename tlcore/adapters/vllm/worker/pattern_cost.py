"""Patterns that came over HTTP: none may take the engine longer than a moment.

A regular expression may take longer than anybody waits, and nothing interrupts one. So they are tried on the
model's own names first, in a process that ends when its processor time is used up.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator

from ....config.configuration import Config
from ....config.patterns import parse_pattern
from ....errors import CaptureError, ConfigError

# For all patterns of a configuration together: the engine then tries them once more, and its requests wait.
_PROCESSOR_S = 0.2
# Of a machine that is busy with much else.
_LONGEST_S = 120.0
# Says which pattern it is about to try. The timer ends it where it is, in the middle of one; whoever began it
# may have ignored its signal, or kept it back.
_TRY = f"""
import json, re, signal, sys
patterns, names = json.load(sys.stdin)
signal.signal(signal.SIGPROF, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
signal.setitimer(signal.ITIMER_PROF, {_PROCESSOR_S})
for number, text in enumerate(patterns):
    print(number, flush=True)
    pattern = re.compile(text)
    for name in names:
        pattern.search(name)
print("over", flush=True)
"""


def check_cost(config: Config, names: Iterable[str]) -> None:
    """Raise ConfigError where patterns take too long on these names, CaptureError where none is tried."""
    patterns = list(_patterns(config))
    if not patterns:
        return
    last = _last_tried(tuple(text for _, text in patterns), tuple(sorted(names)))
    if last is not None:
        path = patterns[last][0]
        problem = f"the pattern takes more than {_PROCESSOR_S} s, with those before it, on the model's names."
        raise ConfigError(path, problem, "Repeat nothing that repeats or chooses by itself, as (a+)+ does.")


# A client may ask for the same again and again.
@functools.lru_cache(maxsize=16)
def _last_tried(patterns: tuple[str, ...], names: tuple[str, ...]) -> int | None:
    """The pattern that used up the time; None where all were tried. Raises CaptureError."""
    command = (sys.executable, "-I", "-S", "-c", _TRY)
    given = json.dumps([patterns, names])
    try:
        tried = subprocess.run(command, input=given, capture_output=True, text=True, timeout=_LONGEST_S)
        said = tried.stdout.split()
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CaptureError(f"the patterns of the configuration could not be tried: {error}") from None
    if not said:
        raise CaptureError(f"the patterns of the configuration could not be tried: {tried.stderr[-500:]}")
    return None if said[-1] == "over" else int(said[-1])


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
