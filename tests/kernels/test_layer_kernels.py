"""Estimates from kernels: unbiased by z-score over seeds, with errors that cover; refused where the pairs do not exist.

Truths are dense: G_b of every sequence by the oracle. The population is a finite set of sequences, drawn from with
replacement, so that its G is known exactly as well.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.estimation.sampling import Estimate
from hessprobe.kernels.layer_kernels import LayerKernels, layer_kernels
from hessprobe.kernels.plan import MASKED, ONE_SEQUENCE, Plan
from hessprobe.kernels.verification import verified_plan
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import oracles
from tests.models import IGNORED, logcosh, redraw, seeded

VOCABULARY, LENGTH, POPULATION = 6, 5, 48
SEEDS = 300
QUANTITIES = ("block_norms", "coupling", "off_block_energy", "trace", "whole trace")


def decoder() -> nn.Module:
    """Returns a decoder of one layer in which no sequence's curvature dwarfs the others'."""
    config = DecoderConfig(
        layers=1,
        width=4,
        feedforward=6,
        heads=2,
        vocabulary=VOCABULARY,
        context=8,
        norm="rmsnorm",
        query_key_norm=False,
    )
    model = Decoder(config, generator=seeded(0)).double()
    generator = seeded(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name == "embedding.weight":
                parameter.copy_(nn.functional.rms_norm(noise, (4,)))
            elif parameter.ndim >= 2:
                parameter.copy_(0.7 * noise / parameter.shape[-1] ** 0.5)
    return model


class World:
    """A model, a finite population of sequences, and the dense G of each."""

    def __init__(self, ragged: bool) -> None:
        self.model = decoder()
        self.objective = Objective(self.model)
        self.partition = Partition.of(self.model, "layer")
        self.slices = list(self.partition.slices.values())
        generator = seeded(77)
        self.x, self.y = torch.randint(VOCABULARY, (2, POPULATION, LENGTH), generator=generator)
        if ragged:
            lengths = torch.randint(1, LENGTH + 1, (POPULATION, 1), generator=generator)
            self.y = self.y.masked_fill(torch.arange(LENGTH) >= lengths, IGNORED)
        self.tokens = (self.y != IGNORED).sum(1).double()
        self.own = torch.stack(
            [
                oracles.dense(self.model, [(self.x[b, None], self.y[b, None])], "cross_entropy")
                .in_order(self.partition.names)
                .gauss_newton
                for b in range(POPULATION)
            ]
        )
        self.plan = verified_plan(self.objective, (self.x[:4], self.y[:4]), self.partition)

    def batches(self, chosen: Tensor, *sizes: int) -> list[tuple[Tensor, Tensor]]:
        parts = chosen.split(list(sizes)) if sizes else [chosen]
        return [(self.x[part], self.y[part]) for part in parts]

    def measured(self, chosen: Tensor, seed: int, *sizes: int, rounds: int, **options: Any) -> LayerKernels:
        batches = self.batches(chosen, *sizes)
        return layer_kernels(
            self.objective,
            batches,
            self.partition,
            rounds=rounds,
            generator=seeded(seed),
            plan=self.plan,
            **options,
        )

    def gauss_newton(self, chosen: Tensor) -> Tensor:
        weights = self.tokens[chosen] / self.tokens[chosen].sum()
        return torch.einsum("b,bpq->pq", weights, self.own[chosen])

    def pairs(self, chosen: Tensor) -> Tensor:
        """The U-statistic: the mean over pairs of different sequences, by tokens, of <G_b,ij , G_c,ij>."""
        weights = torch.outer(self.tokens[chosen], self.tokens[chosen]).fill_diagonal_(0)
        weights /= weights.sum()
        g = self.own[chosen]
        return torch.stack(
            [
                torch.stack(
                    [torch.einsum("bpq,cpq,bc->", g[:, i, j], g[:, i, j], weights) for j in self.slices]
                )
                for i in self.slices
            ]
        )

    def truth(self, g: Tensor) -> dict[str, Tensor]:
        fro2 = oracles.block_fro2(g, self.slices)
        return {
            "block_norms": fro2,
            "coupling": oracles.coupling(g, self.slices),
            "off_block_energy": 1 - fro2.trace() / fro2.sum(),
            "trace": torch.stack([g[i, i].trace() for i in self.slices]),
            "whole trace": g.trace(),
        }


@cache
def world(ragged: bool) -> World:
    return World(ragged)


def estimates(kernels: LayerKernels, quantity: str) -> dict[str, Estimate]:
    return {
        "block_norms": kernels.block_norms(quantity),
        "coupling": kernels.coupling(quantity),
        "off_block_energy": kernels.off_block_energy(quantity),
        "trace": kernels.trace(quantity),
        "whole trace": kernels.trace(quantity, whole=True),
    }


class Trials:
    """Means and standard errors over seeds, (seeds, ...), without the pairs that symmetry repeats."""

    def __init__(self, found: list[Estimate], truth: Tensor, *, diagonal: bool) -> None:
        def once(x: Tensor) -> Tensor:
            rows, columns = torch.triu_indices(x.shape[-1], x.shape[-1], 0 if diagonal else 1)
            return x[..., rows, columns]

        pick = once if truth.dim() == 2 else lambda x: x
        self.mean = pick(torch.stack([e.mean for e in found]))
        self.stderr = pick(torch.stack([e.stderr for e in found]))
        self.truth = pick(truth)

    @property
    def z(self) -> Tensor:
        return (self.mean.mean(0) - self.truth) / (self.mean.std(0) / len(self.mean) ** 0.5)

    @property
    def bias(self) -> Tensor:
        return (self.mean.mean(0) - self.truth) / self.truth

    def coverage(self, errors: float) -> Tensor:
        return ((self.mean - self.truth).abs() < errors * self.stderr).double().mean(0)

    @property
    def honesty(self) -> Tensor:
        """Root mean square of the stated errors over the actual spread: above 1 is cautious."""
        return self.stderr.square().mean(0).sqrt() / self.mean.std(0)


@cache
def batch_kernels(ragged: bool) -> list[LayerKernels]:
    """One batch of 16 sequences in two micro-batches, fresh cotangents at every seed."""
    return [world(ragged).measured(torch.arange(16), seed, 10, 6, rounds=3) for seed in range(SEEDS)]


def first_rounds(kernels: LayerKernels, rounds: int) -> LayerKernels:
    """Returns the kernels without the later rounds' sketches."""
    mine = kernels.round < rounds
    return replace(
        kernels,
        kernel=kernels.kernel[:, mine][:, :, mine],
        sequence=kernels.sequence[mine],
        round=kernels.round[mine],
    )


