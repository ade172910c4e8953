"""What a run says is one aligned line an event; without a terminal nothing else is written."""

from __future__ import annotations

import io
import math

import pytest
import torch
from rich.console import Console

from hessprobe.measuring.console import RunConsole
from hessprobe.measuring.row_recorder import Measurement
from tests.training.step_reports import report


def measurement(**changes) -> Measurement:
    row = {
        "off_block_energy": torch.tensor(0.25), "off_block_energy_stderr": torch.tensor(0.01),
        "step_curvature": torch.tensor([[[2.0, 1.0], [1.0, 4.0]]] * 2),
    }  # fmt: skip
    return Measurement(**{"probe": "cross_layer", "step": 3, "seconds": 0.5, "row": row, **changes})


def said(speak, *, terminal: bool = False, width: int = 80) -> str:
    """Returns what a console of 12 steps wrote while `speak(console)` ran."""
    out = io.StringIO()
    with RunConsole(12, console=Console(file=out, force_terminal=terminal, width=width)) as console:
        speak(console)
    return out.getvalue()


def test_without_a_terminal_lines_are_plain_and_nothing_is_drawn():
    def speak(console: RunConsole) -> None:
        console.say("resuming", "runs/a at step 3")
        console.step(3, report(step_size=0.5, predicted_decrease=0.2, actual_decrease=0.1), 5.25, "full_gn")
        console.measured(measurement())

    assert said(speak).splitlines() == [
        "resuming    runs/a at step 3",
        "step  3     full_gn  loss 5.5000  held-out 5.2500  step size 0.500  real/predicted 0.50",
        "  step  3   cross_layer: off-block energy 0.250 ± 0.010, cross share of the update's curvature +0.25  0.5 s",
    ]


def test_a_terminal_gets_a_progress_bar_that_is_gone_at_the_end():
    text = said(lambda console: console.step(3, report(), math.nan, "adamw"), terminal=True)
    assert "4/12 steps" in text
    assert "\x1b" in text
    last = text.rsplit("\n", 1)[-1]
    assert "steps" not in last


def test_what_does_not_exist_for_an_optimizer_is_left_out():
    line = said(lambda console: console.step(0, report(), math.nan, "adamw"))
    assert line.split() == ["step", "0", "adamw", "loss", "5.5000"]


@pytest.mark.parametrize(
    "outcome", ["rejected: no step size lowers the loss", "diverged: the loss is not finite"]
)
def test_a_step_that_was_not_taken_says_why(outcome):
    line = said(lambda console: console.step(1, report(outcome=outcome, step_size=0.0), 5.0, "full_gn"))
    assert line.rstrip().endswith(outcome)


def test_a_failed_probe_says_why_letter_by_letter():
    reason = "RuntimeError: shape [2, 3] in [/weird] :smile:"
    line = said(lambda console: console.measured(measurement(row=None, failure=reason)))
    assert line == f"  step  3   cross_layer: failed: {reason} (training goes on)\n"


@pytest.mark.parametrize("along", [0.0, math.nan], ids=["no update", "unknown update"])
def test_without_an_update_there_is_no_share(along):
    row = dict(measurement().row or {}, step_curvature=torch.full((2, 2, 2), along))
    assert "cross share" not in said(lambda console: console.measured(measurement(row=row)))


def test_each_probe_has_a_headline_of_its_own():
    spectra = torch.tensor([0.0, -0.25, -0.5])
    row = {"gn_gap": 0.5, "gn_gap_stderr": 0.125, "lambda_min": spectra}
    line = said(lambda console: console.measured(measurement(probe="gn_hessian", row=row)))
    assert line.endswith("gn_hessian: |H - G| / |G| 0.500 ± 0.125, least eigenvalue of H -0.25  0.5 s\n")
    line = said(
        lambda console: console.measured(
            measurement(probe="gn_hessian", row=row | {"lambda_min": spectra * math.nan})
        )
    )
    assert "eigenvalue" not in line
    # (draw, candidate, curvature_sequences, damping): the last size and the first damping count.
    held_out = torch.full((2, 3, 2, 2), 9.0)
    held_out[:, :, -1, 0] = torch.tensor([[0.25, 0.5, math.nan], [0.75, 1.0, math.nan]])
    row = {
        "efficiency_held_out": held_out,
        "efficiency_held_out_stderr": torch.full((2, 3, 2, 2), 0.0625),
        "candidate_failure": ["", "", "ValueError: no"],
    }
    line = said(lambda console: console.measured(measurement(probe="preconditioner", row=row)))
    assert line.endswith(
        "preconditioner: 2 candidates, the best held-out efficiency 0.750 ± 0.062, 1 failed  0.5 s\n"
    )
    row["efficiency_held_out"] = held_out * math.nan
    assert "efficiency" not in said(
        lambda console: console.measured(measurement(probe="preconditioner", row=row))
    )
    assert "mine: recorded" in said(lambda console: console.measured(measurement(probe="mine", row={})))


def test_a_narrow_window_does_not_break_a_line():
    assert said(lambda console: console.say("resuming", "x" * 200), width=40).count("\n") == 1
