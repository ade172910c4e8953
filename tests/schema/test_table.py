"""A declaration that could not be stored, or read back without surprise, is refused before anything is written."""

from __future__ import annotations

import pytest

from hessprobe.store import Table, Variable


def variable(name: str = "loss", dims: tuple[str, ...] = ("step",), dtype: str = "float64") -> Variable:
    return Variable(name=name, dims=dims, units="1", long_name="", estimator="exact", dtype=dtype)


@pytest.mark.parametrize(
    ("dims", "dtype", "says"),
    [
        (("block", "step"), "float64", "first dimension must be 'step'"),
        ((), "float64", "first dimension must be 'step'"),
        (("step", "block", "block"), "float64", "a pair needs two names"),
        (("step",), "float16", "valid: float64, float32"),
    ],
)
def test_a_variable_that_cannot_be_stored_is_refused(dims, dtype, says):
    with pytest.raises(ValueError, match=says):
        variable(dims=dims, dtype=dtype)


@pytest.mark.parametrize(
    ("variables", "coordinates", "says"),
    [
        ((variable(), variable()), {}, "uses a name twice.*loss"),
        ((variable("recorded"),), {}, "one the store keeps.*recorded"),
        ((variable(dims=("step", "block")),), {}, "need coordinates of the same names"),
        ((variable(),), {"block": ["a"]}, "need coordinates of the same names"),
        ((variable(dims=("step", "block")),), {"block": ["a", "a"]}, "distinct"),
        ((variable(dims=("step", "block")),), {"block": []}, "at least one"),
    ],
)
def test_a_table_that_cannot_be_stored_is_refused(variables, coordinates, says):
    with pytest.raises(ValueError, match=says):
        Table(name="t", variables=variables, coordinates=coordinates)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b"])
def test_a_table_name_must_be_a_group_name(name):
    with pytest.raises(ValueError, match="plain word"):
        Table(name=name, variables=(variable(),), coordinates={})


def test_a_long_run_makes_few_files_and_a_large_row_one():
    blocks = [f"block.{i}" for i in range(14)]
    sketches = list(range(32))
    pair = variable("coupling", ("step", "block", "other_block"))
    kernel = variable("kernel", ("step", "block", "sketch", "other_sketch"))
    table = Table(
        name="t",
        variables=(variable(), pair, kernel),
        coordinates={"block": blocks, "other_block": blocks, "sketch": sketches, "other_sketch": sketches},
    )
    assert [table.chunk_rows(v) for v in table.variables] == [512, 41, 1]
