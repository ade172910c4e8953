"""Which part of a training step's batch a probe reads: its first sequences."""

from __future__ import annotations

from contextlib import suppress

import torch

from hessprobe.errors import UserError
from hessprobe.problem.batches import mapped
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Batch, Objective


def first_sequences(batches: MicroBatches, limit: int) -> MicroBatches:
    """Returns the first sequences of the micro-batches, at most `limit` of them.

    Raises:
        UserError: a batch that holds more cannot be cut.
    """
    return batches.between(0, limit, lambda number, _, high: _first(batches, number, high))


def _first(batches: MicroBatches, number: int, left: int) -> Batch:
    """Returns a batch's first sequences, whose targets are the whole's first: no pass is made to see it."""
    objective, batch, count = batches.objective, batches[number], batches.counts[number]
    if objective.splits is not False:
        with suppress(RuntimeError, ValueError, TypeError, IndexError):  # of a targets= that wants the whole
            part, labels = objective.cut(batch, 0, left), objective.labels(batch)[:left]
            if torch.equal(objective.labels(part), labels):
                return part
    raise UserError(
        f"this batch of {count} sequences cannot be cut down to {left}: forward=, targets= or an entry of another shape "
        f"want all of it. Give the probe the whole, as with {{'sequences': {count}}} among its options, or write forward= "
        "and targets= that take any number of sequences"
    )


def own_sequences(objective: Objective, batch: Batch | list[Batch], limit: int) -> list[Batch]:
    """Returns what one of several processes sends the others: its first sequences, in memory of their own on the CPU."""
    given = objective.counted(batch)  # a process may have had nothing to read
    return mapped(list(first_sequences(given, limit)), lambda x: x.detach().to("cpu", copy=True).contiguous())
