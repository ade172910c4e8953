"""What coupling between layers costs: layer kernels beside the same estimate from curvlinops' GGN products.

    python tests/benchmarks/cross_layer.py [--rounds 7] [--threads 1]

(a) one round in gradients and (c) its peak memory, on a decoder of more than 5 M parameters; (b) gradients spent until
the coupling's mean absolute error over pairs is 0.05, for 6, 14, 26 and 86 blocks of one 12-layer decoder. Both
estimate the coupling of the same batch's G; the truth is 128 rounds of kernels, from other seeds. Costs are measured.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from curvlinops import GGNLinearOperator
from products import FlatLogits, peak_growth
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.estimation.block_norms import block_norm_samples, coupling_of
from hessprobe.kernels.layer_kernels import LayerKernels, layer_kernels
from hessprobe.kernels.verification import verified_plan
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.problem.transformer import Decoder, DecoderConfig

TARGET = 0.05


def blocks(count: int) -> Callable[[str], str]:
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


class Problem:
    """A decoder, a batch, and its training gradient as the unit of cost."""

    def __init__(self, layers: int, width: int, sequences: int, length: int) -> None:
        config = DecoderConfig(
            layers=layers, width=width, feedforward=4 * width, heads=8, vocabulary=256, context=length
        )
        generator = torch.Generator().manual_seed(0)
        self.model = Decoder(config, generator=generator)
        tokens = torch.randint(0, 256, (sequences, length + 1), generator=generator)
        self.batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        self.objective = Objective(self.model)
        self.line = f"{layers} layers, width {width}, {sequences} x {length} tokens"

    def gradient(self) -> object:
        loss = F.cross_entropy(self.model(self.batch[0]).flatten(0, 1), self.batch[1].flatten())
        return torch.autograd.grad(loss, list(self.model.parameters()))

    def kernels(self, partition: Partition, rounds: int, seed: int, plan: object) -> LayerKernels:
        generator = torch.Generator().manual_seed(seed)
        return layer_kernels(
            self.objective,
            self.batch,
            partition,
            rounds=rounds,
            generator=generator,
            plan=plan,  # pyright: ignore[reportArgumentType]
        )


def median_times(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Returns each call's median seconds over interleaved rounds, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for attempt in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if attempt:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def one_round(rounds: int) -> None:
    """(a) and (c): one round's time and memory in gradients."""
    problem = Problem(layers=2, width=512, sequences=8, length=128)
    partition = Partition.of(problem.model)
    plan = verified_plan(problem.objective, problem.batch, partition)
    calls: dict[str, Callable[[], object]] = {"gradient": problem.gradient}
    for r in (1, 2, 4):
        calls[f"{r} round{'s' * (r > 1)}"] = lambda r=r: problem.kernels(partition, r, 0, plan)
    seconds = median_times(calls, rounds)
    memory = {name: min(peak_growth(call) for _ in range(3)) for name, call in calls.items()}
    print(f"\n{partition.size:,} parameters, {problem.line}: in gradients")
    for name in calls:
        unit, base = seconds["gradient"], memory["gradient"]
        print(f"  {name:<10} time {seconds[name] / unit:5.2f}   peak memory {memory[name] / base:5.2f}")


def to_target(rounds: int, counts: tuple[int, ...] = (6, 14, 26, 86)) -> None:
    """(b): gradients until the coupling is known to 0.05."""
    problem = Problem(layers=12, width=64, sequences=8, length=64)
    model, batch = problem.model, problem.batch
    parameters = dict(model.named_parameters())
    size = Partition.of(model).size
    print(
        f"\n{size:,} parameters, {problem.line}: gradients until the coupling's mean absolute error is {TARGET}"
    )
    print(f"  {'blocks':>6} {'rounds':>7} {'kernels':>9} {'probes':>7} {'curvlinops':>11} {'ratio':>7}")
    finest = Partition.of(model, blocks(86))
    plan = verified_plan(problem.objective, batch, finest)
    truth_kernels = [problem.kernels(finest, 8, 1000 + seed, plan) for seed in range(16)]
    for count in counts:
        partition = Partition.of(model, blocks(count))
        assert len(partition) == count
        truth = coupling_of(
            sum(k.block_norms("batch").mean for k in merged(truth_kernels, finest, count)) / 16
        )  # pyright: ignore[reportArgumentType]
        own = [parameters[name] for name in partition.names]
        peer = GGNLinearOperator(
            FlatLogits(model), nn.CrossEntropyLoss(), own, [(batch[0], batch[1].flatten())],
            check_deterministic=False, num_data=batch[0].shape[0],
        )  # fmt: skip
        needed = next(r for r in range(2, 33) if kernel_error(problem, partition, r, plan, truth) <= TARGET)
        probes = probes_needed(problem, partition, truth)
        v = torch.randn(partition.size, generator=torch.Generator().manual_seed(0))
        with sdpa_kernel(SDPBackend.MATH):
            seconds = median_times({"product": lambda v=v, peer=peer: peer @ v}, rounds)
        seconds |= median_times(
            {
                "gradient": problem.gradient,
                "kernels": lambda p=partition, n=needed: problem.kernels(p, n, 0, plan),
            },
            rounds,
        )
        ours = seconds["kernels"] / seconds["gradient"]
        theirs = count * probes * seconds["product"] / seconds["gradient"]
        print(f"  {count:>6} {needed:>7} {ours:>9.2f} {probes:>7} {theirs:>11.1f} {theirs / ours:>7.1f}")


def merged(kernels: list[LayerKernels], finest: Partition, count: int) -> list[LayerKernels]:
    """Returns the kernels of a coarser partition: those of its parts added up."""
    coarse = blocks(count)
    home = {slot.block: coarse(slot.name) for slot in finest.slots}
    names = list(dict.fromkeys(home[b] for b in finest.blocks))
    onto = torch.zeros(len(names), len(home), dtype=torch.float64)
    for j, block in enumerate(finest.blocks):
        onto[names.index(home[block]), j] = 1
    return [
        replace(k, blocks=tuple(names), kernel=torch.einsum("ij,jmn->imn", onto, k.kernel)) for k in kernels
    ]


def kernel_error(problem: Problem, partition: Partition, rounds: int, plan: object, truth: Tensor) -> float:
    """Returns the mean absolute error over pairs and 8 seeds."""
    found = [problem.kernels(partition, rounds, seed, plan).coupling("batch").mean for seed in range(8)]
    return float(torch.stack([off_diagonal(f - truth).abs().mean() for f in found]).mean())


def probes_needed(problem: Problem, partition: Partition, truth: Tensor, most: int = 4) -> int:
    """Returns how many sign probes a block the reference estimator needs, two repetitions averaged; `most` at most.

    The probes go through our products, batched to save time: they equal curvlinops' to 1e-7 (products.py). What a
    product costs is measured from curvlinops.
    """
    operator = GaussNewton(problem.objective, problem.batch, partition)
    generator = torch.Generator().manual_seed(1)
    found = block_norm_samples(operator, 2 * most, generator=generator).double()
    for k in range(1, most + 1):
        groups = [found[:k], found[most : most + k]]
        errors = [off_diagonal(coupling_of(g.mean(0)) - truth).abs().mean() for g in groups]
        if float(torch.stack(errors).mean()) <= TARGET:
            return k
    return most


def off_diagonal(matrix: Tensor) -> Tensor:
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    print(f"float32, {options.threads} thread(s), medians of {options.rounds} interleaved rounds")
    one_round(options.rounds)
    to_target(options.rounds)


if __name__ == "__main__":
    main()
