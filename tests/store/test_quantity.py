"""Every norm says of which matrix it is: the batch's own, or the expected one over sequences like these."""

from __future__ import annotations

import pytest

from hessprobe.instruments.cross_layer.table import cross_layer_table
from hessprobe.instruments.gn_hessian.table import gn_hessian_table
from hessprobe.recipe import CrossLayerRecipe, GNHessianRecipe
from hessprobe.store import RunWriter, open_run

NORMS = ("fro2", "fro2_stderr", "fro2_low", "coupling", "coupling_stderr", "off_block_energy")
SETTINGS = [
    ({}, "population"),
    ({"quantity": "batch", "rounds": 2}, "batch"),
    ({"method": "products"}, "batch"),
]


@pytest.mark.parametrize(("settings", "quantity"), SETTINGS)
def test_couplings_say_of_which_matrix_they_are(settings, quantity, tmp_path):
    table = cross_layer_table(CrossLayerRecipe(**settings), ("a", "b"))
    with RunWriter.create(tmp_path / "run", {}) as writer:
        writer.add_table(table, [0])
    read = open_run(tmp_path / "run")["cross_layer"]
    assert {read[name].attrs["quantity"] for name in NORMS} == {quantity} == {read.attrs["quantity"]}
    assert "quantity" not in read["loss"].attrs  # there is one of it


def test_hessian_and_gauss_newton_are_the_batch_s():
    table = gn_hessian_table(GNHessianRecipe(), ("a", "b"))
    own = {v.name: v.quantity for v in table.variables}
    assert {own[name] for name in ("fro2", "trace", "gn_gap", "block_fro2", "block_trace")} == {"batch"}
    assert table.attributes["quantity"] == "batch"
