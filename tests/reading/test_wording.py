"""A number is written to the place its error allows, never to more."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hessprobe.reading.wording import basis, counted, percent, plus_minus


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (0.63412, 0.0213, "0.634 ± 0.021"),
        (0.63412, 0.00213, "0.6341 ± 0.0021"),
        (1234.5, 21.0, "1234 ± 21"),
        (1234.5, 321.0, "1234 ± 321"),
        (-0.5, 0.1, "−0.50 ± 0.10"),
        (1.0, 0.0, "1 ± 0"),
        (0.25, 1e-9, "0.25 ± 1e-09"),
        (-4.997e-6, 2e-6, "(−5.0 ± 2.0)e-6"),
        (3e-9, 1.234e-7, "(0.0 ± 1.2)e-7"),
        (-1.2345678, 3.3e-8, "−1.235 ± 3e-08"),
        (3.14159, None, "3.142"),
        (300000.0, None, "300,000"),
        (3.14159, float("nan"), "3.142"),
        (float("nan"), 1.0, "not measured"),
    ],
)
def test_plus_minus(value, stderr, text):
    assert plus_minus(value, stderr) == text


def test_percent_and_counts():
    assert percent(0.421, 0.0131) == "42.1 ± 1.3 %"
    assert percent(-0.0512) == "−5.1 %"
    assert percent(float("nan")) == "not measured"
    assert counted(1, "row") == "1 row" and counted(1200, "row") == "1,200 rows"


def test_basis_says_what_is_known():
    row = xr.Dataset({"sequences": 16.0, "tokens": 1024.0, "damping": 0.0})
    assert basis(row) == "16 sequences, 1,024 tokens"
    assert basis(row.assign(damping=1e-3, sequences=1.0)) == "1 sequence, 1,024 tokens, damping 0.001"
    assert basis(row.assign_attrs(samples=8)) == "16 sequences, 1,024 tokens, 8 probes a block"
    assert basis(row.assign_attrs(samples=8), exact=True) == "16 sequences, 1,024 tokens"
    assert basis(row.assign(rounds=4.0)) == "16 sequences, 1,024 tokens, 4 rounds of sketches"
    assert basis(row.assign(rounds=1.0), exact=True) == "16 sequences, 1,024 tokens"
    assert basis(xr.Dataset({"tokens": np.nan})) == ""
