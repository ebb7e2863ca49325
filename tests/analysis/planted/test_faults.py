"""The first divergence is where the fault was planted, whatever the noise of the batches around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache, partial

import pytest

import tlcore
from tests.deep import scaled
from tlcore.analysis import Comparison

from .faults import FAULTS, Fault
from .oracle import times_the_noise
from .runs import captured

# The batch of the reference, of the run with the fault, and of the further runs.
REFERENCE, CHANGED, FURTHER = 2, 5, (3, 4)
CHOSEN = scaled(FAULTS[::6], FAULTS)
# Whole models, many times.
pytestmark = pytest.mark.slow
Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return partial(captured, str(tmp_path_factory.mktemp("planted")))


@pytest.fixture(scope="module")
def clean(run: Run) -> Run:
    """Runs without a fault, each made once; ``copy`` tells reruns apart."""
    return cache(lambda subject, batch, copy=0: run(subject, batch))


def check(found: Comparison, fault: Fault, size: float) -> None:
    """What is above three times the noise is named, and nothing before the fault in any case."""
    first = found.first_divergence
    if size > 3:
        assert first is not None, f"{size:.3g} times the noise, and nothing was found"
    if first is None:
        return
    seen = (first.module, first.direction, first.call)
    if size > 3:
        assert (seen, first.within) == (fault.site, fault.within), f"{size:.3g} times the noise"
        assert first.born, str(first)
    else:
        keys = [(each.module, each.direction, each.call) for each in found.results]
        assert keys.index(seen) >= keys.index(fault.site)


@pytest.mark.parametrize("fault", CHOSEN, ids=str)
def test_a_fault_is_named_within_the_noise_of_other_batches(fault: Fault, run: Run, clean: Run) -> None:
    a, further = clean(fault.subject, REFERENCE), [clean(fault.subject, each) for each in FURTHER]
    b = run(fault.subject, CHANGED, change=fault.plant)
    check(tlcore.compare(a, b, noise=further), fault, times_the_noise(fault, (REFERENCE, *FURTHER)))


@pytest.mark.parametrize("fault", CHOSEN, ids=str)
def test_a_fault_is_named_where_runs_repeat_bit_by_bit(fault: Fault, run: Run, clean: Run) -> None:
    a, rerun = clean(fault.subject, REFERENCE), clean(fault.subject, REFERENCE, copy=1)
    b, size = run(fault.subject, REFERENCE, change=fault.plant), times_the_noise(fault, ())
    check(tlcore.compare(a, b, noise=rerun), fault, size)
    # Without a further run, it is where bits differ first.
    difference = tlcore.compare(a, b).first_difference
    if size > 3:
        assert difference is not None
        assert (difference.module, difference.direction, difference.call) == fault.site


def test_the_list_is_long_and_of_many_kinds() -> None:
    assert len(FAULTS) >= 60 and len({str(each) for each in FAULTS}) == len(FAULTS)
    assert len({each.subject for each in FAULTS}) == 8
    kinds = Counter(each.kind for each in FAULTS)
    wanted = {
        "dtype",
        "epsilon",
        "transposed weight",
        "rope base",
        "swapped experts",
        "wrong row",
        "position",
    }
    assert wanted | {"stale cache", "quantised", "mask", "wrong adapter", "race"} <= kinds.keys()


@pytest.mark.deep
def test_most_of_the_list_is_above_the_noise() -> None:
    above = [each for each in FAULTS if times_the_noise(each, (REFERENCE, *FURTHER)) > 3]
    assert len(above) >= 60
