"""A probe that keeps what it was shown, and the check that training went on as it does without one."""

from __future__ import annotations

from typing import Any

import torch

from hessprobe.instruments.row_variables import MEASUREMENT_VARIABLES
from hessprobe.instruments.snapshot import Probe, Row, Snapshot
from hessprobe.problem.partition import Partition
from hessprobe.schema.table import Table

MEASURED = [v.name for v in MEASUREMENT_VARIABLES if v.name not in ("seconds", "peak_memory")]


class Seen(Probe):
    """Measures the loss and keeps what it was shown."""

    name, every, sequences, needs_optimizer = "seen", 1, 8, True

    def __init__(self, keep: bool = True) -> None:
        self.keep, self.snapshots = keep, []

    def table(self, partition: Partition) -> Table:
        return Table(name=self.name, variables=MEASUREMENT_VARIABLES, coordinates={})

    def measure(self, snapshot: Snapshot) -> Row:
        loss, _ = snapshot.objective.gradient(snapshot.batches, snapshot.partition, snapshot.named_parameters)
        if self.keep:
            self.snapshots.append(snapshot)
        return {**dict.fromkeys(MEASURED, 1.0), "symmetry_gap": 0.0, "loss": loss}


def assert_untouched(found: dict[str, Any], bare: dict[str, Any]) -> None:
    torch.testing.assert_close(found, bare, rtol=0, atol=0, equal_nan=True)
