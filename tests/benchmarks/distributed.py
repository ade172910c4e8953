"""Several processes measuring together: how time grows when the work grows with them, and what large models would take.

    python tests/benchmarks/distributed.py [--counts 1 2 4] [--rounds 7] [--quick]
    python tests/benchmarks/distributed.py --plan [--round-cost 1.17] [--tflops 400] [--gigabytes 50]

Weak scaling: as many sequences for each process, one thread each, on one machine (more processes than cores share them, and
say nothing); interleaved rounds, medians, bytes as the collectives were given them. --plan prints what a row of cross_layer
takes at 1 and 8 billion parameters: operations counted, times the measured cost of a round over the counted one; bytes by
the formulas that the first part compares with what really moved.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.kernels.layer_kernels import layer_kernels
from hessprobe.kernels.verification import verified_plan
from hessprobe.machine.processes import Processes
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition

SIZES = {
    "5M": (DecoderConfig(layers=2, width=512, feedforward=2048, heads=8, vocabulary=256, context=128), (8, 128)),
    "tiny": (DecoderConfig(layers=2, width=16, feedforward=32, heads=2, vocabulary=32, context=16), (2, 16)),
}  # fmt: skip
PAPER = {
    "1B": DecoderConfig(layers=18, width=2048, feedforward=8192, heads=16, vocabulary=32768, context=1024),
    "8B": DecoderConfig(layers=38, width=4096, feedforward=16384, heads=32, vocabulary=32768, context=1024),
}
SEQUENCES, LENGTH = 256, 1024  # of a planned row: one round, 256 sketches
KEPT = 34  # bytes a token, layer and unit of width that backward keeps in bf16 (Korthikanti et al. 2022, 2205.05198)


class Counting(Processes):
    """Processes that count the bytes their collectives are given."""

    exchanged_bytes = 0
    summed_bytes = 0

    def exchanged(self, rows: Tensor, counts: Sequence[int]) -> tuple[Tensor, slice]:
        found, columns = super().exchanged(rows, counts)
        self.exchanged_bytes += found.nbytes
        return found, columns

    def total(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.summed_bytes += sum(x.nbytes for x in tensors)
        return super().total(*tensors)


def one_process(rank: int, count: int, size: str, rounds: int, folder: str) -> None:
    """Times every call on this process's part of the batch; the first process leaves the figures in the folder."""
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet{count}", rank=rank, world_size=count
        )
    processes = Counting(rank, count)
    config, (sequences, length) = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    model = Decoder(config, generator=generator)
    tokens = torch.randint(0, config.vocabulary, (sequences * count, length + 1), generator=generator)
    batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    objective, partition = Objective(model, processes=processes), Partition.of(model)
    plan = verified_plan(objective, batch, partition)
    v = torch.randn(1, partition.size, generator=generator)
    product = GaussNewton(objective, batch, partition)

    def kernels(r: int) -> Callable[[], object]:
        seed = torch.Generator().manual_seed(1)
        return lambda: layer_kernels(objective, batch, partition, rounds=r, generator=seed, plan=plan)

    calls: dict[str, Callable[[], object]] = {
        "gradient": lambda: objective.gradient(batch, partition),
        "product of G": lambda: product.apply(v),
        "kernels, 1 round": kernels(1),
        "kernels, 2 rounds": kernels(2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    moved: dict[str, tuple[int, int]] = {}
    for attempt in range(rounds + 1):
        for name, call in calls.items():
            processes.all_say(True)
            processes.exchanged_bytes = processes.summed_bytes = 0
            start = time.perf_counter()
            call()
            processes.all_say(True)
            if attempt:
                seconds[name].append(time.perf_counter() - start)
            moved[name] = processes.exchanged_bytes, processes.summed_bytes
    if processes.is_first:
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        sketches = {"kernels, 1 round": sequences * count, "kernels, 2 rounds": 2 * sequences * count}
        formula = {name: m * partition.size * 4 / count for name, m in sketches.items()}
        torch.save((medians, moved, formula, partition.size), f"{folder}/{count}")
    if count > 1:
        dist.destroy_process_group()


def weak_scaling(counts: Sequence[int], rounds: int, size: str) -> None:
    """Prints seconds beside one process's, and bytes beside the formula."""
    found: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            mp.spawn(one_process, (count, size, rounds, folder), nprocs=count)  # pyright: ignore[reportPrivateImportUsage]
            found[count] = torch.load(Path(folder, str(count)))
    first = found[counts[0]]
    sequences, length = SIZES[size][1]
    print(
        f"weak scaling: {first[3]:,} parameters, {sequences} x {length} tokens a process, {os.cpu_count()} cores"
    )
    print(f"  {'':<18}" + "".join(f"{f'{n} processes':>36}" for n in counts))
    for name in first[0]:
        cells = []
        for count in counts:
            medians, moved, formula, _ = found[count]
            exchanged, summed = moved[name]
            text = f"{medians[name] * 1e3:.0f} ms ({medians[name] / first[0][name]:.2f})"
            if count > 1:
                text += f" {(exchanged + summed) / 2**20:.1f} MiB"
            if count > 1 and name in formula:
                text += f" ({formula[name] / 2**20:.1f})"
            cells.append(f"{text:>36}")
        print(f"  {name:<18}" + "".join(cells))
    print(
        f"  medians of {rounds} interleaved rounds; in brackets over those of {counts[0]}; then what arrives at each:\n"
        "  sketches exchanged (in brackets: sketches x parameters x 4 / processes) and tensors summed"
    )


def paper_plan(round_cost: float, tflops: float, gigabytes: float) -> None:
    """Prints what one row of cross_layer by layer kernels takes of large models under FSDP2."""
    print(
        f"one row of cross_layer, {SEQUENCES} sequences of {LENGTH} tokens, 1 round, FSDP2, passes in bf16\n"
        f"  a round is {round_cost} gradients (measured), {tflops:g} TFLOP/s and {gigabytes:g} GB/s a GPU (assumed)\n"
        f"  {'10^9':<6}{'GPUs':>5}{'gradients':>11}{'PFLOP a GPU':>13}{'GB exchanged':>14}{'GB gathered':>13}"
        f"{'GB held':>9}{'seconds':>9}"
    )
    for config in PAPER.values():
        p = sum(x.numel() for x in Decoder(config, generator=None).parameters())
        for gpus in (8, 16, 32, 64):
            tokens = SEQUENCES * LENGTH / gpus
            attention = 12 * config.layers * config.width * LENGTH / 2  # causal, forward and backward
            passes = round_cost * (6 * p + attention) * tokens
            grams = 2 * SEQUENCES**2 * p / gpus
            exchanged = SEQUENCES * p * 4 / gpus * (gpus - 1) / gpus
            gathered = 2 * 2 * p * (gpus - 1) / gpus  # forward and backward, bf16
            kept = KEPT * config.layers * config.width * tokens
            held = kept + 4 * p / gpus + 3 * 2**25
            seconds = (passes + grams) / (tflops * 1e12) + (exchanged + gathered) / (gigabytes * 1e9)
            print(
                f"  {p / 1e9:<6.3g}{gpus:>5}{round_cost + grams / ((6 * p + attention) * tokens):>11.2f}"
                f"{(passes + grams) / 1e15:>13.2f}{exchanged / 1e9:>14.1f}{gathered / 1e9:>13.1f}"
                f"{held / 1e9:>9.1f}{seconds:>9.1f}"
            )
    print(
        "  exchanged: sketches x parameters x 4 bytes / GPUs arrive at each, and as many leave; gathered: parameters in\n"
        "  bf16, twice. Held: activations kept for the backward pass (34 bytes a token, layer and unit of width, without\n"
        "  checkpointing), the shard in float32, pieces of sketches. Seconds: computing, then moving, nothing overlapped."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a tiny model: that it runs")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--round-cost", type=float, default=1.17)
    parser.add_argument("--tflops", type=float, default=400.0)
    parser.add_argument("--gigabytes", type=float, default=50.0)
    given = parser.parse_args()
    if given.plan:
        paper_plan(given.round_cost, given.tflops, given.gigabytes)
    else:
        weak_scaling(given.counts, 2 if given.quick else given.rounds, "tiny" if given.quick else "5M")


if __name__ == "__main__":
    main()
