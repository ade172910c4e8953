"""What training reached, in a sentence."""

from __future__ import annotations

from hessprobe.instruments.train.answers import TrainAnswers
from hessprobe.reading.finding import Finding
from hessprobe.reading.wording import counted


def findings(answers: TrainAnswers) -> list[Finding]:
    """Returns the finding on the held-out loss; none where it was never evaluated."""
    summary = answers.summary
    if summary is None or summary.best_step is None:
        return []
    first, best, step = summary.first_held_out_loss, summary.best_held_out_loss, summary.best_step
    fell = best < first
    return [
        Finding(
            name="held_out_loss",
            sentence=f"The held-out loss fell from {first:.4g} nats per token after step "
            f"{summary.first_held_out_step:,} to {best:.4g} after step {step:,}, its best."
            if fell
            else f"The held-out loss has not fallen below its first value, {first:.4g} nats per token.",
            value=best,
            stderr=None,
            basis=f"{counted(summary.steps, 'step')}, {summary.tokens:,} training tokens",
            steps=(step,),
            headline=f"{best:.4g}",
            label=f"best held-out loss, nats per token (step {summary.first_held_out_step:,}: {first:.4g})",
            resolved=fell,
        )
    ]
