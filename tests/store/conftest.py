"""A small probe table for the store's tests: numbers, text, a pair of block dimensions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hessprobe.store import RunWriter, Table, Variable

BLOCKS = ["embedding", "block.0", "head"]


def _variable(name: str, *dims: str, dtype: str = "float64") -> Variable:
    return Variable(
        name=name, dims=("step", *dims), units="nats per token", long_name=f"the {name}",
        estimator="Hutchinson 1989, 8 samples", dtype=dtype,
    )  # fmt: skip


class Sample:
    """A table and, for each step, the row it should hold."""

    table = Table(
        name="cross_layer",
        variables=(
            _variable("loss"),
            _variable("coupling", "block", "other_block"),
            _variable("count", dtype="int64"),
            _variable("note", dtype="str"),
        ),
        coordinates={"block": BLOCKS, "other_block": BLOCKS},
        attributes={"every": 5},
    )
    train = Table(name="train", variables=(_variable("loss"),), coordinates={})

    @staticmethod
    def row(step: int) -> dict[str, object]:
        coupling = np.arange(9.0).reshape(3, 3) + step
        return {"loss": 1.0 / (1 + step), "coupling": coupling, "count": 2 * step, "note": f"step {step}"}


@pytest.fixture
def sample() -> Sample:
    return Sample()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "a"


@pytest.fixture
def recorded(folder: Path, sample: Sample) -> Path:
    """A finished run with 4 of its 6 steps recorded, one of them failed."""
    with RunWriter.create(folder, {"name": "a", "seed": 3}) as writer:
        writer.add_table(sample.table, [0, 5, 10, 15, 20, 25])
        for step in (0, 5, 15):
            writer.write("cross_layer", step, sample.row(step))
        writer.fail("cross_layer", 10, "out of memory")
    return folder