@cache
def batch_trials(ragged: bool, rounds: int = 3) -> dict[str, Trials]:
    here = world(ragged)
    found = [estimates(first_rounds(k, rounds), "batch") for k in batch_kernels(ragged)]
    truth = here.truth(here.gauss_newton(torch.arange(16)))
    return {n: Trials([f[n] for f in found], truth[n], diagonal=n != "coupling") for n in truth}


@cache
def population_kernels(ragged: bool) -> list[LayerKernels]:
    """Fresh sequences and fresh cotangents at every seed."""
    draws = [torch.randint(POPULATION, (24,), generator=seeded(10**6 + seed)) for seed in range(SEEDS)]
    return [world(ragged).measured(chosen, seed, rounds=1) for seed, chosen in enumerate(draws)]


@cache
def population_trials(ragged: bool) -> dict[str, Trials]:
    here = world(ragged)
    found = [estimates(k, "population") for k in population_kernels(ragged)]
    truth = here.truth(here.gauss_newton(torch.arange(POPULATION)))
    return {n: Trials([f[n] for f in found], truth[n], diagonal=n != "coupling") for n in truth}


# -- unbiased, and with honest errors ----------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize("ragged", [False, True], ids=["equal lengths", "ragged"])
def test_batch_quantities_are_unbiased(ragged, name):
    z = batch_trials(ragged)[name].z
    assert z.abs().max() < 3.5, z


@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize("ragged", [False, True], ids=["equal lengths", "ragged"])
def test_population_quantities_are_unbiased(ragged, name):
    z = population_trials(ragged)[name].z
    assert z.abs().max() < 3.5, z


