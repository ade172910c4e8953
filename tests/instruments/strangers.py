"""Packages of other people in a temporary folder, each with an entry point as an installer leaves it."""

from __future__ import annotations

from pathlib import Path

from hessprobe.instruments import registry

# The whole instrument of a stranger: settings, table and probe; the example of instruments/README.md is like it.
WEIGHTS = '''
"""How large the weights of every block are."""

from hessprobe.instruments.instrument import Instrument
from hessprobe.instruments.probe import Probe
from hessprobe.schema.section import Positive, Section
from hessprobe.instruments.row_variables import MEASUREMENT_VARIABLES
from hessprobe.schema.table import Table, Variable


class WeightsRecipe(Section):
    every: Positive = 2
    sequences: Positive = 4


def weights_table(settings, blocks):
    def variable(name, dims, long_name):
        return Variable(name=name, dims=dims, units="parameter units", long_name=long_name, estimator="exact")

    variables = (
        variable("norm", ("step",), "the norm of all weights"),
        variable("norm_stderr", ("step",), "its error"),
        variable("block_norm", ("step", "block"), "the norm of each block's weights"),
        variable("block_product", ("step", "block", "other_block"), "products of the blocks' norms"),
    )
    labels = {"block": blocks, "other_block": blocks}
    return Table(name="weights", variables=(*variables, *MEASUREMENT_VARIABLES), coordinates=labels)


class WeightsProbe(Probe):
    name = "weights"

    def __init__(self, settings):
        self.settings, self.every, self.sequences = settings, settings.every, settings.sequences

    def table(self, partition):
        return weights_table(self.settings, partition.blocks)

    def measure(self, snapshot):
        objective, batches = snapshot.objective, snapshot.batches
        loss, _ = objective.gradient(batches, snapshot.partition, snapshot.named_parameters)
        blocks = snapshot.parameters.new_tensor(
            [snapshot.parameters[where].norm() for where in snapshot.partition.slices.values()]
        )
        return {
            "norm": blocks.norm(),
            "norm_stderr": 0.01,
            "block_norm": blocks,
            "block_product": blocks[:, None] * blocks,
            "loss": loss,
            "tokens": objective.tokens(batches),
            "sequences": sum(objective.sequence_shape(batch)[0] for batch in batches),
            "damping": 0.0,
            "symmetry_gap": 0.0,
            "gradient_equivalents": 1.0,
        }

    def cost(self, partition):
        return 1.0

    def vectors(self, partition):
        return 1.0


INSTRUMENT = Instrument(
    name="weights",
    title="Weights",
    settings=WeightsRecipe,
    table=weights_table,
    probe="weights_of_mine:WeightsProbe",
)
'''


def install(folder: Path, module: str, source: str, points: dict[str, str] | None = None) -> Path:
    """Writes a module and its dist-info with entry points into a folder, which is then one of sys.path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n", encoding="utf-8")
    named = points or {"mine": f"{module}:INSTRUMENT"}
    lines = [f"[{registry.GROUP}]", *(f"{name} = {value}" for name, value in named.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
