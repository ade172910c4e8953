"""How often a round of layer kernels and its plan would make the host wait for a GPU: not more with more layers."""

from __future__ import annotations

from collections import Counter

import pytest

from hessprobe.kernels.layer_kernels import layer_kernels
from hessprobe.kernels.verification import verified_plan
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests.kernels.stream_settings import text, tiny
from tests.models import seeded
from tests.waits import waits_of

# Where modules' inputs and gradients are held for another pass: how much, of which the GPU knows nothing.
HELD = Counter(tolist=1)
# A micro-batch: its targets' range, its tokens, and whether its outputs are numbers. All together: the tokens that occur
# (the embedding's rows); the loss, its weight, the kernels, the sequences' tokens; whether the kernels are finite.
MICRO_BATCH, ONCE = (
    Counter(tolist=1, _local_scalar_dense=2),
    Counter(_unique2=1, _local_scalar_dense=3, cpu=2),
)
# Targets' range and the tokens twice, of which one is for the longest; which sequence; NaN; the embedding's rows; the true
# gradients' norms, and every tap's own and all sequences' norm.
PLAN = Counter(tolist=4, _local_scalar_dense=4, _unique2=1)


def times(count: Counter[str], n: int) -> Counter[str]:
    return Counter({name: n * found for name, found in count.items()})


@pytest.mark.parametrize("layers", [2, 6])
@pytest.mark.parametrize("cotangent", ["sampled", "sign"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_call_waits_as_often_with_more_layers(layers, cotangent, micro_batches):
    model, batches = tiny(layers=layers), text(*[(3, 4)] * micro_batches)
    objective, partition = Objective(model), Partition.of(model)
    plan = verified_plan(objective, batches, partition)

    def call() -> None:
        layer_kernels(
            objective, batches, partition, rounds=2, plan=plan, generator=seeded(3), cotangent=cotangent
        )

    assert Counter(waits_of(call)) == times(MICRO_BATCH, micro_batches) + ONCE + HELD


@pytest.mark.parametrize("rounds", [1, 4])
def test_a_round_more_waits_no_more(rounds):
    model, batches = tiny(layers=2), text((3, 4))
    objective, partition = Objective(model), Partition.of(model)
    plan = verified_plan(objective, batches, partition)
    found = waits_of(
        lambda: layer_kernels(objective, batches, partition, rounds=rounds, plan=plan, generator=seeded(3))
    )
    assert Counter(found) == MICRO_BATCH + ONCE + (HELD if rounds > 1 else Counter())


@pytest.mark.parametrize("layers", [2, 6])
def test_a_plan_waits_as_often_with_more_layers(layers):
    model, batches = tiny(layers=layers), text((3, 4))
    objective, partition = Objective(model), Partition.of(model)
    assert Counter(waits_of(lambda: verified_plan(objective, batches, partition))) == PLAN