@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize("ragged", [False, True], ids=["equal lengths", "ragged"])
def test_population_errors_are_honest(ragged, name):
    """As large as the spread; estimates as skewed as a square's cover a little less than a normal's 0.68 and 0.95."""
    trials = population_trials(ragged)[name]
    assert (trials.honesty > 0.8).all() and (trials.honesty < 1.5).all(), trials.honesty
    assert (trials.coverage(1) > 0.55).all(), trials.coverage(1)
    assert (trials.coverage(2) > 0.78).all(), trials.coverage(2)
    assert trials.coverage(2).median() > 0.85, trials.coverage(2)


@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize("ragged", [False, True], ids=["equal lengths", "ragged"])
def test_batch_errors_are_honest_or_cautious(ragged, name):
    trials = batch_trials(ragged)[name]
    assert (trials.honesty > 0.85).all(), trials.honesty
    assert (trials.coverage(1) > 0.6).all(), trials.coverage(1)
    assert (trials.coverage(2) > 0.86).all(), trials.coverage(2)


@pytest.mark.parametrize("name", ["block_norms", "coupling", "off_block_energy"])
@pytest.mark.parametrize("ragged", [False, True], ids=["equal lengths", "ragged"])
def test_batch_errors_of_two_rounds_are_as_large_as_the_spread(ragged, name):
    """Two rounds do not show how a sequence's pair with itself varies; without an account of it 0.8 to 0.97."""
    trials = batch_trials(ragged, 2)[name]
    assert (trials.honesty > 0.92).all() and (trials.honesty < 1.2).all(), trials.honesty
    assert (trials.coverage(1) > 0.56).all(), trials.coverage(1)


@pytest.mark.parametrize("name", ["trace", "whole trace"])
@pytest.mark.parametrize("rounds", [2, 3])
@pytest.mark.parametrize("ragged", [False, True], ids=["equal lengths", "ragged"])
def test_errors_of_the_batchs_own_trace_are_as_large_as_the_spread(ragged, rounds, name):
    trials = batch_trials(ragged, rounds)[name]
    # 300 seeds: the spread itself is known to 4 %.
    assert (trials.honesty > 0.87).all() and (trials.honesty < 1.13).all(), trials.honesty
    assert (trials.coverage(2) > 0.86).all(), trials.coverage(2)  # labels now and then are far out


def test_what_sequences_differ_by_is_no_error_of_the_batchs_own_trace():
    """The data's own labels are the same in every round."""
    kernels = world(True).measured(torch.arange(8), 0, rounds=2, cotangent="empirical")
    for whole in (False, True):
        assert kernels.trace("batch", whole=whole).stderr.max() < 1e-12
        assert kernels.trace(whole=whole).stderr.min() > 1e-3 * kernels.trace(whole=whole).mean.min()


@pytest.mark.parametrize("case", ["population", "batch", "batch of 2 rounds"])
@pytest.mark.parametrize("ragged", [False, True], ids=["equal lengths", "ragged"])
def test_intervals_of_block_norms_hold_the_truth_more_often_than_symmetric_ones(ragged, case):
    here, quantity = world(ragged), case.split()[0]
    kernels = population_kernels(ragged) if quantity == "population" else batch_kernels(ragged)
    kernels = [first_rounds(k, 2) if "2" in case else k for k in kernels]
    chosen = torch.arange(POPULATION if quantity == "population" else 16)
    truth = here.truth(here.gauss_newton(chosen))["block_norms"]
    held = torch.stack(
        [(low < truth) & (truth < high) for low, high in (k.block_norm_intervals(quantity) for k in kernels)]
    )
    plain = torch.stack(
        [(e.mean - truth).abs() < 2 * e.stderr for e in (k.block_norms(quantity) for k in kernels)]
    )
    # 300 seeds: two binomial errors are 2.5 %.
    assert (held.double().mean(0) > 0.915).all(), held.double().mean(0)
    assert 0.94 < held.double().mean() < 0.965
    assert held.double().mean() > plain.double().mean() + 0.02


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("kind", ["sampled", "sign"])
def test_population_norms_of_one_batch_are_its_pairs_of_different_sequences(kind, rounds):
    """Given the sequences, ragged ones too: what the cotangents leave is the U-statistic."""
    here, chosen = world(True), torch.arange(12)
    found = [
        here.measured(chosen, seed, 5, 7, rounds=rounds, cotangent=kind).block_norms()
        for seed in range(SEEDS)
    ]
    assert Trials(found, here.pairs(chosen), diagonal=True).z.abs().max() < 3.5


