"""Rows whose products are not symmetric are said first in the findings, and in the page's section; others are not."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hessprobe.analysis import findings
from hessprobe.instruments.cross_layer.answers import CrossLayerAnswers
from hessprobe.instruments.cross_layer.section import content
from hessprobe.reading.labelled import Labelled
from hessprobe.reading.symmetry import LIMIT, asymmetric_rows, asymmetry
from tests.instruments.cross_layer.tables import table


def log(gaps: list[float], failed: int | None = None) -> xr.Dataset:
    found = table(rows=len(gaps)).assign(symmetry_gap=("step", gaps))
    reasons = ["fell over" if row == failed else "" for row in range(len(gaps))]
    return found.assign(failure=("step", np.array(reasons, dtype=object)))


def test_the_limit_is_between_rounding_and_a_wrong_derivative():
    assert 1e-4 < LIMIT < 4e-3


def test_rows_beyond_rounding_come_before_every_other_finding():
    found = findings(xr.DataTree.from_dict({"/cross_layer": log([1e-7, 0.2, np.nan, 0.01])}))
    assert found[0].name == "symmetry_gap.cross_layer" and found[0].steps == (10, 30)
    assert found[0].value == 0.2 and "2 rows (step 10, 30)" in found[0].sentence
    assert "not to be trusted" in found[0].sentence


@pytest.mark.parametrize("gaps", [[1e-7, 1e-5, 1e-4, 1e-3], [np.nan] * 4])
def test_rounding_is_not_worth_a_word(gaps):
    assert asymmetry(log(gaps)) == ""
    found = findings(xr.DataTree.from_dict({"/cross_layer": log(gaps)}))
    assert not any(finding.name.startswith("symmetry_gap") for finding in found)


def test_a_log_without_gaps_and_a_failed_row_have_none():
    assert asymmetric_rows(table(rows=4)) == {}
    assert list(asymmetric_rows(log([0.2, 0.2, 1e-7, 1e-7], failed=0))) == [10]


def test_the_page_says_so_in_the_section():
    answers = CrossLayerAnswers(log([1e-7, 0.2, 1e-7, 1e-7]))
    said = content([Labelled(label="", answers=answers, compared=answers)])
    assert "1 row (step 10)" in said["asymmetry"]
