"""What a run's log may hold: tables of labelled variables, one row per step, and how their rows share files.

A probe declares its table before it measures, so the layout on disk is complete before the first row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import nan, prod
from typing import Any

SCHEMA_VERSION = 1

# Names the store itself adds to every table.
RECORDED = "recorded"
FAILURE = "failure"
STEP = "step"

# The value of a cell no row has reached, by dtype. Data are float64 unless there is a reason: only NaN says
# "not measured" without a word of explanation, and float64 counts exactly up to 2^53.
FILL_VALUES: dict[str, float | int | bool | str] = {
    "float64": nan, "float32": nan, "int64": -1, "int32": -1, "bool": False, "str": "",
}  # fmt: skip
_ITEM_BYTES = {"float64": 8, "float32": 4, "int64": 8, "int32": 4, "bool": 1, "str": 32}

DIMENSIONS: dict[str, str] = {
    "step": "outer step of the training run",
    "block": "block of parameters",
    "other_block": "second block of parameters of a pair",
    "direction": "direction in parameter space",
    "sketch": "random cotangent at the logits",
    "other_sketch": "second random cotangent of a pair",
    "probe": "random probe vector",
    "candidate": "candidate preconditioner",
    "alpha": "step length, as a multiple of the proposed step",
    "matrix": "curvature matrix: Gauss-Newton G, Hessian H, or the residual H - G",
    "density_block": "block of parameters whose own spectral density was asked for",
    "ladder_direction": "direction in parameter space along which models of the loss are compared",
    "model": "model of the loss along a direction",
    "curvature_sequences": "sequences in the batch that a candidate was built on; smaller batches are parts of larger",
    "damping": "multiple of the identity added to the Gauss-Newton matrix",
    "draw": "independent draw of the curvature batches",
    "fold": "group of held-out sequences, left out together by the jackknife",
    "ritz": "index of the Ritz value, in ascending order",
}

# Rows of one variable that share a chunk file. Small chunks keep a row's rewrite cheap, large ones the reading of a
# thousand rows: at 16 KiB a report of 1,000 rows of every table took twice as long. 512 rows
# keep 10,000 steps of 16 series at some 350 files instead of 160,000.
CHUNK_BYTES = 64 * 1024
CHUNK_ROWS = 512
GROWTH_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Variable:
    """One measured quantity of a table: its dimensions (`step` first), units, and how it was estimated.

    `units` as a reader would say them ("nats per token", "1" for a pure number); `estimator` names the method
    and its source, or "exact". `dtype` is one of float64, float32, int64, int32, bool, str. `quantity` says of which
    matrix a norm is, where there are two: "batch", the batch's own G; or "population", the expected G over sequences like
    these. ||G|| of a batch is the larger one: it holds the batch's own noise.
    """

    name: str
    dims: tuple[str, ...]
    units: str
    long_name: str
    estimator: str
    dtype: str = "float64"
    quantity: str = ""

    def __post_init__(self) -> None:
        if not self.dims or self.dims[0] != STEP:
            raise ValueError(f"variable {self.name!r}: the first dimension must be 'step', got {self.dims}")
        if len(set(self.dims)) != len(self.dims):
            raise ValueError(
                f"variable {self.name!r} repeats a dimension: {self.dims}; a pair needs two names"
            )
        if self.dtype not in FILL_VALUES:
            raise ValueError(f"variable {self.name!r}: dtype {self.dtype!r}; valid: {', '.join(FILL_VALUES)}")

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes stored beside the data: long_name, units, estimator, and quantity where there are two."""
        found = {"long_name": self.long_name, "units": self.units, "estimator": self.estimator}
        return {**found, "quantity": self.quantity} if self.quantity else found


@dataclass(frozen=True, kw_only=True)
class Table:
    """A named set of variables over shared dimensions, one row per step.

    `coordinates` labels every dimension but `step` (strings or numbers, no repeats). `attributes` may hold
    anything JSON can; they become the attributes of the zarr group.
    """

    name: str
    variables: tuple[Variable, ...]
    coordinates: Mapping[str, Sequence]
    attributes: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith((".", "_")) or "/" in self.name:
            raise ValueError(f"table name {self.name!r}: a plain word is needed, it becomes a zarr group")
        taken = [variable.name for variable in self.variables]
        names = [*taken, *self.coordinates, STEP, RECORDED, FAILURE]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"table {self.name!r} uses a name twice or one the store keeps: {', '.join(repeated)}"
            )
        used = {dim for variable in self.variables for dim in variable.dims[1:]}
        if used != set(self.coordinates):
            raise ValueError(
                f"table {self.name!r}: dimensions {sorted(used)} need coordinates of the same names, "
                f"got {sorted(self.coordinates)}"
            )
        for dim, labels in self.coordinates.items():
            if not len(labels) or len(set(labels)) != len(labels):
                raise ValueError(
                    f"table {self.name!r}: labels of {dim!r} must be distinct and at least one: {labels}"
                )

    def row_shape(self, variable: Variable) -> tuple[int, ...]:
        """The shape of one row of the variable: its dimensions without `step`."""
        return tuple(len(self.coordinates[dim]) for dim in variable.dims[1:])

    def chunk_rows(self, variable: Variable) -> int:
        """How many rows share one chunk file: as many as fit 64 KiB, between 1 and 512."""
        row_bytes = _ITEM_BYTES[variable.dtype] * prod(self.row_shape(variable))
        return max(1, min(CHUNK_ROWS, CHUNK_BYTES // row_bytes))


def declared(entries: Sequence[tuple[str, tuple[str, ...], str, str, str]]) -> tuple[Variable, ...]:
    """Returns float64 variables from (name, dims, units, long_name, estimator)."""
    return tuple(
        Variable(name=name, dims=dims, units=units, long_name=long_name, estimator=how)
        for name, dims, units, long_name, how in entries
    )


def of_quantity(quantity: str, variables: Sequence[Variable]) -> tuple[Variable, ...]:
    """Returns the variables as of this quantity, "population" or "batch"."""
    return tuple(replace(variable, quantity=quantity) for variable in variables)


def bookkeeping_variables() -> tuple[Variable, ...]:
    """The three variables the store adds to every table: `step` (its coordinate), `failure`, `recorded`."""
    return (
        Variable(name=STEP, dims=(STEP,), units="steps", dtype="int64", estimator="exact",
                 long_name=DIMENSIONS[STEP]),
        Variable(name=FAILURE, dims=(STEP,), units="text", dtype="str", estimator="exact",
                 long_name="why this row could not be measured; empty where it was"),
        Variable(name=RECORDED, dims=(STEP,), units="truth value", dtype="bool", estimator="exact",
                 long_name="this row is whole: marked after all its data were written. Keep only such rows: "
                           "table.isel(step=table.recorded.values)"),
    )  # fmt: skip