def test_trace_over_a_thousand_seeds():
    here, chosen = world(True), torch.arange(8)
    found = [here.measured(chosen, seed, rounds=1).trace() for seed in range(1000)]
    z = Trials(found, here.truth(here.gauss_newton(chosen))["trace"], diagonal=True).z
    assert z.abs().max() < 3, z


@pytest.mark.parametrize("plan", [ONE_SEQUENCE, MASKED])
def test_the_fallback_gives_the_same_estimates(plan):
    here, chosen = world(True), torch.arange(6)
    fast = here.measured(chosen, 3, 2, 4, rounds=2)
    slow = layer_kernels(
        here.objective,
        here.batches(chosen, 2, 4),
        here.partition,
        rounds=2,
        generator=seeded(3),
        plan=Plan(taps=(), fallback=here.partition.names, how=plan),
    )
    assert torch.allclose(fast.kernel, slow.kernel, rtol=1e-11, atol=1e-15)
    for quantity in ("population", "batch"):
        for name, one in estimates(fast, quantity).items():
            assert torch.allclose(one.mean, estimates(slow, quantity)[name].mean, rtol=1e-9, atol=1e-12)


# -- identities --------------------------------------------------------------------------------------------


def test_what_is_returned():
    here, chosen = world(True), torch.arange(5)
    along = torch.randn(here.partition.size, generator=seeded(1), dtype=torch.float64)
    kernels = here.measured(chosen, 0, 2, 3, rounds=2, along={"v": along})
    assert kernels.blocks == here.partition.blocks and kernels.rounds == 2
    assert kernels.kernel.shape == (3, 10, 10) and kernels.kernel.dtype == torch.float64
    assert kernels.sequence.tolist() == [0, 1, 0, 1, 2, 3, 4, 2, 3, 4]
    assert kernels.round.tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    assert kernels.tokens.tolist() == here.tokens[chosen].tolist()
    assert kernels.alignment["v"].shape == (3, 10)
    norms = torch.stack([along[i].square().sum() for i in here.slices])
    assert torch.allclose(kernels.norm2["v"], norms)
    assert kernels.coupling().mean.diagonal().sub(1).abs().max() < 1e-9
    assert (kernels.eigenvalues().diff() <= 0).all()
    assert torch.allclose(kernels.eigenvalues().sum(), kernels.trace().mean.sum())
    rank = kernels.effective_rank()
    assert torch.allclose(rank, kernels.trace().mean.square() / kernels.block_norms().mean.diagonal())


def test_curvature_along_a_vector_from_alignments_is_unbiased():
    """E sum_m w_m a_i[m] a_j[m] = v_i . G_ij v_j: directions are judged without a further pass."""
    here, chosen = world(True), torch.arange(8)
    along = torch.randn(here.partition.size, generator=seeded(1), dtype=torch.float64)
    g = here.gauss_newton(chosen)
    truth = torch.stack(
        [torch.stack([along[i] @ g[i, j] @ along[j] for j in here.slices]) for i in here.slices]
    )
    found = []
    for seed in range(SEEDS):
        k = here.measured(chosen, seed, rounds=1, along={"v": along})
        a, weight = k.alignment["v"], (k.tokens / k.tokens.sum())[k.sequence]
        found.append(Estimate(mean=(a * weight) @ a.mT, stderr=torch.ones(3, 3), samples=1))
    assert Trials(found, truth, diagonal=True).z.abs().max() < 3.5


def test_squared_error_and_empirical_fisher():
    model = redraw(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), seeded(1))
    x, y = torch.randn(2, 6, 3, generator=seeded(2), dtype=torch.float64)
    batch = (x, y[:, :2].contiguous())
    objective, partition = Objective(model, loss="squared_error"), Partition.of(model, "parameter")
    slices = list(partition.slices.values())
    truth = oracles.dense(model, [batch], "squared_error").in_order(partition.names).gauss_newton
    plan = verified_plan(objective, batch, partition)
    for kind in ("sampled", "sign"):
        found = [
            layer_kernels(
                objective, batch, partition, rounds=2, generator=seeded(s), cotangent=kind, plan=plan
            ).block_norms("batch")
            for s in range(SEEDS)
        ]
        assert Trials(found, oracles.block_fro2(truth, slices), diagonal=True).z.abs().max() < 3.5
    fisher = layer_kernels(
        objective, batch, partition, rounds=1, generator=seeded(0), cotangent="empirical", plan=plan
    )
    own = torch.stack(
        [objective.gradient((batch[0][b : b + 1], batch[1][b : b + 1]), partition)[1] for b in range(6)]
    )
    wanted = torch.stack([own[:, i] @ own[:, i].mT for i in slices])
    assert fisher.cotangent == "empirical" and torch.allclose(fisher.kernel, wanted, rtol=1e-11)


