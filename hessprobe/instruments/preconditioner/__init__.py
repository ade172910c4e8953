"""The instrument of preconditioners: how much of the damped Gauss-Newton decrease each candidate reaches."""

from hessprobe.instruments.instrument import Instrument, Quantity
from hessprobe.instruments.preconditioner.recipe import PreconditionerRecipe
from hessprobe.instruments.preconditioner.table import asked_with, preconditioner_table

_HERE = "hessprobe.instruments.preconditioner"

INSTRUMENT = Instrument(
    name="preconditioner",
    title="Preconditioners",
    settings=PreconditionerRecipe,
    table=preconditioner_table,
    probe=f"{_HERE}.measure.probe:PreconditionerProbe",
    headline=f"{_HERE}.headline:headline",
    answers=f"{_HERE}.answers:PreconditionerAnswers",
    findings=f"{_HERE}.findings:findings",
    pictures=f"{_HERE}.pictures:pictures",
    content=f"{_HERE}.section:content",
    template="preconditioner/section.html.j2",
    several_template="preconditioner/several.html.j2",
    show=f"{_HERE}.terminal:show",
    compared=(
        Quantity(
            name="layerwise_over_full",
            words="the held-out decrease of layerwise over full Gauss-Newton",
            alike=asked_with,
        ),
        Quantity(
            name="update_efficiency",
            words="the held-out efficiency of the run's own update",
            share=True,
            alike=asked_with,
        ),
    ),
)
