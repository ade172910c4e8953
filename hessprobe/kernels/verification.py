"""A plan is trusted only after every way in it has shown one sequence's true gradient, and no other sequence's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.kernels.plan import MASKED, ONE_SEQUENCE, NotOneCall, Plan, first_plan, without
from hessprobe.kernels.sequence_gradients import sequence_gradients, watched
from hessprobe.kernels.stream import Cotangents, Stream
from hessprobe.problem.objective import Batch, Objective, with_parameters
from hessprobe.problem.partition import Partition


def verified_plan(
    objective: Objective, batch: Batch, partition: Partition, parameters: Tensor | None = None
) -> Plan:
    """Returns a plan in which every fast path has shown one sequence's true gradient, and no other sequence's.

    The loss of a single sequence is pulled back through the taps and by autograd: each tap's diagonal entry of K must
    be its parameters' squared gradient norm, and zero for every other sequence. What fails falls back. Cost: about 2
    gradients, once; hand the plan to later calls on the same model.
    """
    plan = first_plan(objective, partition)
    theta = _shaken(objective, partition, parameters)
    count, positions = objective.sequence_shape(batch)
    valid = objective.loss_function.valid(objective.targets(batch)).view(count, positions)
    chosen = int(valid.sum(1).argmax())
    generator = torch.Generator().manual_seed(0)

    def one_sequence(number: int, z: Tensor, targets: Tensor) -> Tensor:
        noise = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)
        only = torch.zeros_like(noise).view(count, positions, -1)
        only[chosen] = noise.view(count, positions, -1)[chosen] * valid[chosen, :, None]
        return only.view_as(noise)

    state = generator.get_state()
    numbers = {name: i for i, name in enumerate(partition.names)}
    while True:
        taps_alone = Plan(taps=plan.taps, fallback=())
        stream = Stream(objective, partition, taps_alone, theta=theta, groups=numbers)
        try:
            stream.run([batch], 1, one_sequence)
            break
        except NotOneCall as refused:
            plan = without(plan, {id(refused.tap)})
            generator.set_state(state)
    generator.set_state(state)
    with watched(objective.model):
        truth, cotangent = _true_gradients(objective, batch, partition, theta, one_sequence)
        norms = {n: 0.0 if g is None else float(g.double().square().sum()) for n, g in truth.items()}
        wrong = set()
        assert stream.kernel is not None
        for tap in plan.taps:
            diagonal = sum(stream.kernel[numbers[name]].diagonal() for name in tap.names.values())
            assert isinstance(diagonal, Tensor)
            expected = sum(norms[name] for name in tap.names.values())
            others = float(diagonal.sum() - diagonal[chosen])
            # Rounding may be all there is of a gradient that is zero (a key's bias, say).
            tolerance = 1e-3 * expected + 1e-12 * sum(norms.values())
            if abs(float(diagonal[chosen]) - expected) > tolerance or others > tolerance:
                wrong.add(id(tap))
        plan = without(plan, wrong)
        if not plan.fallback:
            # For what a later batch may add: slower, but it needs no proof.
            return Plan(taps=plan.taps, fallback=(), how=MASKED)
        try:
            own = sequence_gradients(
                objective, batch, partition, theta, plan.fallback, [cotangent], ONE_SEQUENCE
            )[chosen]
            agree = True
            for mine, name in zip(own, plan.fallback, strict=True):
                g = truth[name]
                gap = mine if g is None else mine - g
                agree &= float(gap.double().square().sum()) <= 1e-6 * norms[name] + 1e-12 * sum(
                    norms.values()
                )
        except (RuntimeError, UserError, ValueError, IndexError):
            agree = False
    return Plan(taps=plan.taps, fallback=plan.fallback, how=ONE_SEQUENCE if agree else MASKED)


def _shaken(objective: Objective, partition: Partition, parameters: Tensor | None) -> dict[str, Tensor]:
    """Returns parameters near the given ones where no gradient vanishes (a zero initialisation proves nothing)."""
    theta = partition.vector(objective.model) if parameters is None else parameters.detach()
    generator = torch.Generator(theta.device).manual_seed(0)
    noise = torch.randn(theta.shape, generator=generator, dtype=theta.dtype, device=theta.device)
    return partition.unflatten(torch.add(theta, noise, alpha=0.01))


def _true_gradients(
    objective: Objective,
    batch: Batch,
    partition: Partition,
    theta: Mapping[str, Tensor],
    cotangents: Cotangents,
) -> tuple[dict[str, Tensor | None], Tensor]:
    """Returns J^T c by parameter, straight from autograd (None where the outputs do not depend on it), and c."""
    leaves = objective.leaves(partition, theta)

    def once() -> tuple[dict[str, Tensor | None], Tensor]:
        z = objective.outputs(batch)
        if not z.requires_grad:
            raise UserError(
                f"{type(objective.model).__name__}: its outputs do not depend on any of its {len(leaves)} trainable "
                "parameters through autograd; look for detach(), no_grad() or an argmax on the way to them"
            )
        cotangent = cotangents(0, z.detach(), objective.targets(batch))
        grads = torch.autograd.grad(z, list(leaves.values()), cotangent, allow_unused=True)
        return dict(zip(leaves, grads, strict=True)), cotangent

    return with_parameters(objective.model, leaves, once)
