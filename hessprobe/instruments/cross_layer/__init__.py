"""The instrument of cross-layer coupling: how large every block of G is, and what a step sees of the pairs."""

from hessprobe.instruments.cross_layer.recipe import CrossLayerRecipe
from hessprobe.instruments.cross_layer.table import cross_layer_table
from hessprobe.instruments.instrument import Instrument, Quantity

_HERE = "hessprobe.instruments.cross_layer"

INSTRUMENT = Instrument(
    name="cross_layer",
    title="Cross-layer importance",
    settings=CrossLayerRecipe,
    table=cross_layer_table,
    probe=f"{_HERE}.measure.probe:CrossLayerProbe",
    headline=f"{_HERE}.headline:headline",
    answers=f"{_HERE}.answers:CrossLayerAnswers",
    findings=f"{_HERE}.findings:findings",
    pictures=f"{_HERE}.pictures:pictures",
    content=f"{_HERE}.section:content",
    template="cross_layer/section.html.j2",
    several_template="cross_layer/several.html.j2",
    show=f"{_HERE}.terminal:show",
    compared_at="coupling",
    agree=f"{_HERE}.answers:at_one_damping",
    compared=(
        Quantity(
            name="off_block_energy",
            words="the share of the curvature matrix's squared norm between layers",
            share=True,
        ),
        Quantity(
            name="full_over_layerwise",
            words="what joining all layers adds to the layerwise held-out decrease",
            share=True,
        ),
        Quantity(
            name="coupling_by_distance",
            words="how far coupling falls from neighbours to the layers farthest apart",
        ),
    ),
)
