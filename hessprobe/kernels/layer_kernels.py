"""Cross-layer curvature from Gram matrices: ||G_ij||_F^2 and coupling for every pair of layers, with errors.

K_i[m, m'] = <w^m_i, w^m'_i> over sketches m = (sequence b, round r), E[w^m w^m^T] = G_b. For independent m and m',
E[K_i K_j] = <G_b,ij , G_b',ij>, so sums over pairs m != m' estimate ||G_ij||_F^2 without bias, and no pair of a sketch
with itself is ever used (MATH: linear CKA of tangent kernels, Kornblith et al. 2019; Ormaniec et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from hessprobe.errors import UserError, unknown_name
from hessprobe.estimation.block_norms import coupling_of, off_block_energy_of
from hessprobe.estimation.sampling import Estimate, log_interval
from hessprobe.kernels.division import gathered
from hessprobe.kernels.jacobi import coordinates_of, radius_of
from hessprobe.kernels.pairs import QUANTITIES, freedom_of, jackknife, pair_norms, sketch_weights
from hessprobe.kernels.plan import Plan
from hessprobe.kernels.sketches import Draws
from hessprobe.kernels.stream import DEFAULT_MEMORY
from hessprobe.kernels.verification import verified_plan
from hessprobe.machine.devices import working_memory
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition


@dataclass(frozen=True, kw_only=True)
class LayerKernels:
    """Gram matrices of every block's per-sequence sketches, and what follows from them.

    Attributes:
        blocks: the l blocks' names.
        kernel: (l, m, m) float64, on the CPU.
        sequence, round: (m,) which sequence and which round a sketch belongs to.
        tokens: (b,) tokens with a target in each sequence, or what the loss weighs them by; sequences weigh by them.
        alignment: for each vector given, <w^m_i, vector_i> (l, m).
        norm2: for each vector given, ||vector_i||^2 (l,).
        routes: the way each parameter was measured, by name.
        loss: on the batch, nats per token.
        cotangent: "sampled", "sign" or "empirical" (then this is the empirical Fisher, not Gauss-Newton).
        gradients: what the passes cost, in gradients of the batch by operation count; what memory made repeat included.
        division: 1, or into how many parts memory made the passes divide: for the next call on such a batch.
    """

    blocks: tuple[str, ...]
    kernel: Tensor
    sequence: Tensor
    round: Tensor
    tokens: Tensor
    alignment: Mapping[str, Tensor] = field(default_factory=dict)
    norm2: Mapping[str, Tensor] = field(default_factory=dict)
    routes: Mapping[str, str] = field(default_factory=dict)
    loss: float = float("nan")
    cotangent: str = "sampled"
    gradients: float = 0.0
    division: int = 1

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
            UserError: one or two sequences (population), or one round only (batch): the pairs needed do not exist. The
                batch quantity of one sequence is made of its rounds' pairs; its error needs 3 rounds and is NaN with 2.
        """
        whole, left_out = self._norms(quantity)
        # Unbiased as it stands: nothing to correct.
        return Estimate(mean=whole, stderr=jackknife(whole, left_out).stderr, samples=len(self.tokens))

    def block_norm_intervals(
        self, quantity: str = "population", *, level: float = 0.95
    ) -> tuple[Tensor, Tensor]:
        """Returns the lower and upper ends (l, l) of ||G_ij||_F^2's intervals, fro2 exp(-+ t stderr / fro2).

        Sums of squares are skewed and small estimates come with small errors, so the interval is symmetric in the
        logarithm; and where few sketches carry the error, the error is itself uncertain, so t is Student's. In tests
        intervals of 0.95 hold the truth in 92 to 98 % of cases (24 sequences, or 16 with 2 or 3 rounds; 95 % in the mean),
        where fro2 +- 2 errors does in 80 to 94 %. An estimate that is not positive keeps a symmetric one.

        Raises:
            UserError: a level outside (0, 1), or as `block_norms`.
        """
        whole, left_out = self._norms(quantity)
        stderr, freedom = jackknife(whole, left_out).stderr, freedom_of(left_out)
        if quantity == "batch" and self.rounds == 2:  # how a sequence's pair with itself varies is not seen
            freedom = freedom / 2
        return log_interval(whole, stderr, freedom, level)

    def coupling(self, quantity: str = "population") -> Estimate:
        """Returns fro2[i,j] / sqrt(fro2[i,i] fro2[j,j]) (l, l), in [0, 1] up to noise; jackknife as `block_norms`.

        Raises:
            UserError: as `block_norms`.
        """
        whole, left_out = self._norms(quantity)
        return jackknife(coupling_of(whole), coupling_of(left_out))

    def off_block_energy(self, quantity: str = "population") -> Estimate:
        """Returns the share of ||G||_F^2 outside the diagonal blocks; jackknife as `block_norms`.

        Raises:
            UserError: as `block_norms`.
        """
        whole, left_out = self._norms(quantity)
        return jackknife(off_block_energy_of(whole), off_block_energy_of(left_out))

    def trace(self, quantity: str = "population", *, whole: bool = False) -> Estimate:
        """Returns tr G_ii (l,), or tr G (), unbiased: the mean squared norm of sketches, weighted by tokens.

        Args:
            quantity: what the error is of, the estimate being the same: "population" of the expected G's over sequences
                like these, "batch" of this batch's own, by what a sequence's rounds differ.
            whole: of all blocks together. Their errors do not add in quadrature: a sketch is large in all of them.

        Raises:
            UserError: an unknown quantity, or one round only (batch).
        """
        if quantity not in QUANTITIES:
            raise unknown_name("quantity", quantity, QUANTITIES)
        if quantity == "batch" and self.rounds < 2:
            raise UserError("rounds 1: the error of this batch's own trace needs at least 2 rounds")
        diagonal = torch.diagonal(self.kernel.sum(0) if whole else self.kernel, dim1=-2, dim2=-1)
        count = len(self.tokens)
        order = torch.argsort(self.sequence * self.rounds + self.round)
        each = diagonal[..., order].unflatten(-1, (count, self.rounds))
        share = self.tokens.double() / self.tokens.sum()
        by_sequence = each.mean(-1)
        mean = by_sequence @ share
        if quantity == "batch":
            variance = each.var(-1) @ share.square() / self.rounds
            return Estimate(mean=mean, stderr=variance.sqrt(), samples=count * self.rounds)
        spread = (by_sequence - mean[..., None]).square() @ share.square()
        return Estimate(mean=mean, stderr=(spread * count / max(count - 1, 1)).sqrt(), samples=count)

    def effective_rank(self, quantity: str = "population") -> Tensor:
        """Returns (tr G_ii)^2 / ||G_ii||_F^2 (l,): how many directions share a block's curvature."""
        return self.trace().mean.square() / torch.diagonal(self.block_norms(quantity).mean)

    def eigenvalues(self) -> Tensor:
        """Returns the (m,) eigenvalues of the sketched G, descending: biased upwards at the top for few sketches."""
        root = sketch_weights(self.tokens, self.sequence).sqrt()
        return torch.linalg.eigvalsh(self.kernel.sum(0) * root[:, None] * root).flip(0)

    def jacobi_radius(self, damping: float, *, cross_fit: bool | str = True) -> float:
        """Returns lambda_max((D + mu)^-1 (G + mu)), D the block diagonal of G: layerwise steps are stable below 2 / it.

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

        def factor(among: Tensor) -> Tensor:
            weights = sketch_weights(self.tokens, self.sequence[among])
            return self._coordinates[:, :, among] * weights.sqrt()

        even = self.sequence % 2 == 0
        ways = ((even, ~even), (~even, even)) if cross_fit else ((torch.ones_like(even),) * 2,)
        radii = [
            radius_of(factor(built), factor(judged), damping, direction_only=cross_fit == "direction")
            for built, judged in ways
        ]
        return sum(radii) / len(radii)

    def _norms(self, quantity: str) -> tuple[Tensor, Tensor]:
        """Returns fro2 (l, l), and with each unit left out (strata, units, l, l): found once for all that need them."""
        if quantity == "population":
            return self._population
        return self._batch if quantity == "batch" else self._pairs(quantity)

    @cached_property
    def _population(self) -> tuple[Tensor, Tensor]:
        return self._pairs("population")

    @cached_property
    def _batch(self) -> tuple[Tensor, Tensor]:
        return self._pairs("batch")

    def _pairs(self, quantity: str) -> tuple[Tensor, Tensor]:
        return pair_norms(quantity, self.kernel, self.sequence, self.round, self.tokens)

    @cached_property
    def _coordinates(self) -> Tensor:
        return coordinates_of(self.kernel)


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
    memory: int | None = None,
    autocast: torch.dtype | None = None,
    division: int = 1,
) -> LayerKernels:
    """Returns the layer kernels of a batch: every pair of blocks from `rounds` backward passes.

    Args:
        objective: model and loss, one with a known root of its Hessian (cross-entropy, squared error, binary cross-entropy).
        batches: one batch or micro-batches; the targets' first dimension counts the sequences.
        partition: the blocks; the cost does not depend on how many there are.
        rounds: independent sketches per sequence; one forward pass serves all.
        generator: where the cotangents come from.
        cotangent: "sampled", "sign" or "empirical" (see `sketches`).
        parameters: theta (p,); default the model's own.
        along: vectors (p,) by name; their inner products with every sketch are kept as `alignment`.
        plan: of an earlier call on the same model; made and verified (about 2 gradients) where not given.
        memory: bytes held on the model's device until all sketches are there: inputs and output gradients where there
            are several rounds or micro-batches, the fallback's gradients. Default: 2 GiB, or a quarter of what a GPU has
            free. What does not fit costs further passes; from a GPU 8 GiB of inputs and output gradients go to main memory
            first.
        autocast: run the model under torch.autocast of this type (torch.bfloat16); Gram matrices stay in float32. So they
            do for parameters in half precision: beside float32 at the same weights, kernels differ by 2 % of their norm
            at most, traces by 0.5 %, couplings by 0.02 in bfloat16 (0.3 %, 0.1 %, 0.003 in float16).
        division: where an earlier call had to divide (`LayerKernels.division`), begin there.

    Cost: (1 + 2 rounds) / 3 gradients and m^2 p multiply-adds for m sketches; parameters without a fast path about
    a gradient a round more. Out of memory: twice as many parts of the micro-batches, each with half of `memory`, until
    it fits; the sketches stay the same. Of several processes each runs its share of the sequences, and hands on a part of
    each parameter's gradients at a time: m p / count numbers arrive in each of them. Parameters may be sharded over them
    (FSDP2): the passes are the model's own then, at its own parameters, and `batches` holds each process's in their order.

    Raises:
        UserError: rounds below 1, a loss without a known root of its Hessian, a batch without targets, outputs or
            gradients that are not finite, or too little memory for one sequence at a time.
    """
    if rounds < 1:
        raise UserError(f"rounds {rounds}: layer kernels need at least 1")
    listed = objective.micro_batches(batches)
    tokens, positions = listed.sequence_weights, [length for _, length in listed.shapes]
    found = gathered(
        objective,
        listed,
        partition,
        plan or verified_plan(objective, listed, partition, parameters),
        Draws(cotangent, objective.loss_function, tokens, positions, rounds, generator=generator),
        rounds,
        theta=None if parameters is None else partition.unflatten(parameters.detach()),
        along=along,
        memory=_memory(objective) if memory is None else memory,
        autocast=autocast,
        division=division,
    )
    finite = found.kernel.flatten(1).isfinite().all(1)
    if not finite.all():
        wrong = [block for block, fine in zip(partition.blocks, finite, strict=True) if not fine]
        raise UserError(
            f"{type(objective.model).__name__}: gradients in {', '.join(wrong)} are not finite, though its outputs are "
            "numbers; look for an overflow or a division by zero in the backward pass there"
        )
    slices = partition.slices.values()
    return LayerKernels(
        blocks=partition.blocks,
        kernel=found.kernel,
        sequence=found.sequence,
        round=found.round,
        tokens=torch.cat(tokens).cpu(),
        alignment=found.alignment,
        norm2={
            name: torch.stack([v[where].double().square().sum() for where in slices]).cpu()
            for name, v in (along or {}).items()
        },
        routes=found.plan.routes,
        loss=found.loss / float(sum(own.double().sum() for own in tokens)),
        cotangent=cotangent,
        gradients=found.gradients,
        division=found.division,
    )


def _memory(objective: Objective) -> int:
    """Returns what may be held where nothing was said: the least that any process has room for."""
    own = working_memory(next(objective.model.parameters()).device, DEFAULT_MEMORY)
    processes = objective.processes
    return own if processes.count == 1 else -int(processes.most(torch.tensor(-own)))
