"""What a recorder refuses where parameters are shards, by the probe's name and with what can be had instead."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from hessprobe.any_loop.recorder import Recorder
from hessprobe.any_loop.sharded_parameters import check_whole
from hessprobe.errors import UserError
from hessprobe.instruments.cross_layer.measure.probe import CrossLayerProbe
from hessprobe.instruments.gn_hessian.measure.probe import GNHessianProbe
from hessprobe.instruments.preconditioner.measure.probe import PreconditionerProbe
from hessprobe.instruments.snapshot import Probe
from hessprobe.recipe import CrossLayerRecipe, GNHessianRecipe, PreconditionerRecipe
from tests.any_loop.loops import build

KERNELS = CrossLayerProbe(CrossLayerRecipe())
PRODUCTS = CrossLayerProbe(CrossLayerRecipe(method="products"))
SECOND_ORDER: list[Probe] = [
    GNHessianProbe(GNHessianRecipe()),
    PreconditionerProbe(PreconditionerRecipe()),
    PRODUCTS,
]


def sharded() -> nn.Module:
    model = build()
    model[0].weight.placements = ("Shard(0)",)  # type: ignore[index]  # as a DTensor's
    return model


def test_a_recorder_refuses_what_shards_do_not_have_with_the_way_out(tmp_path):
    said = (
        "parameters are sharded over devices (1 of them, such as '0.weight'), which have neither a forward mode nor second "
        "derivatives, and gn_hessian cannot do without: record cross_layer from layer kernels alone, whose backward passes "
        "can, or record under DistributedDataParallel, or measure a checkpoint (hessprobe probe)"
    )
    with pytest.raises(UserError, match=re.escape(said)):
        Recorder(tmp_path / "run", sharded(), ["cross_layer", "gn_hessian"], partition="module")
    assert not (tmp_path / "run").exists()


def test_only_what_needs_more_than_backward_passes_is_refused_by_name():
    check_whole(sharded(), [KERNELS])
    for probe in SECOND_ORDER:
        said = f"neither a forward mode nor second derivatives, and {probe.name} cannot do without: record cross_layer from"
        with pytest.raises(UserError, match=said):
            check_whole(sharded(), [KERNELS, probe])
    check_whole(build(), SECOND_ORDER)


def test_parameters_flattened_into_one_are_refused_whatever_the_probe():
    model = nn.Module()
    model.register_parameter("_flat_param", nn.Parameter(torch.zeros(9)))
    with pytest.raises(
        UserError, match="FullyShardedDataParallel has flattened .*'_flat_param'.* fully_shard instead"
    ):
        check_whole(model, [KERNELS])
