"""Times of documents are those of the calendar."""

from __future__ import annotations

import datetime

import pytest

from tlcore.layout.times import time_text


@pytest.mark.parametrize("nanoseconds", [0, 999, 1_000, 1_700_000_000_000_000_999, 1_700_000_000_123_456_789])
def test_a_time_is_written_as_the_calendar_has_it(nanoseconds: int) -> None:
    seconds, rest = divmod(nanoseconds // 1000, 1_000_000)
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).replace(microsecond=rest)
    assert time_text(nanoseconds) == moment.isoformat(timespec="microseconds")