def test_autocast_agrees_within_its_precision():
    here = world(False)
    model = decoder().float()
    objective = Objective(model)
    batch = (here.x[:16], here.y[:16])
    plan = verified_plan(objective, batch, here.partition)

    def measured(autocast: torch.dtype | None) -> LayerKernels:
        # Signs: a sampled label may fall on another class where the logits are a little different.
        return layer_kernels(
            objective,
            batch,
            here.partition,
            rounds=2,
            generator=seeded(1),
            plan=plan,
            autocast=autocast,
            cotangent="sign",
        )

    fine, coarse = measured(None), measured(torch.bfloat16)
    gap = (fine.kernel - coarse.kernel).flatten(1).norm(dim=1) / fine.kernel.flatten(1).norm(dim=1)
    assert (gap < 0.05).all() and (gap > 1e-5).all(), gap
    assert torch.allclose(fine.trace().mean, coarse.trace().mean, rtol=0.05)


# -- bad input ---------------------------------------------------------------------------------------------


def test_one_sequence_has_no_population():
    here = world(False)
    kernels = here.measured(torch.arange(1), 0, rounds=2)
    for attempt in (kernels.block_norms, kernels.coupling, kernels.off_block_energy):
        with pytest.raises(
            UserError, match="1 sequence: the population quantity .* at least 2; measure with"
        ):
            attempt()


def test_two_sequences_have_no_population_error():
    with pytest.raises(UserError, match="2 sequences: .* use 3 or more"):
        world(False).measured(torch.arange(2), 0, rounds=2).block_norms()


def test_one_round_has_no_batch_quantity():
    with pytest.raises(UserError, match="rounds 1: the batch quantity .* use quantity='population', or more"):
        world(False).measured(torch.arange(4), 0, rounds=1).block_norms("batch")
    with pytest.raises(UserError, match="rounds 1: .* own trace needs at least 2"):
        world(False).measured(torch.arange(4), 0, rounds=1).trace("batch")


def test_no_round_and_unknown_names_are_refused():
    here = world(False)
    with pytest.raises(UserError, match="rounds 0: layer kernels need at least 1"):
        here.measured(torch.arange(4), 0, rounds=0)
    with pytest.raises(UserError, match="no quantity named 'bach'. Did you mean 'batch'"):
        here.measured(torch.arange(4), 0, rounds=2).block_norms("bach")
    with pytest.raises(UserError, match="no quantity named 'bach'. Did you mean 'batch'"):
        here.measured(torch.arange(4), 0, rounds=2).trace("bach")
    with pytest.raises(UserError, match="no cotangent named"):
        here.measured(torch.arange(4), 0, rounds=2, cotangent="labels")


