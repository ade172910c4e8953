"""Products from forward passes and gradients alone, where no second derivative exists.

H v = (grad L(theta + e v) - grad L(theta - e v)) / 2e, and G v = J^T (A (z(theta + e v) - z(theta - e v)) / 2e) with the
loss's own A = d2 loss / dz2 / N: whatever trains a model will do, fused attention, compiled parts, checkpoints of either
kind, functions without a second derivative, sharded parameters. Steps and errors: curvature/difference_steps.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hessprobe.curvature.difference_steps import DifferenceSteps, Named, StepErrors
from hessprobe.curvature.displaced import Displaced
from hessprobe.errors import UserError, unknown_name, warn
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition
from hessprobe.problem.shares import is_sharded
from hessprobe.problem.swapping import HALF

if TYPE_CHECKING:
    from hessprobe.curvature.model_operator import ModelOperator

FIRST_ORDER = "first-order"
# Steps are found on an eighth of a micro-batch, but on so many positions, or one sequence.
PART, LEAST, MOST = 8, 64, 512


def check_precision(dtype: torch.dtype) -> None:
    """Raises a UserError for weights of half precision."""
    if dtype in HALF:
        kind = str(dtype).removeprefix("torch.")
        raise UserError(
            f"engine {FIRST_ORDER!r}: the weights are {kind}, in which differences of two passes are rounding alone: "
            "pass parameters=partition.vector(model).float(), and the model computes in float32"
        )


class FirstOrderProducts:
    """A model operator's products by differences, row by row.

    Args:
        kind: the operator's class.
        batches: of all processes.
        theta: values by name; None: the model's own.
        compare: whether an exact engine is asked for one product on the sample.
    """

    def __init__(
        self,
        kind: type[ModelOperator],
        batches: MicroBatches,
        partition: Partition,
        theta: Named | None,
        *,
        compare: bool,
    ) -> None:
        self.kind, self.batches, self.partition, self.theta = kind, batches, partition, theta
        self.objective = batches.objective
        self.passes = Displaced(self.objective, partition, theta)
        self.compare = compare and not self.passes.sharded

    def apply(
        self,
        one: Callable[[Batch, Named, float, Sequence[str]], Named],
        pieces: Sequence[Batch],
        v: Tensor,
        moved: Sequence[str],
        wanted: Sequence[str],
    ) -> Tensor:
        """Returns the products (k, p) of v's rows on the parameters `moved`, summed over pieces; others than `wanted` are 0.

        Args:
            one: (piece, v, e, wanted) -> its share of A v by name.
        """
        product = torch.zeros_like(v)
        if not pieces:
            return product
        for row, into in zip(v, product, strict=True):
            whole, shares = self.partition.unflatten(row), self.partition.unflatten(into)
            along = {name: whole[name] for name in moved}
            e = self.step(along)
            for batch in pieces if e else ():
                for name, part in one(batch, along, e, wanted).items():
                    shares[name].add_(part)
        return product

    def step(self, v: Named) -> float:
        """Returns the e for a direction by name: 0 for that of length 0, NaN where it is not finite."""
        length = float(torch.stack([x.double().square().sum() for x in v.values()]).sum())
        return self.steps.of(v) if math.isfinite(length) and length else math.nan if length else 0.0

    @property
    def errors(self) -> StepErrors | None:
        """What products are worth; None before the first one."""
        return self.steps.errors if "steps" in self.__dict__ else None

    def measure_steps(self, v: Tensor) -> StepErrors | None:
        """Estimates the errors of differences along v (p,), whose steps all products take from now on.

        Returns None where the product is zero. Cost: about eight products on few sequences, and an exact one.

        Raises:
            UserError: see `DifferenceSteps.measure`.
        """
        return self.steps.measure(self.partition.unflatten(v))

    @cached_property
    def steps(self) -> DifferenceSteps:
        """What finds e, on a few sequences of the first micro-batch with a target."""
        objective, batch = self.objective, self.batches.with_targets[:1]
        ((count, positions),) = batch.shapes
        cuts = objective.split(batch[0], _cuts(count * positions, count))
        sample = batch.parted(cuts).with_targets[:1]
        theta = None if self.theta is None else self.partition.flatten(dict(self.theta))
        at, own = sample[0], self._operator(sample, theta, FIRST_ORDER)

        def curve(z: Tensor, tangents: Tensor) -> Tensor:
            return objective.loss_function.hessian_product(z, objective.targets(at), tangents) / own.weight

        return DifferenceSteps(
            self.passes,
            at,
            lambda v, e: own._by_differences(at, v, e, tuple(v)),
            curve,
            lambda v: self._exact(v, sample, theta) if self.compare else None,
            self._agreed,
        )

    def _operator(self, sample: MicroBatches, theta: Tensor | None, engine: str) -> ModelOperator:
        return self.kind(self.objective.alone, sample, self.partition, parameters=theta, engine=engine)

    def _exact(self, v: Named, sample: MicroBatches, theta: Tensor | None) -> Named | None:
        """Returns A v on the sample by the best of the other engines, by v's names; None where the model has none."""
        first = next(iter(v.values()))
        row = torch.zeros(1, self.partition.size, dtype=first.dtype, device=first.device)
        into = self.partition.unflatten(row[0])
        for name, along in v.items():
            into[name].copy_(along)
        try:
            found = self._operator(sample, theta, "exact").apply(row)
        except (RuntimeError, NotImplementedError, MemoryError, UserError):
            return None
        whole = self.partition.unflatten(found[0])
        return {name: whole[name] for name in v}

    def _agreed(self, number: float) -> float:
        """Returns the mean over processes where all must take the same e: each moves its own part of the parameters."""
        processes = self.objective.processes
        if not self.passes.sharded or processes.count == 1:
            return number
        here = torch.tensor(
            number, dtype=torch.float64, device=next(self.objective.model.parameters()).device
        )
        return float(processes.total(here)[0]) / processes.count


def _cuts(positions: int, sequences: int) -> int:
    """Returns into how many parts a micro-batch is cut, of which steps are found on one."""
    return max(1, min(sequences, max(positions // MOST, min(PART, positions // LEAST))))


def warn_of_differences(operator: str, model: str, errors: StepErrors | None) -> None:
    """Warns that an operator's products are from differences, and says what they are worth."""
    warn(
        f"{operator}: {model} has no second derivatives, so products are from differences of gradients and forward passes "
        f"(engine {FIRST_ORDER!r}), with a relative error of about {errors.error if errors else 0.0:.0e} (step_errors); "
        'engine="exact" raises instead'
    )


def engines_of(kind: type[ModelOperator], objective: Objective, dtype: torch.dtype, engine: str) -> list[str]:
    """Returns the engines that an operator tries, in their order.

    Raises:
        UserError: no such engine, one that sharded parameters do not have, or differences in half precision.
    """
    exact = [name for name in kind.ENGINES if name != FIRST_ORDER]
    sets = {"auto": list(kind.ENGINES), "exact": exact, **{name: [name] for name in kind.ENGINES}}
    if engine not in sets:
        raise unknown_name(f"{kind.__name__} engine", engine, list(sets))
    sharded = is_sharded(objective.model)
    if sharded and FIRST_ORDER not in sets[engine]:
        raise UserError(
            f"engine={engine!r}: parameters sharded over devices have neither a forward mode nor second derivatives: "
            f"leave out engine=, or pass engine={FIRST_ORDER!r}"
        )
    if sharded or engine == FIRST_ORDER:
        check_precision(dtype)
    return [FIRST_ORDER] if sharded else sets[engine]
