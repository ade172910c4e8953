"""Gauss-Newton steps, full and layerwise, three outer ones on real text: does the loss go down, and at what cost?"""

from __future__ import annotations

from collections.abc import Iterator

from hessprobe.machine.memory import is_out_of_memory
from hessprobe.optimization.gauss_newton import GaussNewton
from hessprobe.validation.figures import Figure, failure, holds, measured, skipped
from hessprobe.validation.modes import FLOAT32, matmuls
from hessprobe.validation.problems import POSITIONS, SIZES, Problem, named, study_config, text
from hessprobe.validation.runner import Bench
from hessprobe.validation.timing import forget, peak_growth, seconds_of

OUTER, SEARCHED = 3, 2
MINIBATCHES = {False: 4, True: 2}  # fewer where sizes are shrunken
STRUCTURES = ("full", "layerwise")
SLACK = 2.0  # time over count, for norms and all that is no matrix product


def steps(bench: Bench) -> Iterator[Figure]:
    """Yields the steps of either structure at either size."""
    corpus = None
    for size in SIZES:
        config = study_config(size, bench.small)
        corpus = corpus or text(config)
        sequences = max(2, POSITIONS[bench.small] // config.context)
        for structure in STRUCTURES:
            words = f"{named(size, bench.small)}, {structure} Gauss-Newton"
            try:
                drawn = [
                    tuple(x.to(bench.device) for x in corpus.batch(seed=0, step=i, sequences=sequences))
                    for i in range(OUTER * (MINIBATCHES[bench.small] + SEARCHED))
                ]
                yield from _steps(bench, Problem.of(config, sequences, bench.device), structure, drawn, words)
            except Exception as error:
                yield skipped(words, "out of memory") if is_out_of_memory(error) else failure(words, error)
            forget(bench.device)


def _steps(bench: Bench, problem: Problem, structure: str, drawn: list, words: str) -> Iterator[Figure]:
    minibatches = MINIBATCHES[bench.small]
    with matmuls(FLOAT32):
        problem.gradient(FLOAT32)
        unit = min(seconds_of(lambda: problem.gradient(FLOAT32), bench.device) for _ in range(3))
        memory = peak_growth(lambda: problem.gradient(FLOAT32), bench.device)
        optimizer = GaussNewton(problem.model, structure=structure, outer_steps=OUTER)
        expected = SLACK * unit * OUTER * minibatches * (2 + len(optimizer.blocks) / 3)
        if not bench.budget.fits(expected):
            yield skipped(words, f"about {expected:.0f} s, and {bench.budget.stage_left:.0f} are left")
            return
        judge = drawn[-1]  # of the last line search: seen by no inner step
        before = float(problem.objective.loss(judge).detach())
        reports, seconds, peak = [], [], 0.0
        for outer in range(OUTER):
            own = drawn[outer * (minibatches + SEARCHED) :][: minibatches + SEARCHED]

            def step(own: list = own) -> None:
                reports.append(optimizer.step(own[:minibatches], own[minibatches:]))

            if outer == OUTER - 1:
                peak = peak_growth(
                    lambda step=step: seconds.append(seconds_of(step, bench.device)), bench.device
                )
            else:
                seconds.append(seconds_of(step, bench.device))
        after = float(problem.objective.loss(judge).detach())
    note = f"{before:.3f} to {after:.3f} nats per token; {', '.join(report.outcome for report in reports)}"
    yield holds(f"{words}: the loss goes down in {OUTER} outer steps", after < before, note)
    spent, counted = min(seconds), reports[-1].gradient_equivalents
    yield measured(
        f"{words}: an outer step", spent, "s", f"{minibatches} minibatches; a gradient {1e3 * unit:.3g} ms"
    )
    yield measured(f"{words}: an outer step in time", spent / unit, "gradients")
    yield measured(f"{words}: an outer step as counted", counted, "gradients")
    if memory > 0:
        yield measured(f"{words}: memory", peak / memory, "gradients' memory")
