"""A process that writes rows as fast as it can until it is killed, and forks another one for the next round.

Forking spares each round the import of zarr. Lines on stdin: a run folder. Lines on stdout: the writer's pid,
then, when it is gone, "ended".
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np

from hessprobe.store import RunWriter, Table, Variable, layout, rows

STEPS = 3_000
REWRITTEN = 5
BLOCKS = ("embedding", "block.0", "block.1", "head")


def _variable(name: str, *dims: str, dtype: str = "float64") -> Variable:
    return Variable(
        name=name, dims=("step", *dims), units="1", long_name=name, estimator="exact", dtype=dtype
    )


def table(name: str) -> Table:
    """A table with numbers, text, matrices of several rows a chunk, and rows of one chunk each."""
    return Table(
        name=name,
        variables=(
            _variable("loss"),
            _variable("count", dtype="int64"),
            _variable("coupling", "block", "other_block"),
            _variable("kernel", "block", "sketch"),
            _variable("note", dtype="str"),
        ),
        coordinates={"block": BLOCKS, "other_block": BLOCKS, "sketch": tuple(range(300))},
    )


def fails(step: int) -> bool:
    """Whether the step is one whose measurement fails."""
    return step % 17 == 3


def row(step: int) -> dict[str, object]:
    """The row of a step: whatever its number says."""
    return {
        "loss": 1.0 / (1 + step),
        "count": 3 * step,
        "coupling": np.sin(step + np.arange(16.0)).reshape(4, 4),
        "kernel": step + np.arange(1200.0).reshape(4, 300),
        "note": "x" * (step % 7),
    }


def write_forever(folder: Path, acknowledged: int) -> None:
    """Continues the run a few rows before its end, as a run resumed from a checkpoint does."""
    layout.GROWTH_ROWS = rows.GROWTH_ROWS = 16  # a good part of the kills shall hit a table as it grows
    writer = (
        RunWriter.reopen(folder)
        if (folder / "log.zarr").exists()
        else RunWriter.create(folder, {"name": "killed"})
    )
    writer.add_table(table("fixed"), range(STEPS))
    writer.add_table(table("growing"), None)
    start = len(writer.recorded_steps("growing"))
    for step in range(max(0, start - REWRITTEN), STEPS):
        for name in ("fixed", "growing"):
            if fails(step):
                writer.fail(name, step, f"planned at {step}")
            else:
                writer.write(name, step, row(step))
        os.pwrite(acknowledged, f"{max(step + 1, start):9d}".encode(), 0)
    time.sleep(1000)


def main() -> None:
    """Serves one folder after the other."""
    for line in sys.stdin:
        folder = Path(line.strip())
        acknowledged = os.open(folder.with_suffix(".acknowledged"), os.O_RDWR | os.O_CREAT)
        pid = os.fork()
        if pid == 0:
            try:
                write_forever(folder, acknowledged)
            finally:
                os._exit(1)
        os.close(acknowledged)
        print(pid, flush=True)
        os.waitpid(pid, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main()
