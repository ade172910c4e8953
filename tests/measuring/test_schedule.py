"""Schedules are data: what is due at a step is what the list of due steps says, whatever the kind."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hessprobe.errors import UserError
from hessprobe.measuring.schedule import At, Every, Logarithmic, schedule_of

LENGTH = 300
SCHEDULES = st.one_of(
    st.integers(1, 40).map(lambda n: Every(steps=n)),
    st.integers(1, 30).map(lambda n: Logarithmic(per_decade=n)),
    st.frozensets(st.integers(0, 2 * LENGTH), min_size=1).map(lambda steps: At(steps=steps)),
)


@given(SCHEDULES, st.integers(0, LENGTH))
def test_due_and_the_list_of_due_steps_are_one(schedule, length):
    assert list(schedule.below(length) or ()) == [step for step in range(length) if step in schedule]


def test_logarithmic_steps_spread_out_by_a_constant_factor():
    assert schedule_of("log").below(200) == [0, 1, 2, 3, 6, 10, 18, 32, 56, 100, 178]
    assert schedule_of("log:1").below(10**6 + 1) == [0, 1, 10, 100, 1000, 10**4, 10**5, 10**6]
    assert 10**9 in schedule_of("log:1")
    assert 10**9 + 1 not in schedule_of("log:1")


def test_only_named_steps_are_known_without_a_length():
    assert schedule_of([7, 3, 3]).below(None) == [3, 7]
    assert schedule_of(5).below(None) is None
    assert schedule_of("log").below(None) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (5, "every 5"),
        (np.int64(5), "every 5"),
        ("log", "log:4"),
        ("log:3", "log:3"),
        (range(0, 9, 4), "steps 0, 4, 8"),
    ],
)
def test_a_schedule_says_what_it_is(given, said):
    assert str(schedule_of(given)) == said
    assert schedule_of(schedule_of(given)) == schedule_of(given)


@pytest.mark.parametrize(
    "given", [0, -3, True, 2.5, None, "often", "log:", "log:0", "log:x", [], [1, -1], [0.5]]
)
def test_what_is_no_schedule_is_refused_with_those_that_are(given):
    with pytest.raises(UserError, match=r"every=.*wanted a number of steps \(50\), 'log' or 'log:N'"):
        schedule_of(given)
