"""Correctness: products, kernels and rows on this device beside float64 on the CPU, for models of every kind."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.kernels.layer_kernels import LayerKernels, layer_kernels
from hessprobe.kernels.verification import verified_plan
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.validation.figures import Figure, check, failure, holds, measured
from hessprobe.validation.modes import BFLOAT16, TF32, matmuls, precisions
from hessprobe.validation.oracle import Oracle
from hessprobe.validation.problems import Batches, odd_problems
from hessprobe.validation.rows import compared, row_of
from hessprobe.validation.runner import Bench

# Relative to the product's norm. TF32 keeps 10 bits of each factor, 5e-4, and a product goes through a dozen layers.
PRODUCT = {"float32": 1e-4, TF32: 5e-2}
KERNEL = {"float32": 1e-4, TF32: 5e-2, BFLOAT16: 1e-1}
SYMMETRY = {"float32": 1e-5, TF32: 1e-2}
Z = 4.0  # root mean square over pairs, which go together: about one draw of Student's t with SEEDS - 1 degrees
SEEDS, ROUNDS = 8, 4


def correctness(bench: Bench) -> Iterator[Figure]:
    """Yields the figures of every model, then of rows on both devices."""
    device = bench.device
    for name, make in odd_problems().items():
        try:
            model, batches = make()
            yield from _products(name, model, batches, device)
            yield from _kernels(name, model, batches, device)
        except Exception as error:  # the other models have figures of their own
            yield failure(name, error)
    yield from _rows(bench)


def _products(name: str, model: nn.Module, batches: Batches, device: torch.device) -> Iterator[Figure]:
    partition = Partition.of(model)
    u, v = torch.randn(2, partition.size, generator=torch.Generator().manual_seed(5))
    oracle = Oracle(model, batches, partition)
    wanted = {"G": oracle.gauss_newton(v), "H": oracle.hessian(v)}
    own, there = _on(device, model, batches)
    objective = Objective(own)
    for precision in (p for p in precisions(device) if p != BFLOAT16):
        with matmuls(precision):
            for matrix, kind in (("G", GaussNewton), ("H", Hessian)):
                operator = kind(objective, there, Partition.of(own))
                both = torch.stack([u, v]).to(device)
                av = operator.apply(both[1:])[0]
                au = operator.apply(both[:1])[0]
                gap = _relative(av, wanted[matrix])
                yield check(
                    f"{name}: {matrix} v in {precision} against float64", gap, PRODUCT[precision], "relative"
                )
                rows = operator.apply(both)
                apart = _relative(rows[1], wanted[matrix])
                yield check(
                    f"{name}: {matrix} of two rows in {precision} against float64",
                    apart,
                    PRODUCT[precision],
                    "relative",
                )
                asymmetry = (both[0] @ av - both[1] @ au).abs() / (both[0].norm() * av.norm())
                yield check(
                    f"{name}: {matrix} symmetric in {precision}",
                    float(asymmetry),
                    SYMMETRY[precision],
                    "relative",
                )


def _kernels(name: str, model: nn.Module, batches: Batches, device: torch.device) -> Iterator[Figure]:
    partition = Partition.of(model)
    own, there = _on(device, model, batches)
    plan = verified_plan(Objective(own), there, partition)

    def drawn(m: nn.Module, data: Batches, seed: int, cotangent: str, autocast: torch.dtype | None = None):
        return layer_kernels(
            Objective(m),
            data,
            Partition.of(m),
            rounds=ROUNDS,
            cotangent=cotangent,
            generator=torch.Generator().manual_seed(seed),
            autocast=autocast,
            plan=plan if m is own else None,
        )

    truth = Oracle(model, batches, partition).block_norms()
    found = torch.stack(
        [drawn(own, there, seed, "sampled").block_norms("batch").mean for seed in range(SEEDS)]
    )
    z = (found.mean(0) - truth) / (found.std(0) / SEEDS**0.5)
    upper = torch.triu(torch.ones_like(truth)).bool()
    rms = float(z[upper].square().mean().sqrt())
    yield check(f"{name}: kernels' block norms against exact, z-scores' root mean square", rms, Z)
    far = float(((found.mean(0) - truth).abs() / truth.diagonal().max()).max())
    yield measured(
        f"{name}: kernels' block norms against exact, largest, of the largest norm", far, "relative"
    )
    # Signs: a sampled label may fall on another class where logits are a little different.
    fine = drawn(copy.deepcopy(model).double(), batches, 0, "sign")
    for precision in precisions(device):
        with matmuls(precision):
            coarse = drawn(own, there, 0, "sign", torch.bfloat16 if precision == BFLOAT16 else None)
        words = "bfloat16 autocast" if precision == BFLOAT16 else precision
        yield check(
            f"{name}: kernels in {words} against float64", _apart(coarse, fine), KERNEL[precision], "relative"
        )


def _rows(bench: Bench) -> Iterator[Figure]:
    """Same seed, same row: twice on this device, and on the CPU."""
    small = {"sequences": 4, "rounds": 2}
    there, again = row_of("cross_layer", small, bench.device), row_of("cross_layer", small, bench.device)
    same = all(_equal(there[name], again[name]) for name in there if name not in ("seconds", "peak_memory"))
    if bench.device.type == "cpu":
        yield holds("same seed, same row, twice on this device", same)
    else:  # sums in another order, where atomics add them up
        gaps = compared(again, there)
        yield check("same seed, same row, twice on this device", max(gaps.values()), 1e-3, "relative")
    gaps = compared(row_of("cross_layer", small, torch.device("cpu")), there)
    worst = max(gaps, key=lambda name: gaps[name])
    yield check(
        "same seed, same row, here and on the CPU", gaps[worst], 1e-2, "relative", note=f"worst: {worst}"
    )


def _on(device: torch.device, model: nn.Module, batches: Batches) -> tuple[nn.Module, Batches]:
    return copy.deepcopy(model).to(device), [(x.to(device), y.to(device)) for x, y in batches]


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().cpu().double() - wanted).norm() / wanted.norm())


def _apart(coarse: LayerKernels, fine: LayerKernels) -> float:
    gap = (coarse.kernel - fine.kernel).flatten(1).norm(dim=1) / fine.kernel.flatten(1).norm(dim=1)
    return float(gap.max())


def _equal(one: object, two: object) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return torch.equal(torch.nan_to_num(one), torch.nan_to_num(two))
    return bool(one == two or (one != one and two != two))
