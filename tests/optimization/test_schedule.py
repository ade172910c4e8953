"""Learning rate schedules are pure functions of the clock, falling where they say so."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hessprobe.errors import UserError
from hessprobe.optimization.schedule import SCHEDULES, learning_rate_factor, learning_rate_factors


def course(schedule: str, outer_steps: int, inner_steps: int) -> list[float]:
    return [
        learning_rate_factor(
            schedule, outer=outer, inner=inner, outer_steps=outer_steps, inner_steps=inner_steps
        )
        for outer in range(outer_steps)
        for inner in range(inner_steps)
    ]


def test_the_global_cosine_falls_over_all_inner_steps_of_the_run():
    assert course("global-cosine", 3, 4) == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * i / 12)) for i in range(12)]
    )


def test_the_inner_cosine_starts_again_at_every_outer_step():
    once = [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert course("inner-cosine", 3, 4) == pytest.approx(once * 3)


def test_constant_does_not_fall():
    assert course("constant", 2, 3) == [1.0] * 6


@given(st.sampled_from(SCHEDULES), st.integers(1, 30), st.integers(1, 30))
def test_every_factor_of_a_run_is_positive_and_starts_at_one(schedule, outer_steps, inner_steps):
    factors = course(schedule, outer_steps, inner_steps)
    assert factors[0] == 1.0
    assert all(0 < factor <= 1 for factor in factors)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_factors_of_an_outer_step_are_those_of_its_inner_steps(schedule):
    whole = course(schedule, 3, 4)
    parts = [learning_rate_factors(schedule, outer=i, outer_steps=3, inner_steps=4) for i in range(3)]
    assert [factor for part in parts for factor in part] == whole


def test_a_run_that_goes_on_past_its_length_does_not_turn_round():
    late = learning_rate_factor("global-cosine", outer=9, inner=1, outer_steps=3, inner_steps=4)
    assert late == 0.0


def test_what_does_not_exist_is_refused():
    with pytest.raises(UserError, match="no schedule named 'cosine'.*global-cosine, inner-cosine, constant"):
        learning_rate_factor("cosine", outer=0, inner=0, outer_steps=1, inner_steps=1)
    with pytest.raises(UserError, match="at least 1, got 0"):
        learning_rate_factor("constant", outer=0, inner=0, outer_steps=1, inner_steps=0)
