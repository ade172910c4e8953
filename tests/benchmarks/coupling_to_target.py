"""How much the coupling of 6, 14, 26 and 86 blocks costs at a given error: layer kernels, and sign probes of products."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Protocol

import torch
from curvlinops import GGNLinearOperator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.estimation.block_norms import block_norm_samples, coupling_of
from hessprobe.kernels.layer_kernels import LayerKernels
from hessprobe.kernels.plan import Plan
from hessprobe.kernels.verification import verified_plan
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.validation.stages.costs import FlatLogits

TARGET, COUNTS = 0.05, (6, 14, 26, 86)
LAW = 0.25  # how far error ~ probes^-1/2 may be off where it is used


class Setting(Protocol):
    """A model, a batch, and what its passes cost."""

    model: nn.Module
    batch: tuple[Tensor, Tensor]
    objective: Objective

    def gradient(self) -> object: ...
    def kernels(self, partition: Partition, rounds: int, seed: int, plan: Plan) -> LayerKernels: ...
    def median_times(self, calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]: ...


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one partition takes: `rounds` and `probes` as found ("~8": extrapolated, ">8": more), costs in gradients."""

    blocks: int
    rounds: str
    probes: str
    ours: float
    product: float
    theirs: float
    errors: list[float]
    truth_error: float


def block_of(count: int) -> Callable[[str], str]:
    """Returns a partition of a 12-layer decoder into 6, 14, 26 or 86 blocks, as name -> block."""

    def name(parameter: str) -> str:
        found = re.match(r"blocks\.(\d+)\.(\w+)\.?(\w*)", parameter)
        if not found:
            return "head" if parameter.startswith("head") else "final" if "norm" in parameter else "embedding"
        layer, part, inner = int(found[1]), found[2], found[3]
        if count == 6:
            return f"layers.{layer // 3}"
        if count == 14:
            return f"block.{layer}"
        if count == 26:
            return f"block.{layer}.{'attention' if 'attention' in part else 'mlp'}"
        return f"block.{layer}.{'norms' if 'norm' in part or 'norm' in inner else inner}"

    last = {6: "layers.3", 14: "block.11", 26: "block.11.mlp", 86: "block.11.norms"}[count]
    return lambda parameter: last if name(parameter) == "final" else name(parameter)


def gradients_to_target(problem: Setting, rounds: int, quick: bool) -> Iterator[Need]:
    """Yields what each partition takes; sketches of 86 blocks serve all, as coarser blocks' kernels are sums."""
    truth_parts, truth_rounds, seeds, most_rounds = (2, 2, 2, 3) if quick else (8, 4, 6, 4)
    finest = Partition.of(problem.model, block_of(86))
    plan = verified_plan(problem.objective, problem.batch, finest)
    truth_sketches = [problem.kernels(finest, truth_rounds, 1000 + seed, plan) for seed in range(truth_parts)]
    sketches = [problem.kernels(finest, most_rounds, seed, plan) for seed in range(seeds)]
    for count in COUNTS:
        partition = Partition.of(problem.model, block_of(count))
        assert len(partition) == count
        norms = torch.stack([summed(k, finest, count).block_norms("batch").mean for k in truth_sketches])
        truth = coupling_of(norms.mean(0))
        coarse = [summed(k, finest, count) for k in sketches]
        needed = rounds_needed(coarse, truth, most_rounds)
        # A probe a block is a product: with 86 blocks four of them, twice, would take most of an hour.
        probes, errors = probes_needed(problem, partition, truth, 1 if quick else 2 if count > 26 else 4)
        seconds = problem.median_times(
            {
                "gradient": problem.gradient,
                "kernels": lambda p=partition, n=needed or most_rounds: problem.kernels(p, n, 0, plan),
                "product": product_of(problem, partition),
            },
            rounds,
        )
        unit = seconds["gradient"]
        yield Need(
            blocks=count,
            rounds=str(needed) if needed else f">{most_rounds}",
            probes=probes,
            ours=seconds["kernels"] / unit,
            product=seconds["product"] / unit,
            theirs=count * int(probes.lstrip("~>")) * seconds["product"] / unit,
            errors=errors,
            truth_error=jackknife_error(norms),
        )


