"""Settings and groups of blocks that do not exist are refused at once, with those that do."""

from __future__ import annotations

import math

import pytest
import torch

from hessprobe.errors import UserError
from hessprobe.optimization.gauss_newton import GaussNewton
from hessprobe.optimization.inner_problem import GaussNewtonSettings, groups_of
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models
from tests.optimization.stepping import fresh, text, theta_of

# The zoo's perceptrons have no layers whose names mean anything.
pytestmark = pytest.mark.filterwarnings("ignore:layer partition")


def test_groups_keep_every_block_once_in_the_partitions_order():
    partition = Partition.of(models.ZOO["decoder"](models.seeded(1)).model)
    assert partition.blocks == ("embedding", "block.0", "block.1", "head")
    assert groups_of("full", partition) == (partition.blocks,)
    assert groups_of("layerwise", partition) == (("embedding",), ("block.0",), ("block.1",), ("head",))
    given = (("head", "block.0"), ("block.1", "embedding"))
    assert groups_of(given, partition) == (("block.0", "head"), ("embedding", "block.1"))


def test_the_grid_is_the_studys_for_full_and_for_several_groups():
    assert [len(GaussNewtonSettings().step_sizes(groups)) for groups in (1, 2, 14)] == [5, 10, 10]
    assert len(GaussNewtonSettings(line_search_grid=3).step_sizes(14)) == 3


def test_a_run_of_unknown_length_does_not_stop_learning():
    assert GaussNewtonSettings().course == "inner-cosine"
    assert GaussNewtonSettings(outer_steps=5).course == "global-cosine"
    assert GaussNewtonSettings(outer_steps=5, schedule="constant").course == "constant"
    case, optimizer = fresh("decoder_ragged", solver="adamw", outer_steps=None)
    for i in range(3):
        before = theta_of(case)
        assert optimizer.step(text(10 + i)).outcome == "accepted"
        assert not torch.equal(theta_of(case), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"structure": "diagonal"}, "no structure named 'diagonal'.*full, layerwise, groups of block names"),
        ({"structure": ["body", "head"]}, "wanted 'full', 'layerwise' or groups .* one group is 'body'"),
        ({"structure": ()}, r"groups of block names, such as .*, got \(\)"),
        ({"structure": [["body"], []]}, r"one group is \[\]"),
        ({"structure": 3}, "groups of block names, such as .*, got 3"),
        ({"structure": [["0", "tail"], ["2", "neck"]]}, r"no block named 'tail', 'neck'. Valid: 0, 2"),
        ({"structure": [["0"]]}, "no group holds 2; every block needs one"),
        ({"structure": [["0", "2"], ["0"]]}, "0 named more than once"),
        ({"model": "cubic"}, "no model of the loss named 'cubic'.*quadratic, prox-linear"),
        ({"solver": "sgd"}, "no inner solver named 'sgd'.*muon, adamw, soap.*cg"),
        ({"solver": "sophia"}, "no inner solver named 'sophia'"),  # it wants more than gradients
        ({"schedule": "global-cosine"}, "say how long it is with outer_steps"),
        ({"schedule": "linear"}, "no schedule named 'linear'.*global-cosine, inner-cosine, constant"),
        (
            {"solver": "cg", "model": "prox-linear"},
            "no solver 'cg' for model 'prox-linear'.*There are: quadratic with muon, adamw, soap.*prox-linear with",
        ),
        ({"solver": "cg", "inner_steps": 3}, "inner_steps 3 with solver 'cg'.*cg_iterations"),
        ({"inner_steps": 0}, "inner_steps must be a whole number of at least 1, got 0"),
        ({"inner_steps": 2.5}, "inner_steps must be a whole number"),
        ({"cg_iterations": 0}, "cg_iterations must be a whole number of at least 1"),
        ({"outer_steps": 0}, "outer_steps must be a whole number of at least 1"),
        ({"cg_tolerance": 0.0}, "cg_tolerance must be positive"),
        ({"learning_rate": -1.0}, "learning_rate must be positive, got -1.0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"clip": 0.0}, "clip must be positive, got 0.0: None does not clip"),
        ({"damping": -0.1}, "damping must be 0 or more, got -0.1"),
        ({"damping": math.inf}, "damping must be 0 or more, got inf"),
        ({"line_search_grid": 0}, "the grid of step sizes needs at least 1 entry, got 0"),
        ({"momentum": 0.9}, "no option of GaussNewton named 'momentum'.*structure, model, solver, damping"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_what_does_not_exist_is_refused_when_the_optimizer_is_made(settings, message):
    problem = models.ZOO["mlp_regression"](models.seeded(7))
    objective = Objective(problem.model, loss=problem.loss)
    with pytest.raises(UserError, match=message):
        GaussNewton(problem.model, objective, partition="module", **settings)
