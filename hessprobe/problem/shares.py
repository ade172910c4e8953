"""Which sequences of a batch that all processes know one of them runs the model on.

Where the model's parameters are sharded over the processes they must run it equally often, for each pass gathers them:
a share is then whole micro-batches, as many for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from hessprobe.errors import UserError
from hessprobe.problem.batches import Batch
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.splitting import can_be_cut

if TYPE_CHECKING:
    from hessprobe.problem.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Share:
    """A part of a batch that one process runs.

    Attributes:
        batch: the sequences.
        number: of the micro-batch they belong to.
        start, stop: which of the micro-batch's sequences they are.
        first: how many sequences come before them, over all micro-batches.
    """

    batch: Batch
    number: int
    start: int
    stop: int
    first: int


def share_of(objective: Objective, batches: MicroBatches) -> list[Share]:
    """Returns the present process's part of micro-batches; see `Objective.share`."""
    counts, processes = batches.counts, objective.processes
    mine = processes.part(batches.sequences)
    if processes.count > 1 and is_sharded(objective.model):
        if len(batches) % processes.count:
            raise UserError(
                f"{len(batches)} micro-batches for {processes.count} processes: with parameters sharded over them, give "
                "the micro-batches of all processes in their order, as many of each"
            )
        whole = processes.part(len(batches))
        mine = slice(sum(counts[: whole.start]), sum(counts[: whole.stop]))
    found, first = [], 0
    for number, (batch, count) in enumerate(zip(batches, counts, strict=True)):
        start, stop = max(0, mine.start - first), min(count, mine.stop - first)
        if 0 < stop - start < count and not can_be_cut(objective, batch, most=2):
            start, stop = (0, count) if mine.start <= first < mine.stop else (0, 0)
        if start < stop:
            part = batch if stop - start == count else objective.cut(batch, start, stop)
            found.append(Share(batch=part, number=number, start=start, stop=stop, first=first + start))
        first += count
    return found


def is_sharded(model: nn.Module) -> bool:
    """Tells whether parameters lie in parts on several devices (FSDP2, tensor parallel: DTensors)."""
    # After a forward pass alone FSDP2 leaves parameters gathered in the places of the shards.
    return any(hasattr(p, "placements") for p in model.parameters()) or any(
        hasattr(module, "set_requires_gradient_sync") for module in model.modules()
    )
