"""What the preconditioner probe's figures have to be: every sequence's Jacobian, and dense algebra from there on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessprobe.instruments.snapshot import Snapshot
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models
from tests.models import IGNORED, Problem, labels, seeded
from tests.oracles import logit_hessians


def problem(name: str, sequences: int) -> Problem:
    """Returns a zoo model with that many sequences of 2 tokens (decoders), or rows, one target of them ignored."""
    given, g = models.ZOO[name](seeded(20250)), seeded(5)
    inputs, targets = given.batches[0]
    if inputs.is_floating_point():
        inputs = models.real(g, sequences, inputs.shape[1])
        targets = labels(g, 4, sequences)
    else:
        classes = int(targets.max()) + 1
        inputs = torch.randint(classes, (sequences, 2), generator=g)
        targets = labels(g, classes, sequences, 2)
        targets[1, 1] = IGNORED
    return given._replace(batches=[(inputs, targets)])


class Truth:
    """Gradient and Gauss-Newton matrix of any of the sequences, dense, by reverse mode alone."""

    def __init__(self, case: Problem, partition: Partition) -> None:
        self.partition = partition
        theta = partition.vector(case.model)

        def outputs(flat: Tensor, inputs: Tensor) -> Tensor:
            z = torch.func.functional_call(case.model, partition.unflatten(flat), (inputs,))
            return z.reshape(-1, z.shape[-1])

        self.jacobians, self.curvatures, self.slopes, self.tokens = [], [], [], []
        with sdpa_kernel(SDPBackend.MATH):
            for x, y in zip(*case.batches[0], strict=True):
                y = y.reshape(-1)
                z, valid = outputs(theta, x[None]).detach(), y != IGNORED
                j = jacobian(lambda flat, x=x: outputs(flat, x[None]), theta)
                assert isinstance(j, Tensor)
                p = z.softmax(-1)
                one_hot = torch.nn.functional.one_hot(y.clamp_min(0), z.shape[-1])
                self.jacobians.append(j * valid[:, None, None])
                self.curvatures.append(logit_hessians("cross_entropy", z, y.clamp_min(0)))
                self.slopes.append(
                    ((p - one_hot) * valid[:, None], -p.log().gather(1, y.clamp_min(0)[:, None])[valid])
                )
                self.tokens.append(int(valid.sum()))

    def over(self, sequences: Sequence[int]) -> Dense:
        """Returns the truth on these sequences together."""
        tokens = sum(self.tokens[i] for i in sequences)
        gradient = torch.stack(
            [torch.einsum("ncp,nc->p", self.jacobians[i], self.slopes[i][0]) for i in sequences]
        ).sum(0)
        matrix = sum(
            torch.einsum("ncp,ncd,ndq->pq", j, h, j)
            for j, h in ((self.jacobians[i], self.curvatures[i]) for i in sequences)
        )
        loss = torch.cat([self.slopes[i][1] for i in sequences]).sum()
        assert isinstance(matrix, Tensor)
        return Dense(
            gradient=gradient / tokens, matrix=matrix / tokens, tokens=tokens, loss=float(loss) / tokens,
            slices=list(self.partition.slices.values()),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A gradient (p,) and a Gauss-Newton matrix (p, p)."""

    gradient: Tensor
    matrix: Tensor
    tokens: int
    loss: float
    slices: list[slice]
    known: dict[float, Tensor] = field(default_factory=dict)

    def full(self, mu: float) -> Tensor:
        """Returns -(G + mu)^-1 g."""
        if mu not in self.known:
            damped = self.matrix + mu * torch.eye(len(self.matrix), dtype=torch.float64)
            self.known[mu] = -torch.linalg.solve(damped, self.gradient)
        return self.known[mu]

    def solved(self, mu: float, groups: Sequence[Sequence[int]]) -> Tensor:
        """Returns -(G_SS + mu)^-1 g_S for groups of blocks by number."""
        found = torch.zeros_like(self.gradient)
        for group in groups:
            at = torch.cat([torch.arange(self.slices[i].start, self.slices[i].stop) for i in group])
            own = self.matrix[at][:, at] + mu * torch.eye(len(at), dtype=torch.float64)
            found[at] = -torch.linalg.solve(own, self.gradient[at])
        return found

    def slope(self, d: Tensor) -> float:
        return float(self.gradient @ d)

    def curvature(self, d: Tensor) -> float:
        return float(d @ self.matrix @ d)

    def efficiency(self, d: Tensor, mu: float) -> float:
        """Returns (g.d)^2 / ((d.G_mu d)(g.G_mu^-1 g))."""
        damped = self.curvature(d) + mu * float(d @ d)
        return self.slope(d) ** 2 / (damped * -self.slope(self.full(mu)))

    def cosine(self, d: Tensor, mu: float) -> float:
        """Returns the cosine of d and the full direction in the G_mu norm."""
        best = self.full(mu)
        products = torch.stack([d, best]) @ self.matrix + mu * torch.stack([d, best])
        return float(products[0] @ best / ((products[0] @ d) * (products[1] @ best)).sqrt())

    def by_block(self, d: Tensor) -> tuple[Tensor, Tensor]:
        """Returns g_i.d_i (l,) and d_i.G_ij d_j (l, l)."""
        slope = torch.stack([self.gradient[i] @ d[i] for i in self.slices])
        rows = [torch.stack([d[i] @ self.matrix[i, j] @ d[j] for j in self.slices]) for i in self.slices]
        return slope, torch.stack(rows)


def snapshot_of(case: Problem, partition: Partition, **given: object) -> Snapshot:
    values: dict = {
        "step": 3, "objective": Objective(case.model, loss=case.loss), "partition": partition, "seed": 0,
        "parameters": partition.vector(case.model), "batches": list(case.batches),
        "update": 0.1 * models.real(seeded(9), partition.size), **given,
    }  # fmt: skip
    return Snapshot(**values)
