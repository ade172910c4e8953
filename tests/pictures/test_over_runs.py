"""One function gives the picture of one run and of several: a line each, a look by position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hessprobe.pictures.looks import SERIES, Look
from hessprobe.pictures.over_runs import lines_of_runs, over_runs


@dataclass(frozen=True)
class Run:
    label: str
    size: int


def ask(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
    return (np.arange(run.size), np.arange(run.size) / 2, None) if run.size else None


def test_one_run_is_named_after_the_number_and_several_after_themselves():
    (line,) = lines_of_runs([Run("nano", 3)], ask, "off-block energy")
    assert line.label == "off-block energy" and line.look == Look()
    runs = [Run("a", 3), Run("b", 0), Run("c", 2)]
    first, last = lines_of_runs(runs, ask, "off-block energy")
    assert (first.label, last.label) == ("a", "c")
    # The second has nothing to show; the third keeps its colour all the same.
    assert (first.look.color, last.look.color) == (SERIES[0], SERIES[2])
    np.testing.assert_array_equal(last.y, [0, 0.5])


def test_beyond_seven_runs_a_dash_tells_them_apart():
    found = over_runs([Run(str(i), 1) for i in range(40)], ask)
    looks = [(look.color, look.dash) for _, look, _ in found]
    assert len(set(looks[:28])) == 28 and looks[7] == (SERIES[0], "dash")


def test_a_run_of_blanks_has_no_line():
    assert lines_of_runs([Run("a", 2)], lambda run: (np.arange(2), np.full(2, np.nan), None), "x") == []
