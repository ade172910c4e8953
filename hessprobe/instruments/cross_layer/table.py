"""What the table `cross_layer` holds, by recipe: declared before anything is measured."""

from __future__ import annotations

from hessprobe.instruments.cross_layer.recipe import CrossLayerRecipe
from hessprobe.instruments.row_variables import MEASUREMENT_VARIABLES
from hessprobe.schema.table import Table, Variable, declared, of_quantity

DIRECTIONS = ("update", "negative_gradient")


def cross_layer_table(recipe: CrossLayerRecipe, blocks: tuple[str, ...]) -> Table:
    """Returns the table's layout; sketches are stored where block norms come from layer kernels."""
    labels = {"sketch": sketches(recipe), "other_sketch": sketches(recipe)} if recipe.uses_kernels else {}
    return Table(
        name="cross_layer",
        variables=(
            *of_quantity(_quantity(recipe), _norm_variables(_estimator(recipe))),
            *(_sketch_variables() if recipe.uses_kernels else ()),
            *_direction_variables(),
            *MEASUREMENT_VARIABLES,
        ),
        coordinates={
            "block": list(blocks),
            "other_block": list(blocks),
            "direction": list(DIRECTIONS),
            **labels,
        },
        attributes=_attributes(recipe),
    )


def sketches(recipe: CrossLayerRecipe) -> list[int]:
    """Returns the numbers of all sketches a row can hold: sequence by sequence, rounds one after another."""
    return list(range(recipe.sequences * recipe.most_rounds))


def _quantity(recipe: CrossLayerRecipe) -> str:
    return recipe.quantity if recipe.uses_kernels else "batch"  # products are the batch's own matrix's


def _estimator(recipe: CrossLayerRecipe) -> str:
    if not recipe.uses_kernels:
        return f"{recipe.samples} sign probes per block, {recipe.matrix} products (Hutchinson 1989)"
    return f"layer kernels, {recipe.rounds} {recipe.cotangent} sketch(es) per sequence, {recipe.quantity} quantity"


def _attributes(recipe: CrossLayerRecipe) -> dict[str, object]:
    if not recipe.uses_kernels:
        return {"method": "products", "matrix": recipe.matrix, "samples": recipe.samples, "quantity": "batch"}
    return {
        "method": "kernels",
        "matrix": recipe.matrix,
        "cotangent": recipe.cotangent,
        "quantity": recipe.quantity,
        "jacobi_damping": recipe.jacobi_damping,
        "coupling_error_wanted": recipe.coupling_error,
        "sketch_sequence": [s % recipe.sequences for s in sketches(recipe)],
        "sketch_round": [s // recipe.sequences for s in sketches(recipe)],
    }


def _norm_variables(estimator: str) -> tuple[Variable, ...]:
    pair, row = ("step", "block", "other_block"), ("step",)
    over = f"jackknife over {estimator}"
    spread = "spread over probes, or jackknife over sequences"
    interval = "Student's t on the logarithm, from fro2_stderr"
    entries = (
        ("fro2", pair, "nats^2", "squared Frobenius norm of the matrix's block", estimator),
        ("fro2_stderr", pair, "nats^2", "standard error of fro2", spread),
        ("fro2_low", pair, "nats^2", "lower end of fro2's 95 % interval", interval),
        ("fro2_high", pair, "nats^2", "upper end of fro2's 95 % interval", interval),
        ("coupling", pair, "1", "fro2[i,j] / sqrt(fro2[i,i] fro2[j,j])", over),
        ("coupling_stderr", pair, "1", "standard error of coupling", "jackknife"),
        ("off_block_energy", row, "1", "share of the squared norm outside the diagonal blocks", over),
        ("off_block_energy_stderr", row, "1", "standard error of off_block_energy", "jackknife"),
    )  # fmt: skip
    return declared(entries)


def _sketch_variables() -> tuple[Variable, ...]:
    return (
        Variable(
            name="kernel",
            dims=("step", "block", "sketch", "other_sketch"),
            units="nats^2",
            long_name="inner products <w_i, w_i'> of the block's parts of two sketches",
            estimator="exact for the sketches drawn",
            dtype="float32",
        ),
        Variable(
            name="alignment",
            dims=("step", "direction", "block", "sketch"),
            units="nats",
            long_name="inner products <w_i, d_i> of the block's parts of a sketch and the direction",
            estimator="exact for the sketches drawn",
        ),
        Variable(
            name="sequence_tokens",
            dims=("step", "sketch"),
            units="tokens",
            long_name="tokens with a target in the sketch's sequence",
            estimator="counted",
        ),
        Variable(
            name="jacobi_radius",
            dims=("step",),
            units="1",
            long_name="largest eigenvalue of (D + mu)^-1 (G + mu): layerwise steps overshoot by up to this",
            estimator="from the sketches' kernels: rather too high for few sketches",
        ),
        Variable(
            name="jacobi_radius_held_out",
            dims=("step",),
            units="1",
            long_name="jacobi_radius along a direction found on one half of the sequences, judged on the other",
            estimator="from the sketches' kernels, both ways averaged: rather too low",
        ),
        Variable(
            name="rounds",
            dims=("step",),
            units="sketches per sequence",
            long_name="rounds taken; fewer than asked for at most where the wanted coupling error was reached",
            estimator="counted",
        ),
        Variable(
            name="coupling_error",
            dims=("step",),
            units="1",
            long_name="mean standard error of the coupling over pairs",
            estimator="jackknife",
        ),
    )


def _direction_variables() -> tuple[Variable, ...]:
    exact = "exact on the batch: one Jacobian product per block"
    entries = (
        ("step_curvature", ("step", "direction", "block", "other_block"), "nats", "d_i . G_ij d_j", exact),
        ("step_slope", ("step", "direction", "block"), "nats", "g_i . d_i", "exact on the batch"),
        ("gradient_norm2", ("step", "block"), "nats^2", "squared norm of the block's gradient", "exact on the batch"),
    )  # fmt: skip
    return declared(entries)