class Rooted(nn.Module):
    """Outputs that are numbers, and a gradient that is not: the derivative of a root at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.above((0 * self.below(x)).sqrt())


def test_gradients_that_are_not_numbers_are_refused_by_block():
    model = redraw(Rooted(), seeded(1))
    batch = (torch.ones(3, 3).double(), torch.zeros(3, dtype=torch.long))
    partition = Partition.of(model, "module")
    with pytest.raises(UserError, match="Rooted: gradients in below are not finite, though its outputs are"):
        layer_kernels(Objective(model), batch, partition, rounds=1, generator=seeded(0))


def test_intervals_of_estimates_that_are_not_positive_are_symmetric():
    kernels = world(False).measured(torch.arange(6), 0, rounds=1)
    norms = kernels.block_norms()
    less = replace(kernels)
    less.__dict__["_population"] = (norms.mean - 2 * norms.mean.max(), less._population[1])
    low, high = less.block_norm_intervals()
    mean, stderr = less.block_norms().mean, less.block_norms().stderr
    torch.testing.assert_close(low + high, 2 * mean)
    assert (high - mean > 1.96 * stderr).all()


def test_batches_without_targets_and_other_losses_are_refused():
    here = world(False)
    nothing = (here.x[:3], torch.full((3, LENGTH), IGNORED))
    with pytest.raises(UserError, match="no token carries a target"):
        layer_kernels(here.objective, nothing, here.partition, generator=seeded(0))
    model = redraw(nn.Linear(3, 2), seeded(0))
    objective, batch = Objective(model, loss=logcosh), (torch.ones(3, 3).double(), torch.ones(3, 2).double())
    with pytest.raises(UserError, match=r"got logcosh: measure by products.*block_norms\(GaussNewton"):
        layer_kernels(objective, batch, Partition.of(model, "parameter"), generator=seeded(0))


def test_a_sequence_without_targets_weighs_nothing():
    here = world(True)
    x, y = here.x[:5], here.y[:5].clone()
    y[2] = IGNORED
    kept = torch.tensor([0, 1, 3, 4])
    kernels = layer_kernels(
        here.objective, (x, y), here.partition, rounds=2, generator=seeded(0), plan=here.plan
    )
    assert kernels.tokens[2] == 0 and kernels.kernel[:, kernels.sequence == 2].abs().max() == 0
    mine = kernels.sequence != 2
    without = LayerKernels(
        blocks=kernels.blocks,
        kernel=kernels.kernel[:, mine][:, :, mine],
        sequence=torch.searchsorted(kept, kernels.sequence[mine]),
        round=kernels.round[mine],
        tokens=kernels.tokens[kept],
    )
    for quantity in ("population", "batch"):
        mean = kernels.block_norms(quantity).mean
        assert torch.allclose(mean, without.block_norms(quantity).mean, rtol=1e-10)


# -- one sequence, and float64 -----------------------------------------------------------------------------


@cache
def one_sequence(rounds: int) -> list[LayerKernels]:
    return [world(True).measured(torch.tensor([3]), seed, rounds=rounds) for seed in range(SEEDS)]


@pytest.mark.parametrize("rounds", [2, 4])
def test_the_batch_quantity_of_one_sequence_is_unbiased(rounds):
    """Its pairs are those of its rounds; it needs no other sequence."""
    here = world(True)
    truth = here.truth(here.gauss_newton(torch.tensor([3])))["block_norms"]
    found = [kernels.block_norms("batch") for kernels in one_sequence(rounds)]
    trials = Trials(found, truth, diagonal=True)
    assert trials.z.abs().max() < 3.5, trials.z
    if rounds == 2:  # one pair: nothing is known of its error, and nothing is claimed
        assert trials.stderr.isnan().all()
        assert found[0].mean.isfinite().all() and one_sequence(2)[0].coupling("batch").mean.isfinite().all()
        assert all(ends.isnan().all() for ends in one_sequence(2)[0].block_norm_intervals("batch"))
    else:
        assert (trials.honesty > 0.7).all() and (trials.honesty < 2).all(), trials.honesty
    with pytest.raises(UserError, match="1 sequence: the population quantity needs pairs of different"):
        one_sequence(rounds)[0].block_norms()


def test_kernels_of_a_float64_model_are_float64_throughout():
    """Against gradients of every sequence alone, for cotangents that the data decide: ragged, so that scales are roots."""
    here, chosen = world(True), torch.arange(6)
    along = torch.randn(here.partition.size, generator=seeded(1), dtype=torch.float64)
    kernels = here.measured(chosen, 0, 2, 4, rounds=1, cotangent="empirical", along={"v": along})
    rows = []
    for b in chosen.tolist():
        logits = here.model(here.x[b, None]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, here.y[b], ignore_index=IGNORED, reduction="sum")
        own = dict(
            zip(
                (name for name, _ in here.model.named_parameters()),
                torch.autograd.grad(loss, list(here.model.parameters())),
                strict=True,
            )
        )
        rows.append(torch.cat([own[name].flatten() for name in here.partition.names]) / here.tokens[b].sqrt())
    w = torch.stack(rows)
    wanted = torch.stack([w[:, i] @ w[:, i].T for i in here.slices])
    assert oracles.relative_error(kernels.kernel, wanted) < 1e-12
    wanted = torch.stack([w[:, i] @ along[i] for i in here.slices])
    assert oracles.relative_error(kernels.alignment["v"], wanted) < 1e-12
