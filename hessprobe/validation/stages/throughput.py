"""Tokens per second of a training loop: bare, with a Recorder every 100 steps, and with all instruments."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from hessprobe.any_loop.recorder import Recorder
from hessprobe.validation.figures import Figure, check, measured, skipped
from hessprobe.validation.modes import FLOAT32, matmuls
from hessprobe.validation.problems import POSITIONS, Problem, named, study_config
from hessprobe.validation.runner import Bench
from hessprobe.validation.timing import forget, seconds_of, synchronize

EVERY = 100
ALL: dict[str, dict[str, Any]] = {
    "cross_layer": {"sequences": 8},
    "gn_hessian": {"sequences": 2, "samples": 2, "lanczos_steps": 3, "lanczos_probes": 1, "cg_iterations": 3},
    "preconditioner": {
        "curvature_sequences": [1, 2],
        "held_out_sequences": 2,
        "folds": 2,
        "cg_iterations": 3,
    },
}
LOOPS: dict[str, Mapping[str, Any] | None] = {
    "bare": None,
    "cross_layer every 100 steps": {"cross_layer": ALL["cross_layer"]},
    "all instruments every 100 steps": ALL,
}
# A row of all costs some 300 gradients of so few sequences; the bare loop 100.
STEPS_WORTH = 6


def throughput(bench: Bench) -> Iterator[Figure]:
    """Yields the three loops of 100 steps on one model."""
    config = study_config("45M", bench.small)
    sequences = max(8, POSITIONS[bench.small] // config.context)
    problem = Problem.of(config, sequences, bench.device)
    words = named("45M", bench.small)
    with matmuls(FLOAT32):
        problem.gradient(FLOAT32)
        unit = seconds_of(lambda: problem.gradient(FLOAT32), bench.device)
        bare = 0.0
        for number, (name, probes) in enumerate(LOOPS.items()):
            expected = unit * EVERY * (1 if number < 2 else STEPS_WORTH)
            if not bench.budget.fits(expected):
                reason = f"about {expected:.0f} s, and {bench.budget.stage_left:.0f} are left"
                yield skipped(f"{words}: {name}", reason)
                continue
            seconds, reasons = _loop(bench, config, sequences, probes, f"throughput-{number}")
            tokens = EVERY * sequences * config.context
            yield measured(f"{words}: {name}", tokens / seconds, "tokens/s")
            if probes is None:
                bare = seconds
                continue
            yield measured(f"{words}: {name}, time", seconds / bare, "times bare")
            yield check(
                f"{words}: {name}, rows that failed", len(reasons), 0, "rows", note="; ".join(reasons)[:300]
            )
    forget(bench.device)


def _loop(
    bench: Bench, config: Any, sequences: int, probes: Mapping[str, Any] | None, name: str
) -> tuple[float, list[str]]:
    """Returns the seconds of EVERY steps of AdamW with one row of each instrument, and why rows failed."""
    problem = Problem.of(config, sequences, bench.device)
    model, (inputs, targets) = problem.model, problem.batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    recorder = None
    if probes is not None:
        # Due once, in the middle: at the first step there is what only a first call costs.
        every = [EVERY // 2]
        recorder = Recorder(bench.folder / name, model, dict(probes), every=every, optimizer=optimizer)
    reasons: list[str] = []
    began = 0.0
    for step in range(-2, EVERY):  # two to warm up
        if step == 0:
            synchronize(bench.device)
            began = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        if recorder is not None and step >= 0:
            found = recorder(step, (inputs, targets))
            reasons += [f"{m.probe}: {m.failure}" for m in found if m.failure]
    synchronize(bench.device)
    seconds = time.perf_counter() - began
    if recorder is not None:
        recorder.close()
    return seconds, reasons
