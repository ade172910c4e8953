"""Out of memory: the same sketches from fewer sequences at once and less held, or a refusal that says the way out."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.kernels.grams import Grams
from hessprobe.kernels.plan import NotOneCall, Plan, without
from hessprobe.kernels.sketches import Draws
from hessprobe.kernels.stream import HOST_MEMORY, Stream
from hessprobe.machine.memory import is_out_of_memory
from hessprobe.machine.processes import PeerFailed, together
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition
from hessprobe.problem.shares import Share, is_sharded
from hessprobe.problem.splitting import can_be_cut

# Divisions go at least so far, whatever a micro-batch's size: with each, half as much is held.
LEAST_MEMORY = 64

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class SequenceRange:
    """Sequences `start` to `stop` of micro-batch `number`, which run together."""

    batch: Batch
    number: int
    start: int
    stop: int

    @property
    def label(self) -> tuple[int, int, int]:
        """What it is a part of."""
        return self.number, self.start, self.stop


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Gram matrices of all sketches, m = (micro-batch, round, sequence) in that order, and how they were had.

    Attributes:
        kernel: (l, m, m).
        alignment: for each vector given (l, m).
        sequence, round: (m,) to which a sketch belongs; sequences count over all micro-batches.
        plan: as it was in the end.
        loss: summed over tokens.
        gradients: what the passes that succeeded cost, in gradients of all micro-batches.
        division: 1, or how many times smaller they had to be.
    """

    kernel: Tensor
    alignment: Mapping[str, Tensor]
    sequence: Tensor
    round: Tensor
    plan: Plan
    loss: float
    gradients: float
    division: int


def gathered(
    objective: Objective,
    batches: MicroBatches,
    partition: Partition,
    plan: Plan,
    draws: Draws,
    rounds: int,
    *,
    theta: Mapping[str, Tensor] | None,
    along: Mapping[str, Tensor] | None,
    memory: int,
    autocast: torch.dtype | None,
    division: int = 1,
) -> Gathered:
    """Returns what the stream gathers, divided until it fits into memory.

    A tap that some batch calls otherwise than once leaves the plan. Arguments are those of `layer_kernels`.

    Raises:
        UserError: out of memory with one sequence at a time (or whole micro-batches where they cannot be cut) too.
    """
    counts = batches.counts
    shares = objective.share(batches)
    if not objective.processes.all_say(bool(shares)):  # fewer sequences than processes: each runs them all
        objective = objective.alone
        shares = objective.share(batches)
    processes, sharded = objective.processes, is_sharded(objective.model)
    on_host = HOST_MEMORY if next(objective.model.parameters()).device.type == "cuda" else 0
    sizes = [own.stop - own.start for own in shares]
    everyone = processes.gathered(sizes) if sharded else [sizes]
    cuttable: list[bool] = []

    @together(lambda _: processes)  # a process out of memory is one for all to try again
    def attempt(division: int) -> Gathered:
        if division > 1 and not cuttable:
            largest = max(shares, key=lambda own: own.stop - own.start).batch
            own = sharded or can_be_cut(objective, largest)
            cuttable.append(processes.all_say(own))
        parts = _parts(objective, shares, division if cuttable and cuttable[0] else 1, everyone)

        runs = batches.parted([part.batch for part in parts])
        losses: dict[tuple[int, int, int], Tensor] = {}

        def cotangents(i: int, r: int, outputs: Tensor, targets: Tensor) -> Tensor:
            own = parts[i]
            losses[own.label] = objective.loss_function.value(outputs, targets).double()
            return draws.of(own.number, r, slice(own.start, own.stop), outputs, targets)

        kept = plan
        while True:
            stream = Stream(
                objective,
                partition,
                kept,
                theta=theta,
                along=along,
                memory=memory // division,
                host_memory=on_host // division,
                autocast=autocast,
            )
            grams: Grams | None = None
            refused: set[int] = set()
            try:
                with processes.together(detail=lambda error, kept=kept: _refused(error, kept)):
                    grams = stream.run(runs, rounds, cotangents)
            except (NotOneCall, PeerFailed) as error:
                refused = _refused(error, kept)
                if not refused:
                    raise
            refused = set().union(*processes.gathered(refused))
            if grams is None or refused:
                kept = without(kept, {id(kept.taps[i]) for i in refused})
                continue
            draws.finish()
            (loss,) = processes.total(torch.stack(list(losses.values())).sum())
            labels = [label for own in processes.gathered([part.label for part in parts]) for label in own]
            sequence, of_round, order = _labels(labels, rounds, counts)
            kernel, alignment = grams.kernel.cpu(), {name: a.cpu() for name, a in grams.alignment.items()}
            if len(labels) > len(counts):
                kernel = kernel[:, order][:, :, order]
                alignment = {name: a[:, order] for name, a in alignment.items()}
            return Gathered(
                kernel=kernel,
                alignment=alignment,
                sequence=sequence[order],
                round=of_round[order],
                plan=kept,
                loss=float(loss),
                gradients=stream.gradients,
                division=division,
            )

    most = max(LEAST_MEMORY, *counts)
    refusal = (
        f"out of memory: {sum(counts) * rounds} sketches of {partition.size:,} parameters do not fit, not even with one "
        f"sequence at a time (or one micro-batch, where its sequences depend on each other) and {memory // most:,} bytes "
        f"held, 1/{most} of memory={memory:,}; measure fewer sequences or rounds (cross_layer.sequences, "
        "cross_layer.rounds), a shorter context, smaller micro-batches, or free memory on the model's device"
    )
    return within_memory(attempt, most, refusal, division)


