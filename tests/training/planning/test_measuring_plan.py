"""Before a run one reads what its probes will cost: rows, gradients in the training's unit, memory, and a way out."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace

import pytest

from hessprobe.cli import main
from hessprobe.errors import UserError
from hessprobe.instruments.cross_layer.measure.probe import CrossLayerProbe
from hessprobe.instruments.gn_hessian.measure.probe import GNHessianProbe
from hessprobe.models.transformer import Decoder
from hessprobe.problem.partition import Partition
from hessprobe.recipe import Recipe, build_recipe, read_recipe
from hessprobe.training.builds import decoder_config
from hessprobe.training.planning.estimate import cost, pass_memory
from hessprobe.training.planning.measuring_plan import ProbePlan, measuring_lines, plan_measuring
from hessprobe.training.planning.plan import plan


def nano(*settings: str) -> Recipe:
    return build_recipe(read_recipe("nano"), list(settings))


def one(**changes) -> ProbePlan:
    plan = ProbePlan(
        name="gn_hessian",
        steps=100,
        every=10,
        sequences=32,
        per_row=40.0,
        gradients=400.0,
        share=0.8,
        memory=2.0**30,
        lighter="fewer gn_hessian.sequences",
    )
    return replace(plan, **changes)


def said(plans: list[ProbePlan], most: float = 0.5) -> list[str]:
    return [f"{label}|{text}" for label, text in measuring_lines(plans, most)]


def test_rows_gradients_and_share_are_counted_in_the_trainings_unit():
    recipe = nano("probes=['cross_layer', 'gn_hessian']", "optimizer.sequences=16", "gn_hessian.every=7")
    model = Decoder(decoder_config(recipe), generator=None)
    partition = Partition.of(model)
    training = recipe.optimizer.minibatches + 17 * cost(recipe.optimizer, model, partition)
    coupling, gn_hessian = plan_measuring(recipe)
    assert (coupling.name, coupling.rows, coupling.sequences) == ("cross_layer", 6, 64)
    assert (gn_hessian.name, gn_hessian.rows) == ("gn_hessian", 3)  # steps 0, 7 and 14
    for found, probe in (
        (coupling, CrossLayerProbe(recipe.cross_layer)),
        (gn_hessian, GNHessianProbe(recipe.gn_hessian)),
    ):
        assert found.per_row == probe.cost(partition)
        assert found.gradients == pytest.approx(found.rows * found.per_row * probe.unit_sequences / 16)
        assert found.share == pytest.approx(found.gradients / training)


@pytest.mark.parametrize("mib", [1, 100])
def test_memory_holds_the_vectors_a_pass_and_what_the_bound_lets_in_beside_it(mib):
    recipe = nano("probes=['gn_hessian', 'cross_layer']", f"gn_hessian.memory_mib={mib}")
    model = Decoder(decoder_config(recipe), generator=None)
    partition = Partition.of(model)
    gn_hessian, coupling = plan_measuring(recipe)
    for found, probe, beside in (
        (gn_hessian, GNHessianProbe(recipe.gn_hessian), mib * 2**20),
        (coupling, CrossLayerProbe(recipe.cross_layer), 0),  # layer kernels: one pass after the other
    ):
        one_pass = max(pass_memory(model.config, probe.unit_sequences).values())
        assert found.memory == pytest.approx(
            4 * partition.size * probe.vectors(partition) + one_pass + beside
        )


def test_a_probe_within_its_share_takes_one_line():
    assert said([one(share=0.5)]) == [
        "measuring|gn_hessian  10 rows x 40 gradients of 32 sequences = 400 of a minibatch, 50% of training's; "
        "about 1.0 GiB"
    ]
    assert "1 row x" in said([one(steps=1, share=0.1)])[0]
    assert said([]) == []


def test_a_probe_above_its_share_says_so_with_a_way_out_that_keeps_to_it():
    lines = said([one(), one(name="cross_layer", share=0.1)])
    assert [line.partition("|")[0] for line in lines] == ["measuring", "", "hint"]
    # Half of training is 6 rows at the most; every 17 steps makes 6 of 100.
    assert lines[-1] == (
        "hint|gn_hessian takes over 50% of training (training.probe_share): --set gn_hessian.every=17 takes 48%; "
        "or a lighter row: fewer gn_hessian.sequences"
    )
    assert "and one row alone does; make it lighter: fewer" in said([one(share=6.0)])[-1]
    assert len(said([one()], most=0.9)) == 1


@pytest.mark.parametrize("steps", [1, 7, 18, 100])
@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize("most", [0.05, 0.3, 0.5])
def test_the_way_out_is_the_smallest_that_keeps_to_the_share(steps, every, most):
    found = one(steps=steps, every=every, share=0.91)
    row = found.share / found.rows
    fitting = [n for n in range(1, steps + 1) if math.ceil(steps / n) * row <= most]
    way_out = found.every_within(most)
    assert way_out == (
        None if not fitting else (fitting[0], pytest.approx(math.ceil(steps / fitting[0]) * row))
    )


def test_the_setting_named_is_one_that_exists():
    light, standard = (
        plan_measuring(nano("probes=['gn_hessian']", f"gn_hessian.preset={preset}"))[0].lighter
        for preset in ("light", "standard")
    )
    assert (light, standard) == ("fewer gn_hessian.sequences", "--set gn_hessian.preset=light")
    assert plan_measuring(nano("probes=['cross_layer']"))[0].lighter == "fewer cross_layer.sequences"
    for setting in ("gn_hessian.sequences=4", "gn_hessian.preset=light", "cross_layer.sequences=4"):
        nano(setting)


def test_a_dry_run_says_it_too_and_without_probes_nothing():
    text = plan(nano("probes=['cross_layer']", "training.probe_share=0.01"))
    assert "\nmeasuring cross_layer  6 rows x " in text and "\nhint      cross_layer takes over 1% " in text
    assert "measuring" not in plan(nano())


def test_every_is_of_all_probes_on_the_command_line(monkeypatch, capsys):
    words = "hessprobe train --dry-run --probe cross_layer,gn_hessian --every 9 --set training.probe_share=9"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    lines = capsys.readouterr().out.splitlines()
    assert [re.findall(r"(\w+) +(\d+) rows x", line)[0] for line in lines if " rows x" in line] == [
        ("cross_layer", "2"),
        ("gn_hessian", "2"),
    ]


def test_mistakes_are_found_before_a_folder_is_made():
    with pytest.raises(UserError, match="density_blocks"):
        plan_measuring(nano("probes=['gn_hessian']", "gn_hessian.density_blocks=['block.99']"))
    with pytest.raises(UserError, match="probe_share"):
        nano("training.probe_share=0")
