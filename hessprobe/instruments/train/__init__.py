"""The table that every run of training has: no probe fills it, it is read as instruments' tables are."""

from collections.abc import Sequence

from hessprobe.instruments.instrument import Instrument
from hessprobe.instruments.train.table import train_table
from hessprobe.schema.section import Section
from hessprobe.schema.table import Table

_HERE = "hessprobe.instruments.train"


def _table(settings: Section | None, blocks: Sequence[str]) -> Table:
    return train_table(step_sizes=(1.0,), inner_steps=1)


INSTRUMENT = Instrument(
    name="train",
    title="Training",
    table=_table,
    answers=f"{_HERE}.answers:TrainAnswers",
    findings=f"{_HERE}.findings:findings",
    pictures=f"{_HERE}.pictures:pictures",
    content=f"{_HERE}.section:content",
    template="train/section.html.j2",
    several_template="train/several.html.j2",
    show=f"{_HERE}.terminal:show",
    anchor="training",
    compared=(),
    recorded_by="hessprobe train",
)