def summed(kernels: LayerKernels, finest: Partition, count: int) -> LayerKernels:
    """Returns the kernels of a coarser partition: those of its parts added up."""
    coarse = block_of(count)
    home = {slot.block: coarse(slot.name) for slot in finest.slots}
    names = list(dict.fromkeys(home[b] for b in finest.blocks))
    onto = torch.zeros(len(names), len(home), dtype=torch.float64)
    for j, block in enumerate(finest.blocks):
        onto[names.index(home[block]), j] = 1
    return replace(kernels, blocks=tuple(names), kernel=torch.einsum("ij,jmn->imn", onto, kernels.kernel))


def rounds_needed(sketches: list[LayerKernels], truth: Tensor, most: int) -> int | None:
    """Returns the fewest rounds whose mean absolute error over pairs and seeds is within the target, if any are."""
    for r in range(2, most + 1):
        found = [first_rounds(k, r).coupling("batch").mean for k in sketches]
        if error_of(found, truth) <= TARGET:
            return r
    return None


def first_rounds(kernels: LayerKernels, rounds: int) -> LayerKernels:
    """Returns the kernels without the later rounds' sketches."""
    mine = kernels.round < rounds
    kernel = kernels.kernel[:, mine][:, :, mine]
    return replace(kernels, kernel=kernel, sequence=kernels.sequence[mine], round=kernels.round[mine])


def probes_needed(
    problem: Setting, partition: Partition, truth: Tensor, most: int
) -> tuple[str, list[float]]:
    """Returns how many sign probes a block reach the target, and the errors with 1, 2, ... `most` of them."""
    operator = GaussNewton(problem.objective, problem.batch, partition)
    generator = torch.Generator().manual_seed(1)
    samples = block_norm_samples(operator, 2 * most, generator=generator).double().cpu()
    errors = []
    for n in range(1, most + 1):
        groups = [samples[:n], samples[most : most + n]]
        errors.append(error_of([coupling_of(g.mean(0)) for g in groups], truth))
        if errors[-1] <= TARGET:
            return str(n), errors
    law = most > 1 and abs(errors[0] / errors[-1] / most**0.5 - 1) <= LAW
    return (f"~{ceil(most * (errors[-1] / TARGET) ** 2)}" if law else f">{most}"), errors


def product_of(problem: Setting, partition: Partition) -> Callable[[], object]:
    """Returns one of curvlinops' GGN products as a call."""
    parameters = dict(problem.model.named_parameters())
    inputs, targets = problem.batch
    peer = GGNLinearOperator(
        FlatLogits(problem.model), nn.CrossEntropyLoss(), [parameters[name] for name in partition.names],
        [(inputs, targets.flatten())], check_deterministic=False, num_data=inputs.shape[0],
    )  # fmt: skip
    v = torch.randn(partition.size, generator=torch.Generator().manual_seed(0)).to(inputs.device)

    def product() -> object:
        with sdpa_kernel(SDPBackend.MATH):
            return peer @ v

    return product


def error_of(found: list[Tensor], truth: Tensor) -> float:
    """Returns the mean absolute error over pairs of different blocks, and over repetitions."""
    pairs = ~torch.eye(len(truth), dtype=torch.bool)
    return float(torch.stack([(f - truth)[pairs].abs().mean() for f in found]).mean())


def jackknife_error(norms: Tensor) -> float:
    """Returns the mean standard error over pairs of the coupling made of the mean of (k, l, l) block norms."""
    k = len(norms)
    left_out = torch.stack([coupling_of((norms.sum(0) - own) / (k - 1)) for own in norms])
    stderr = ((left_out - left_out.mean(0)).square().sum(0) * (k - 1) / k).sqrt()
    return float(stderr[~torch.eye(len(stderr), dtype=torch.bool)].mean())
