"""Cross-layer curvature from Gram matrices: ||G_ij||_F^2 and coupling for every pair of layers, with errors.

K_i[m, m'] = <w^m_i, w^m'_i> over sketches m = (sequence b, round r), E[w^m w^m^T] = G_b. For independent m and m',
E[K_i K_j] = <G_b,ij , G_b',ij>, so sums over pairs m != m' estimate ||G_ij||_F^2 without bias, and no pair of a sketch
with itself is ever used (MATH: linear CKA of tangent kernels, Kornblith et al. 2019; Ormaniec et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hessprobe.errors import UserError, unknown_name
from hessprobe.estimation.block_norms import coupling_of, off_block_energy_of
from hessprobe.estimation.sampling import Estimate
from hessprobe.kernels.sketches import draw_cotangent
from hessprobe.kernels.stream import DEFAULT_MEMORY, Plan, Stream, verified_plan
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition

QUANTITIES = ("population", "batch")


@dataclass(frozen=True, kw_only=True)
class LayerKernels:
    """Gram matrices of every block's per-sequence sketches, and what follows from them.

    Attributes:
        blocks: the l blocks' names.
        kernel: (l, m, m) float64, on the CPU.
        sequence, round: (m,) which sequence and which round a sketch belongs to.
        tokens: (b,) tokens with a target in each sequence; sequences weigh by them.
        alignment: for each vector given, <w^m_i, vector_i> (l, m).
        norm2: for each vector given, ||vector_i||^2 (l,).
        routes: the way each parameter was measured, by name.
        cotangent: "sampled", "sign" or "empirical" (then this is the empirical Fisher, not Gauss-Newton).
    """

    blocks: tuple[str, ...]
    kernel: Tensor
    sequence: Tensor
    round: Tensor
    tokens: Tensor
    alignment: Mapping[str, Tensor] = field(default_factory=dict)
    norm2: Mapping[str, Tensor] = field(default_factory=dict)
    routes: Mapping[str, str] = field(default_factory=dict)
    cotangent: str = "sampled"

    @property
    def rounds(self) -> int:
        """Sketches per sequence."""
        return int(self.round.max()) + 1

    def block_norms(self, quantity: str = "population") -> Estimate:
        """Returns ||G_ij||_F^2 (l, l), unbiased, its error by jackknife over sequences.

        Args:
            quantity: "population" estimates the norm of the expected G over sequences like these, from pairs of
                different sequences; "batch" that of this batch's own G (its error, over sequences, is then cautious).

        Raises:
            UserError: one sequence only (population), or one round only (batch): the pairs needed do not exist.
        """
        whole, left_out = self._norms(quantity)
        return _jackknife(whole, left_out)

    def coupling(self, quantity: str = "population") -> Estimate:
        """Returns fro2[i,j] / sqrt(fro2[i,i] fro2[j,j]) (l, l), in [0, 1] up to noise; jackknife over sequences.

        Raises:
            UserError: as `block_norms`.
        """
        whole, left_out = self._norms(quantity)
        return _jackknife(coupling_of(whole), coupling_of(left_out))

    def off_block_energy(self, quantity: str = "population") -> Estimate:
        """Returns the share of ||G||_F^2 outside the diagonal blocks; jackknife over sequences.

        Raises:
            UserError: as `block_norms`.
        """
        whole, left_out = self._norms(quantity)
        return _jackknife(off_block_energy_of(whole), off_block_energy_of(left_out))

    def trace(self) -> Estimate:
        """Returns tr G_ii (l,), unbiased: the mean squared norm of sketches, weighted by tokens."""
        diagonal = torch.diagonal(self.kernel, dim1=1, dim2=2)
        count = len(self.tokens)
        by_sequence = torch.zeros(count, len(self.blocks), dtype=torch.float64)
        by_sequence.index_add_(0, self.sequence, diagonal.mT / self.rounds)
        share = self.tokens.double() / self.tokens.sum()
        mean = share @ by_sequence
        spread = (share[:, None] * (by_sequence - mean)).square().sum(0)
        return Estimate(mean=mean, stderr=(spread * count / max(count - 1, 1)).sqrt(), samples=count)

    def effective_rank(self, quantity: str = "population") -> Tensor:
        """Returns (tr G_ii)^2 / ||G_ii||_F^2 (l,): how many directions share a block's curvature."""
        return self.trace().mean.square() / torch.diagonal(self.block_norms(quantity).mean)

    def eigenvalues(self) -> Tensor:
        """Returns the (m,) eigenvalues of the sketched G, descending: biased upwards at the top for few sketches."""
        root = self._weights().sqrt()
        return torch.linalg.eigvalsh(self.kernel.sum(0) * root[:, None] * root).flip(0)

    def jacobi_radius(self, damping: float) -> float:
        """Returns lambda_max((D + mu)^-1 (G + mu)) in [1, l] of the sketched G; D is its block diagonal.

        In sketch space with scaled sketches W, G = W^T W and the eigenvalues of (D + mu)^-1 (G + mu) other than 1 are
        those of I + (G - D)(D + mu)^-1; both live on the blocks' sketches, so l m x l m algebra is enough.

        Raises:
            UserError: a damping that is not positive.
        """
        if damping <= 0:
            raise UserError(f"jacobi_radius: damping must be positive, got {damping}")
        root = self._weights().sqrt()
        scaled = self.kernel * root[:, None] * root  # (l, m, m)
        values, vectors = torch.linalg.eigh(scaled)
        values = values.clamp_min(0)
        # u_i = sqrt(K_i / (K_i + mu)) spans block i's part of (D + mu)^-1/2 W^T; their Gram matrix over pairs of blocks
        # has 1/(..) on the diagonal, so lambda_max is that of sum_i u_i u_i^T plus the identity's share.
        factor = vectors * (values / (values + damping)).sqrt()[:, None, :]
        stacked = factor @ vectors.mT  # (l, m, m): (K_i/(K_i + mu))^1/2
        layers, m = stacked.shape[:2]
        tall = stacked.reshape(layers * m, m)
        gram = tall @ tall.mT
        own = torch.arange(layers * m)
        block = own // m
        gram[block[:, None] == block] = (
            0.0  # within a block, (D + mu)^-1/2 (D + mu) (D + mu)^-1/2 is the identity
        )
        return 1.0 + float(torch.linalg.eigvalsh(gram)[-1].clamp_min(0))

    def _weights(self) -> Tensor:
        """Returns (m,) the weight of each sketch in G = sum_m weight_m w_m w_m^T."""
        return (self.tokens.double() / self.tokens.sum())[self.sequence] / self.rounds

    def _norms(self, quantity: str) -> tuple[Tensor, Tensor]:
        """Returns fro2 (l, l) of all sequences and (b, l, l) with each left out."""
        if quantity not in QUANTITIES:
            raise unknown_name("quantity", quantity, QUANTITIES)
        count = len(self.tokens)
        if count < 2:
            raise UserError(
                f"{count} sequence: the population quantity and every standard error need at least 2; "
                "measure with a batch of more sequences"
            )
        if quantity == "batch" and self.rounds < 2:
            raise UserError(
                "rounds 1: the batch quantity needs pairs of rounds of one sequence, so at least 2 rounds; use "
                "quantity='population', or more rounds"
            )
        products = self._products_by_sequence()  # (l, l, b, b): mean over rounds of K_i K_j
        share = self.tokens.double() / self.tokens.sum()
        weights = share[:, None] * share
        if quantity == "population":
            weights = weights - torch.diag(torch.diagonal(weights))
        weighted = products * weights
        rows = weighted.sum(3)  # (l, l, b)
        total, own = rows.sum(2), torch.diagonal(weighted, dim1=2, dim2=3)
        left_out = (total[..., None] - 2 * rows + own).movedim(2, 0)
        if quantity == "batch":
            scale, scales = torch.ones(()), (1 - share).square()
        else:
            scale = weights.sum()
            scales = scale - 2 * weights.sum(1)
            if count == 2:
                raise UserError(
                    "2 sequences: leaving one out leaves no pair, so there is no standard error; use 3 or more"
                )
        return total / scale, left_out / scales[:, None, None]

    def _products_by_sequence(self) -> Tensor:
        count, rounds, layers = len(self.tokens), self.rounds, len(self.blocks)
        order = torch.argsort(self.sequence * rounds + self.round)
        k = self.kernel[:, order][:, :, order].view(layers, count, rounds, count, rounds)
        mean = torch.einsum("ibrcs,jbrcs->ijbc", k, k) / rounds**2
        if rounds > 1:
            # Cells of one sequence: pairs of different rounds alone.
            same = torch.einsum("ibrbs,jbrbs->ijbrs", k, k)
            off = same.sum((3, 4)) - torch.diagonal(same, dim1=3, dim2=4).sum(-1)
            index = torch.arange(count)
            mean[:, :, index, index] = off / (rounds * (rounds - 1))
        return mean


