"""A plan is trusted only after every way in it has shown one sequence's true gradient, and no other sequence's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.kernels.division import within_memory
from hessprobe.kernels.plan import MASKED, ONE_SEQUENCE, NotOneCall, Plan, first_plan, without
from hessprobe.kernels.sequence_gradients import sequence_gradients, watched
from hessprobe.kernels.stream import Cotangents, Stream
from hessprobe.problem.batches import cut
from hessprobe.problem.memory import is_out_of_memory
from hessprobe.problem.objective import Batch, Objective, with_parameters
from hessprobe.problem.partition import Partition

# How far two ways to one squared gradient norm may lie apart, by the precision the model computes in.
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
FINE = 1e-3


def verified_plan(
    objective: Objective, batches: Batch | list[Batch], partition: Partition, parameters: Tensor | None = None
) -> Plan:
    """Returns a plan in which every fast path has shown one sequence's true gradient, and no other sequence's.

    The loss of a single sequence is pulled back through the taps and by autograd: each tap's diagonal entry of K must
    be its parameters' squared gradient norm, and zero for every other sequence. What fails falls back. Cost: about 2
    gradients, once; hand the plan to later calls on the same model. Where memory runs out, fewer sequences must do.

    Args:
        batches: one batch or micro-batches; that with the longest sequence is taken.
        parameters: theta (p,); default the model's own.

    Raises:
        UserError: a model whose outputs depend on no parameter, NaN outputs, or too little memory for two sequences.
    """
    batch = max(objective.micro_batches(batches), key=lambda b: int(tokens_of(objective, b).max()))
    count, _ = objective.sequence_shape(batch)
    chosen = int(tokens_of(objective, batch).argmax())
    theta = _shaken(objective, partition, parameters)

    def attempt(division: int) -> Plan:
        size = max(min(2, count), count // division)
        start = min(chosen, count - size)
        part = batch if size == count else cut(batch, start, start + size, count)
        return _verified(objective, part, partition, theta, chosen - start)

    refusal = (
        f"out of memory while the ways to {partition.size:,} parameters' gradients were tried on 2 sequences: measure "
        "with a shorter context, or free memory on the model's device"
    )
    most = count // 2 if isinstance(batch, (Mapping, tuple, list)) else 1  # only these can be cut
    return within_memory(attempt, max(1, most), refusal)


def tokens_of(objective: Objective, batch: Batch) -> Tensor:
    """Returns the tokens with a target of each sequence (b,)."""
    valid = objective.loss_function.valid(objective.targets(batch))
    return valid.view(objective.sequence_shape(batch)).sum(1)


def _verified(
    objective: Objective, batch: Batch, partition: Partition, theta: Mapping[str, Tensor], chosen: int
) -> Plan:
    """Returns the plan that holds for this sequence of the batch."""
    plan = first_plan(objective, partition)
    count, positions = objective.sequence_shape(batch)
    valid = objective.loss_function.valid(objective.targets(batch)).view(count, positions)

    def one_sequence(number: int, r: int, z: Tensor, targets: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)
        only = torch.zeros_like(noise).view(count, positions, -1)
        only[chosen] = noise.view(count, positions, -1)[chosen] * valid[chosen, :, None]
        return only.view_as(noise)

    numbers = {name: i for i, name in enumerate(partition.names)}
    while True:
        taps_alone = Plan(taps=plan.taps, fallback=())
        stream = Stream(objective, partition, taps_alone, theta=theta, groups=numbers)
        try:
            kernel = stream.run([batch], 1, one_sequence).kernel
            break
        except NotOneCall as refused:
            plan = without(plan, {id(refused.tap)})
    with watched(objective.model):
        truth, cotangent = _true_gradients(objective, batch, partition, theta, one_sequence)
        norms = {n: 0.0 if g is None else float(g.double().square().sum()) for n, g in truth.items()}
        tolerance = max(TOLERANCE.get(x.dtype, FINE) for x in (cotangent, *theta.values()))
        # Rounding may be all there is of a gradient that is zero (a key's bias, say).
        floor = tolerance**4 * sum(norms.values())
        wrong = set()
        for tap in plan.taps:
            diagonal = sum(kernel[numbers[name]].diagonal() for name in tap.names.values())
            assert isinstance(diagonal, Tensor)
            expected = sum(norms[name] for name in tap.names.values())
            others = float(diagonal.sum() - diagonal[chosen])
            allowed = tolerance * expected + floor
            if abs(float(diagonal[chosen]) - expected) > allowed or others > allowed:
                wrong.add(id(tap))
        plan = without(plan, wrong)
        if not plan.fallback:
            # For what a later batch may add: slower, but it needs no proof.
            return Plan(taps=plan.taps, fallback=(), how=MASKED)
        own: dict[str, Tensor] = {}
        try:
            sequence_gradients(
                objective,
                batch,
                partition,
                theta,
                plan.fallback,
                [cotangent],
                ONE_SEQUENCE,
                found=lambda r, b, gradients: own.update(gradients),
                among=[chosen],
            )
        except (RuntimeError, UserError, ValueError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            return Plan(taps=plan.taps, fallback=plan.fallback, how=MASKED)
        agree = True
        for name, mine in own.items():
            g = truth[name]
            gap = mine if g is None else mine - g
            agree &= float(gap.double().square().sum()) <= tolerance**2 * norms[name] + floor
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
        cotangent = cotangents(0, 0, z.detach(), objective.targets(batch))
        grads = torch.autograd.grad(z, list(leaves.values()), cotangent, allow_unused=True)
        return dict(zip(leaves, grads, strict=True)), cotangent

    return with_parameters(objective.model, leaves, once)
