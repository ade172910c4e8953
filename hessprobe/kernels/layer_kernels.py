"""Cross-layer curvature from Gram matrices: ||G_ij||_F^2 and coupling for every pair of layers, with errors.

K_i[m, m'] = <w^m_i, w^m'_i> over sketches m = (sequence b, round r), E[w^m w^m^T] = G_b. For independent m and m',
E[K_i K_j] = <G_b,ij , G_b',ij>, so sums over pairs m != m' estimate ||G_ij||_F^2 without bias, and no pair of a sketch
with itself is ever used (MATH: linear CKA of tangent kernels, Kornblith et al. 2019; Ormaniec et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from hessprobe.errors import UserError, unknown_name
from hessprobe.estimation.block_norms import coupling_of, off_block_energy_of
from hessprobe.estimation.sampling import Estimate
from hessprobe.kernels.plan import Plan
from hessprobe.kernels.sketches import draw_cotangent
from hessprobe.kernels.stream import DEFAULT_MEMORY, Stream
from hessprobe.kernels.verification import verified_plan
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition

QUANTITIES = ("population", "batch")
DENSE_SKETCHES = 512  # block-sketch pairs up to which an eigenvalue is found by dense algebra


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
        """Returns ||G_ij||_F^2 (l, l), unbiased, its error by jackknife.

        Args:
            quantity: "population" estimates the norm of the expected G over sequences like these, from pairs of
                different sequences, its error over sequences; "batch" that of this batch's own G, its error over rounds.

        Raises:
            UserError: one sequence only (population), or one round only (batch): the pairs needed do not exist.
        """
        whole, left_out = self._norms(quantity)
        # Unbiased as it stands: nothing to correct.
        return Estimate(mean=whole, stderr=_jackknife(whole, left_out).stderr, samples=len(self.tokens))

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

    def jacobi_radius(self, damping: float, *, cross_fit: bool | str = True) -> float:
        """Returns lambda_max((D + mu)^-1 (G + mu)), D the block diagonal of G: layerwise steps are stable below 2 / it.

        In coordinates of the blocks' sketches, R_i = K_i^1/2, both are l m x l m: exact algebra, by Lanczos where large.
        False and "direction" bracket the radius of G itself. With 128, 256, 4096 sketches of 64 sequences where it is
        2.65 (p = 120, 3 blocks, damping 0.1): False 2.78, 2.69, 2.65; "direction" 2.45, 2.33, 2.59; True 13, 8.3, 3.8.

        Args:
            damping: mu, above 0.
            cross_fit: True takes D from one half of the sequences and G from the other, both ways averaged: how far a
                layerwise preconditioner overshoots on sketches it has not seen; it can exceed l, and most of it is
                noise of the sketches unless there are many. "direction" finds the direction on one half and judges
                G and D along it on the other: a lower bound, in [0, l]. False takes all from the same sketches: in
                [1, l], and rather too high.

        Cost: about 4 l m^3 multiply-adds; 1.5 s for l = 14, m = 256 on one core.

        Raises:
            UserError: a damping that is not positive, an unknown `cross_fit`, or one sequence only where it splits.
        """
        if not damping > 0:
            raise UserError(f"jacobi_radius: damping must be positive, got {damping}")
        if cross_fit not in (True, False, "direction"):
            raise UserError(f"jacobi_radius: cross_fit is True, False or 'direction', got {cross_fit!r}")
        if cross_fit and len(self.tokens) < 2:
            raise UserError(
                "1 sequence: cross-fitting needs 2 halves; use cross_fit=False, or more sequences"
            )
        values, vectors = torch.linalg.eigh(self.kernel)
        coordinates = (
            vectors * values.clamp_min(0).sqrt()[:, None, :]
        ) @ vectors.mT  # (l, m, m), columns: sketches
        even = self.sequence % 2 == 0
        ways = ((even, ~even), (~even, even)) if cross_fit else ((torch.ones_like(even),) * 2,)
        radii = []
        for built, other in ways:
            factor = coordinates[:, :, built] * self._weights(built).sqrt()  # (l, m, n): D_i = F_i F_i^T
            own, basis = torch.linalg.eigh(factor @ factor.mT)
            damped = own.clamp_min(0) + damping
            root = (basis * damped.rsqrt()[:, None, :]) @ basis.mT  # (D_i + mu)^-1/2
            held = coordinates[:, :, other] * self._weights(other).sqrt()
            radius, top = _largest_eigenpair(
                damping * root @ root, root @ (factor if cross_fit == "direction" else held)
            )
            if cross_fit == "direction":
                x = torch.einsum("imk,ik->im", root, top)
                seen = torch.einsum("imn,im->in", held, x)
                ridge = damping * x.square().sum()
                radius = float((seen.sum(0).square().sum() + ridge) / (seen.square().sum() + ridge))
            radii.append(radius)
        return sum(radii) / len(radii)

    def _weights(self, among: Tensor | None = None) -> Tensor:
        """Returns the weight of each sketch in G = sum_m weight_m w_m w_m^T; `among` (m,) bool takes some alone."""
        tokens = self.tokens.double()[self.sequence if among is None else self.sequence[among]]
        return tokens / tokens.sum()

    def _norms(self, quantity: str) -> tuple[Tensor, Tensor]:
        """Returns fro2 (l, l) of all sketches, and with each unit left out (strata, units, l, l).

        What is random is what is left out: sequences for the population (one stratum), the rounds of each sequence
        for the batch (a stratum a sequence; with 2 rounds the pair of a sequence with itself stays in).
        """
        if quantity not in QUANTITIES:
            raise unknown_name("quantity", quantity, QUANTITIES)
        count, rounds = len(self.tokens), self.rounds
        if count < 2:
            raise UserError(
                f"{count} sequence: the population quantity and every standard error need at least 2; "
                "measure with a batch of more sequences"
            )
        if quantity == "batch" and rounds < 2:
            raise UserError(
                "rounds 1: the batch quantity needs pairs of rounds of one sequence, so at least 2 rounds; use "
                "quantity='population', or more rounds"
            )
        order = torch.argsort(self.sequence * rounds + self.round)
        kernel, sequence = self.kernel[:, order][:, :, order], self.sequence[order]
        weights = self._weights()[order]
        weights = weights[:, None] * weights
        same = sequence[:, None] == sequence

        def rows(pairs: Tensor) -> Tensor:  # (b, r, l, l): what each sketch's weighted pairs add
            found = torch.bmm((kernel * pairs).transpose(0, 1), kernel.permute(1, 2, 0))
            return found.view(count, rounds, *found.shape[1:])

        across = rows(weights.masked_fill(same, 0))
        if quantity == "population":
            share = self.tokens.double() / self.tokens.sum()
            scale = 1 - share.square().sum()
            scales = scale - 2 * share * (1 - share)
            if count == 2:
                raise UserError(
                    "2 sequences: leaving one out leaves no pair, so there is no standard error; use 3 or more"
                )
            total = across.sum((0, 1))
            return total / scale, ((total - 2 * across.sum(1)) / scales[:, None, None])[None]
        within = rows((weights * (rounds / (rounds - 1))).masked_fill(~same, 0).fill_diagonal_(0))
        total = (across + within).sum((0, 1))
        # Without a round, the others' pairs count in its place.
        left_out = total - 2 * across + 2 * (across.sum(1, keepdim=True) - across) / (rounds - 1)
        if rounds > 2:
            own = within.sum(1, keepdim=True)
            left_out += (own - 2 * within) * (rounds / (rounds - 2)) - own
        return total, left_out


def _jackknife(whole: Tensor, left_out: Tensor) -> Estimate:
    """Returns value less its bias of order 1/units, and standard error, from leave-one-out values (strata, units, ...).

    Quenouille 1956, Tukey 1958; strata are independent, so their corrections and variances add.
    """
    units = left_out.shape[1]
    mean = left_out.mean(1, keepdim=True)
    bias = (units - 1) * (mean[:, 0] - whole).sum(0)
    variance = (left_out - mean).square().sum((0, 1)) * (units - 1) / units
    samples = left_out.shape[0] * units
    return Estimate(mean=whole - bias, stderr=variance.sqrt(), samples=samples)


def _largest_eigenpair(diagonal: Tensor, factor: Tensor) -> tuple[float, Tensor]:
    """Returns the largest eigenvalue of blkdiag(diagonal) + F F^T and its eigenvector (l, m).

    Args:
        diagonal: (l, m, m) symmetric blocks.
        factor: (l, m, n), F's rows by block.
    """
    layers, m, _ = diagonal.shape
    tall = factor.flatten(0, 1)
    if layers * m <= DENSE_SKETCHES:
        values, vectors = torch.linalg.eigh(torch.block_diag(*diagonal) + tall @ tall.mT)
        return float(values[-1]), vectors[:, -1].view(layers, m)

    def product(x: Any) -> Any:
        v = torch.as_tensor(x, dtype=diagonal.dtype)
        own = torch.einsum("imn,in->im", diagonal, v.view(layers, m)).flatten()
        return (own + tall @ (tall.mT @ v.flatten())).numpy()

    # From ones: scipy would draw its start vector from numpy's global generator.
    size = layers * m
    operator = LinearOperator((size, size), matvec=product, dtype="float64")  # pyright: ignore[reportCallIssue]
    values, vectors = eigsh(operator, k=1, which="LA", v0=torch.ones(size, dtype=diagonal.dtype).numpy())
    return float(values[0]), torch.as_tensor(vectors[:, 0]).view(layers, m)


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
    autocast: torch.dtype | None = None,
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
        memory: bytes of output gradients held on the device while more passes are to come.
        autocast: run the model under torch.autocast of this type (torch.bfloat16); Gram matrices stay in float32.

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
        autocast=autocast,
    )
    stream.run_until_it_fits(listed, rounds, cotangents, generator)
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
        routes=stream.plan.routes,
        cotangent=cotangent,
    )