def _jackknife(whole: Tensor, left_out: Tensor) -> Estimate:
    """Returns value less its bias of order 1/b, and standard error, from leave-one-out values (b, ...)."""
    count = left_out.shape[0]
    mean = left_out.mean(0)
    spread = (left_out - mean).square().sum(0) * (count - 1) / count
    return Estimate(mean=count * whole - (count - 1) * mean, stderr=spread.sqrt(), samples=count)


def layer_kernels(
    objective: Objective,
    batches: Batch | list[Batch],
    partition: Partition,
    *,
    rounds: int = 2,
    generator: torch.Generator,
    cotangent: str = "sampled",
    parameters: Tensor | None = None,
    along: Mapping[str, Tensor] | None = None,
    plan: Plan | None = None,
    memory: int = DEFAULT_MEMORY,
) -> LayerKernels:
    """Returns the layer kernels of a batch: every pair of blocks from `rounds` backward passes.

    Args:
        objective: model and loss (cross-entropy or squared error).
        batches: one batch or micro-batches; the targets' first dimension counts the sequences.
        partition: the blocks; the cost does not depend on how many there are.
        rounds: independent sketches per sequence; one forward pass serves all.
        generator: where the cotangents come from.
        cotangent: "sampled", "sign" or "empirical" (see `sketches`).
        parameters: theta (p,); default the model's own.
        along: vectors (p,) by name; their inner products with every sketch are kept as `alignment`.
        plan: of an earlier call on the same model; made and verified (about 2 gradients) where not given.
        memory: bytes of inputs and output gradients held on the device while more passes are to come.

    Cost: (1 + 2 rounds) / 3 gradients and m^2 p multiply-adds for m sketches; parameters without a fast path about
    a gradient a round more.

    Raises:
        UserError: rounds below 1, a loss without a known root of its Hessian, or a batch without targets.
    """
    if rounds < 1:
        raise UserError(f"rounds {rounds}: layer kernels need at least 1")
    listed = objective.micro_batches(batches)
    plan = plan or verified_plan(objective, listed[0], partition, parameters)
    lengths = []
    for batch in listed:
        valid = objective.loss_function.valid(objective.targets(batch))
        lengths.append(valid.view(objective.sequence_shape(batch)).sum(1))
    tokens = torch.cat(lengths).cpu()

    def cotangents(number: int, outputs: Tensor, targets: Tensor) -> Tensor:
        drawn = draw_cotangent(cotangent, objective.loss_function, outputs, targets, generator=generator)
        scale = lengths[number].clamp_min(1).sqrt()[:, None, None]
        return (drawn.view(len(scale), -1, drawn.shape[-1]) / scale).view_as(drawn)

    stream = Stream(
        objective,
        partition,
        plan,
        theta=None if parameters is None else partition.unflatten(parameters.detach()),
        along=along,
        memory=memory,
    )
    stream.run(listed, rounds, cotangents)
    assert stream.kernel is not None
    sequence, of_round, start = [], [], 0
    for x in lengths:
        for r in range(rounds):
            sequence.append(torch.arange(start, start + len(x)))
            of_round.append(torch.full((len(x),), r))
        start += len(x)
    slices = partition.slices.values()
    return LayerKernels(
        blocks=partition.blocks,
        kernel=stream.kernel.cpu(),
        sequence=torch.cat(sequence),
        round=torch.cat(of_round),
        tokens=tokens,
        alignment={name: a.cpu() for name, a in stream.alignment.items()},
        norm2={
            name: torch.stack([v[where].double().square().sum() for where in slices]).cpu()
            for name, v in (along or {}).items()
        },
        routes=plan.routes,
        cotangent=cotangent,
    )
