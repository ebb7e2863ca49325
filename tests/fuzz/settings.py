"""How hard the fuzzing goes: the same few hundred cases daily, 10,000 fresh ones in ``make test-deep``."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from tests.deep import DEEP, scaled


def cases(short: int, full: int, steps: int = 20) -> settings:
    """Settings for a test of ``short`` or ``full`` cases; the short ones are the same in every run."""
    return settings(
        max_examples=scaled(short, full),
        stateful_step_count=steps,
        deadline=None,
        derandomize=not DEEP,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
