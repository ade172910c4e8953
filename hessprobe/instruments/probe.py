"""What measures an instrument's rows. No torch here, so that an instrument in one file can be read where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hessprobe.schema.table import Table

if TYPE_CHECKING:
    from hessprobe.instruments.snapshot import Snapshot
    from hessprobe.problem.partition import Partition

Row = Mapping[str, Any]


class Probe:
    """An instrument. It declares its table, and measures one row of it from a snapshot.

    Attributes:
        name: of the probe, its table and its section of a recipe.
        every: outer steps between rows.
        sequences: how many a row reads.
        needs_optimizer: whether snapshots must carry the running optimizer's state, which is copied for it.
    """

    name: str
    every: int
    sequences: int
    needs_optimizer = False

    @property
    def unit_sequences(self) -> int:
        """The sequences of the batch whose gradient is the unit of `cost`; default: all that a row reads."""
        return self.sequences

    @property
    def works_sharded(self) -> bool:
        """Whether rows can be measured where processes hold shards of the parameters (FSDP2): by backward passes alone."""
        return False

    def table(self, partition: Partition) -> Table:
        """Returns the table this probe fills, its coordinates those of the partition."""
        raise NotImplementedError

    def measure(self, snapshot: Snapshot) -> Row:
        """Returns one row of the table, but for `seconds` and `peak_memory`, which the recorder knows.

        Anything raised marks the row as failed with its reason; training goes on.
        """
        raise NotImplementedError

    def cost(self, partition: Partition) -> float:
        """Returns what one row costs at most, by operation count, in gradients of `unit_sequences` sequences."""
        raise NotImplementedError

    def vectors(self, partition: Partition) -> float:
        """Returns how many vectors as long as theta a row holds at once, for estimates of memory."""
        raise NotImplementedError
