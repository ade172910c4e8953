"""One row of each instrument at 150M: what it costs in time beside what it declares before and counts while it measures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hessprobe.errors import UserError
from hessprobe.instruments.snapshot import Probe
from hessprobe.machine.devices import peak_memory, reset_peak_memory
from hessprobe.machine.memory import is_out_of_memory
from hessprobe.measuring.row_recorder import build_probes
from hessprobe.measuring.snapshots import Snapshots
from hessprobe.recipe import build_recipe
from hessprobe.validation.figures import Figure, check, failure, measured, skipped
from hessprobe.validation.modes import FLOAT32, matmuls
from hessprobe.validation.problems import Problem, named, random_batch, study_config
from hessprobe.validation.rows import INSTRUMENTS, OPTIONS
from hessprobe.validation.runner import Bench
from hessprobe.validation.timing import forget, seconds_of

# Sequences of a row, the best first: one is taken that fits the time.
_SEQUENCES = {False: (64, 32, 16, 8, 4), True: (4,)}
# Matrix products count for everything in a gradient's number; what else there is takes its time too.
SLACK = 2.5
DECLARED = 1.001  # the declared cost is the most that a row may count


def instruments(bench: Bench) -> Iterator[Figure]:
    """Yields for each instrument seconds, gradients counted and declared, and the ratio of time to count."""
    config = study_config("150M", bench.small)
    problem = Problem.of(config, 2, bench.device)
    with matmuls(FLOAT32):
        problem.gradient(FLOAT32)
        unit = min(seconds_of(lambda: problem.gradient(FLOAT32), bench.device) for _ in range(2)) / 2
        yield measured(
            f"{named('150M', bench.small)}: one sequence of {config.context:,} tokens in a gradient",
            1e3 * unit,
            "ms",
        )
        for number, instrument in enumerate(INSTRUMENTS):
            share = bench.budget.stage_left / (len(INSTRUMENTS) - number)
            try:
                yield from _row(bench, problem, instrument, unit, share)
            except Exception as error:
                name = f"{instrument}: a row"
                yield skipped(name, "out of memory") if is_out_of_memory(error) else failure(name, error)
            forget(bench.device)


def _options(instrument: str, sequences: int, small: bool) -> dict[str, Any]:
    if small:
        return OPTIONS[instrument] | ({"sequences": sequences} if instrument != "preconditioner" else {})
    if instrument == "preconditioner":
        return {"curvature_sequences": [max(1, sequences // 4), max(2, sequences // 2)],
                "held_out_sequences": max(2, sequences // 2), "folds": 2}  # fmt: skip
    return {"sequences": sequences}


def _probe(instrument: str, options: Mapping[str, Any]) -> Probe:
    (probe,) = build_probes(build_recipe({"probes": [instrument], instrument: dict(options)}))
    return probe


def _row(bench: Bench, problem: Problem, instrument: str, unit: float, share: float) -> Iterator[Figure]:
    partition = problem.partition
    probe, expected = None, 0.0
    for sequences in _SEQUENCES[bench.small]:
        probe = _probe(instrument, _options(instrument, sequences, bench.small))
        expected = SLACK * probe.cost(partition) * probe.unit_sequences * unit
        if expected <= share:
            break
    else:
        yield skipped(
            f"{instrument}: a row", f"it takes about {expected:.0f} s, and {share:.0f} are its share"
        )
        return
    batch = random_batch(problem.config, probe.sequences, bench.device)
    some = tuple(x[: probe.unit_sequences] for x in batch)
    # In pieces as long batches go through the model anywhere.
    pieces = problem.objective.pieces((some[0], some[1]))
    gradient = min(
        seconds_of(lambda: [problem.gradient(FLOAT32, piece) for piece in pieces], bench.device)  # type: ignore[arg-type]
        for _ in range(3)
    )
    theta = partition.vector(problem.model)
    generator = torch.Generator(theta.device).manual_seed(6)
    noise = torch.randn(partition.size, generator=generator, device=theta.device)
    snapshots = Snapshots(objective=problem.objective, partition=partition, seed=0)
    snapshot = snapshots.take(0, [batch], update=(1e-3 * noise).to(theta))
    reset_peak_memory(bench.device)
    found: dict[str, Any] = {}
    seconds = seconds_of(lambda: found.update(probe.measure(snapshot)), bench.device)
    if not found:
        raise UserError(f"{instrument}: no row")
    counted, declared = float(found["gradient_equivalents"]), probe.cost(partition)
    words = f"{instrument}: a row of {probe.sequences} sequences"
    yield measured(
        words, seconds, "s", f"the unit: {probe.unit_sequences} sequences, {1e3 * gradient:.3g} ms"
    )
    yield measured(f"{instrument}: seconds over a gradient's", seconds / gradient, "gradients")
    yield measured(f"{instrument}: gradients counted", counted, "gradients")
    yield measured(f"{instrument}: gradients declared before", declared, "gradients")
    yield check(f"{instrument}: counted over declared", counted / declared, DECLARED)
    yield measured(f"{instrument}: time over count", seconds / gradient / counted, "1")
    yield measured(f"{instrument}: peak memory", peak_memory(bench.device) / 2**30, "GiB")
