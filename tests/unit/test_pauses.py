"""How long is waited between two looks."""

from __future__ import annotations

from itertools import islice

import pytest

from services.common.pauses import pauses


def test_pauses_grow_to_the_longest_and_stay_there() -> None:
    assert list(islice(pauses(0.5, 2.0, growth=2), 5)) == [0.5, 1.0, 2.0, 2.0, 2.0]


def test_a_quarter_of_a_minute_of_silence_takes_a_third_of_the_looks_that_a_steady_pause_would() -> None:
    looks, waited = 0, 0.0
    for pause in pauses(0.5, 2.0):
        if waited >= 15:
            break
        looks, waited = looks + 1, waited + pause
    assert looks == pytest.approx(11, abs=1)
