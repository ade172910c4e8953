"""The instrument of Gauss-Newton against Hessian: how far apart they are, and what that costs a step."""

from hessprobe.instruments.gn_hessian.recipe import GNHessianRecipe
from hessprobe.instruments.gn_hessian.table import gn_hessian_table
from hessprobe.instruments.instrument import Instrument, Quantity

_HERE = "hessprobe.instruments.gn_hessian"

INSTRUMENT = Instrument(
    name="gn_hessian",
    title="Gauss-Newton against Hessian",
    settings=GNHessianRecipe,
    table=gn_hessian_table,
    probe=f"{_HERE}.measure.probe:GNHessianProbe",
    headline=f"{_HERE}.headline:headline",
    answers=f"{_HERE}.answers:GNHessianAnswers",
    findings=f"{_HERE}.findings:findings",
    pictures=f"{_HERE}.pictures:pictures",
    content=f"{_HERE}.section:content",
    template="gn_hessian/section.html.j2",
    several_template="gn_hessian/several.html.j2",
    show=f"{_HERE}.terminal:show",
    compared_at="gn_gap",
    compared=(
        Quantity(
            name="gn_gap", words="the Hessian's distance from the Gauss-Newton matrix, in that one's norm"
        ),
    ),
)
