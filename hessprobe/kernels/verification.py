"""A plan is trusted only after every way in it has shown one sequence's true gradient, and no other sequence's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.kernels.division import within_memory
from hessprobe.kernels.plan import MASKED, ONE_SEQUENCE, NotOneCall, Plan, first_plan, without
from hessprobe.kernels.sequence_gradients import sequence_gradients, watched
from hessprobe.kernels.stream import Cotangents, Stream
from hessprobe.machine.devices import read
from hessprobe.machine.memory import is_out_of_memory
from hessprobe.machine.processes import Processes
from hessprobe.machine.seeds import trial_vectors
from hessprobe.problem.batches import tensors_of
from hessprobe.problem.leaves import Leaves
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.operation_rules import without_rules
from hessprobe.problem.partition import Partition
from hessprobe.problem.shares import is_sharded

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
        parameters: theta (p,); default the model's own. Proofs are made beside it, but for sharded parameters.

    Raises:
        UserError: a model whose outputs depend on no parameter, NaN outputs, or too little memory for two sequences.
    """
    processes, objective = (
        objective.processes,
        objective.alone,
    )  # the proof is little work: everyone makes it whole
    listed = objective.micro_batches(batches)
    longest = max(range(len(listed)), key=lambda i: float(listed.sequence_weights[i].max()))
    batch, count = listed[longest], listed.counts[longest]
    chosen = int(listed.sequence_weights[longest].argmax())
    theta = _shaken(objective, partition, parameters)

    def attempt(division: int) -> Plan:
        size = max(min(2, count), count // division)
        start = min(chosen, count - size)
        part = batch if size == count else objective.cut(batch, start, start + size)
        return _verified(objective, listed.parted([part]), partition, theta, chosen - start)

    refusal = (
        f"out of memory while the ways to {partition.size:,} parameters' gradients were tried on 2 sequences: measure "
        "with a shorter context, or free memory on the model's device"
    )
    most = count // 2 if next(tensors_of(batch), None) is not None else 1  # else it cannot be cut
    with processes.together():
        return _agreed(within_memory(attempt, max(1, most), refusal), processes)


def _agreed(plan: Plan, processes: Processes) -> Plan:
    """Returns the plan whose every way has held in all processes, which may have had memory for different proofs."""
    mine = [tuple(tap.names.values()) for tap in plan.taps]
    found = processes.gathered((mine, plan.fallback, plan.how))
    if all(other == found[0] for other in found):
        return plan
    kept = tuple(
        tap for tap, names in zip(plan.taps, mine, strict=True) if all(names in o for o, _, _ in found)
    )
    rest = set(plan.routes) - {name for tap in kept for name in tap.names.values()}
    one_by_one = all(how == ONE_SEQUENCE for _, _, how in found)
    return Plan(taps=kept, fallback=tuple(sorted(rest)), how=ONE_SEQUENCE if one_by_one else MASKED)


def _verified(
    objective: Objective,
    batches: MicroBatches,
    partition: Partition,
    theta: Mapping[str, Tensor] | None,
    chosen: int,
) -> Plan:
    """Returns the plan that holds for this sequence of the one batch."""
    plan, batch = first_plan(objective, partition), batches[0]
    count, positions = batches.shapes[0]
    valid = objective.loss_function.valid(objective.targets(batch)).view(count, positions)

    def one_sequence(number: int, r: int, z: Tensor, targets: Tensor) -> Tensor:
        noise = trial_vectors(z.device)(z)
        only = torch.zeros_like(noise).view(count, positions, -1)
        only[chosen] = noise.view(count, positions, -1)[chosen] * valid[chosen, :, None]
        return only.view_as(noise)

    numbers = {name: i for i, name in enumerate(partition.names)}
    while True:
        taps_alone = Plan(taps=plan.taps, fallback=())
        stream = Stream(objective, partition, taps_alone, theta=theta, groups=numbers)
        try:
            kernel = stream.run(batches, 1, one_sequence).kernel
            break
        except NotOneCall as refused:
            plan = without(plan, {id(refused.tap)})
    with watched(objective.model):
        truth = _true_gradients(objective, batch, partition, theta, plan.fallback, one_sequence)
        norms = truth.norms
        tolerance = truth.tolerance
        # Rounding may be all there is of a gradient that is zero (a key's bias, say).
        floor = tolerance**4 * sum(norms.values())
        wrong = set()
        with without_rules():
            groups = [[kernel[numbers[name]].diagonal() for name in tap.names.values()] for tap in plan.taps]
            diagonals = [torch.stack(group).sum(0) for group in groups]
            own = read(diagonal[chosen] for diagonal in diagonals)
            everyone = read(diagonal.sum() for diagonal in diagonals)
        for tap, mine, whole in zip(plan.taps, own, everyone, strict=True):
            expected = sum(norms[name] for name in tap.names.values())
            allowed = tolerance * expected + floor
            if abs(mine - expected) > allowed or whole - mine > allowed:
                wrong.add(id(tap))
        plan = without(plan, wrong)
        if not plan.fallback:
            # For what a later batch may add: slower, but it needs no proof.
            return Plan(taps=plan.taps, fallback=(), how=MASKED)
        found: dict[str, Tensor] = {}
        try:
            sequence_gradients(
                objective,
                batch,
                partition,
                theta,
                plan.fallback,
                [truth.cotangent],
                ONE_SEQUENCE,
                found=lambda r, b, gradients: found.update(gradients),
                among=[chosen],
            )
        except (RuntimeError, UserError, ValueError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            return Plan(taps=plan.taps, fallback=plan.fallback, how=MASKED)
        agree = True
        # Of a way that has just been refused, its norm alone is known.
        apart = {name: gradient - truth.gradients.get(name, 0) for name, gradient in found.items()}
        for name, gap in zip(apart, read(x.double().square().sum() for x in apart.values()), strict=True):
            if name in truth.gradients:
                agree &= gap <= tolerance**2 * norms[name] + floor
            else:
                agree &= abs(gap - norms[name]) <= tolerance * norms[name] + floor
    return Plan(taps=plan.taps, fallback=plan.fallback, how=ONE_SEQUENCE if agree else MASKED)


def _shaken(
    objective: Objective, partition: Partition, parameters: Tensor | None
) -> dict[str, Tensor] | None:
    """Returns parameters near the given ones where no gradient vanishes (a zero initialisation proves nothing).

    Sharded parameters stay as they are: None.
    """
    if is_sharded(objective.model):
        return None
    theta = partition.vector(objective.model) if parameters is None else parameters.detach()
    generator = torch.Generator(theta.device).manual_seed(0)
    noise = torch.randn(theta.shape, generator=generator, dtype=theta.dtype, device=theta.device)
    return partition.unflatten(torch.add(theta, noise, alpha=0.01))


@dataclass(frozen=True, kw_only=True)
class _Truth:
    """J^T c straight from autograd: its squared norm by parameter, some of it whole, c, and how near others must come."""

    norms: dict[str, float]
    gradients: dict[str, Tensor]
    cotangent: Tensor
    tolerance: float


def _true_gradients(
    objective: Objective,
    batch: Batch,
    partition: Partition,
    theta: Mapping[str, Tensor] | None,
    kept: Sequence[str],
    cotangents: Cotangents,
) -> _Truth:
    """Returns the pulled back cotangents; whole only for the names `kept`: of the others one at a time exists."""
    leaves = Leaves(objective, partition, theta, partition.names)
    squares: dict[str, Tensor] = {}

    def measured(name: str, gradient: Tensor) -> Tensor:
        with without_rules():
            squares[name] = gradient.double().square().sum()
            return gradient if name in kept else gradient.new_zeros(()).expand(gradient.shape)

    def once() -> _Truth:
        z = objective.outputs(batch)
        if not z.requires_grad:
            raise UserError(
                f"{type(objective.model).__name__}: its outputs do not depend on any of its {len(partition.names)} "
                "trainable parameters through autograd; look for detach(), no_grad() or an argmax on the way to them"
            )
        cotangent = cotangents(0, 0, z.detach(), objective.targets(batch))
        inputs = [leaves[name] for name in partition.names]
        hooks = [x.register_hook(partial(measured, n)) for n, x in zip(partition.names, inputs, strict=True)]
        try:
            grads = torch.autograd.grad(z, inputs, cotangent, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        named = zip(partition.names, inputs, grads, strict=True)
        whole = {n: torch.zeros_like(x) if g is None else g for n, x, g in named if n in kept}
        tolerance = max(TOLERANCE.get(x.dtype, FINE) for x in (cotangent, *inputs))
        norms = dict(zip(squares, read(squares.values()), strict=True))
        norms = {name: norms.get(name, 0.0) for name in partition.names}
        return _Truth(norms=norms, gradients=whole, cotangent=cotangent, tolerance=tolerance)

    return leaves.run(once)