def within_memory(attempt: Callable[[int], Result], most: int, refusal: str, division: int = 1) -> Result:
    """Returns attempt(division) for the first division of 1, 2, 4, ... `most` that does not run out of memory.

    Args:
        refusal: what to say where none does, before the allocator's own words.
        division: where to begin.

    Raises:
        UserError: out of memory at `most` too.
    """
    while True:
        try:
            return attempt(division)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if division >= most:
            raise UserError(f"{refusal} ({reason})")
        gc.collect()  # what the failed attempt held is free once its traceback is gone, cycles too
        division = min(2 * division, most)


def _refused(error: BaseException, plan: Plan) -> set[int]:
    """Returns which of a plan's taps an error refuses, in this process or in another."""
    if isinstance(error, NotOneCall):
        return {i for i, tap in enumerate(plan.taps) if tap is error.tap}
    return (error.detail or set()) if isinstance(error, PeerFailed) else set()


def _parts(
    objective: Objective, shares: Sequence[Share], division: int, everyone: Sequence[Sequence[int]]
) -> list[SequenceRange]:
    """Returns a process's micro-batches, each cut into parts of at most 1 / division of the largest one's sequences.

    Args:
        everyone: how many sequences each micro-batch has in every process that must run as many parts.
    """
    most = math.ceil(max(map(max, everyone)) / division)
    parts = []
    for own, counts in zip(shares, zip(*everyone, strict=True), strict=True):
        count = own.stop - own.start
        pieces = min(math.ceil(max(counts) / most), min(counts))
        for i in range(pieces):
            start, stop = count * i // pieces, count * (i + 1) // pieces
            part = own.batch if pieces == 1 else objective.cut(own.batch, start, stop)
            parts.append(
                SequenceRange(batch=part, number=own.number, start=own.start + start, stop=own.start + stop)
            )
    return parts


def _labels(
    parts: Sequence[tuple[int, int, int]], rounds: int, counts: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each sketch's sequence and round as the parts (micro-batch, start, stop) ran, and the order of them.

    That order is by (micro-batch, round, sequence).
    """
    sequence, of_round, place = [], [], []
    for number, start, stop in parts:
        for r in range(rounds):
            own = sum(counts[:number]) + torch.arange(start, stop)
            sequence.append(own)
            of_round.append(torch.full_like(own, r))
            place.append((number * rounds + r) * sum(counts) + own)
    return torch.cat(sequence), torch.cat(of_round), torch.argsort(torch.cat(place))
