"""The steps of first-order optimizers with the gradient, at learning rate 1, without weight decay and clipping.

Where the optimizer is the one that runs and has taken a step, from a copy of its state. A STATE WITH MOMENTUM ANSWERS WITH
MOMENTUM: d is then mostly made of the gradients of the steps before, at other thetas and on other data; that is what the
optimizer would do here, not what its preconditioner makes of g. Elsewhere from a state built on the place's batches, whose
momentum holds gradients of theirs alone.

Cost, in gradients of the place's batches: 2 for sophia (when running, in the steps in which its curvature is due); for the
others none when running, 1 when built.
"""

from __future__ import annotations

from functools import partial

from hessprobe.instruments.preconditioner.measure.candidates.candidate import (
    Candidate,
    Directions,
    Occasion,
    for_every_damping,
)
from hessprobe.optimization.optimizer_steps import built_step, has_run, running_step


def _step(name: str, asked: Occasion) -> Directions:
    running = asked.snapshot.optimizer
    if has_run(running, name):
        return for_every_damping(asked, running_step(running, asked.place, asked.generator))
    return for_every_damping(asked, built_step(name, asked.place, asked.generator))


adam = Candidate(answer=partial(_step, "adam"), most_gradients=1.0)
sophia = Candidate(answer=partial(_step, "sophia"), most_gradients=2.0)
muon = Candidate(answer=partial(_step, "muon"), most_gradients=1.0)
shampoo = Candidate(answer=partial(_step, "shampoo"), most_gradients=1.0)
soap = Candidate(answer=partial(_step, "soap"), most_gradients=1.0)
