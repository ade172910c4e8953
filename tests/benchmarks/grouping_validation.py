"""Do groupings judged in the space of sketches agree with exact solves? Held-out decreases on a warmed-up nano decoder.

    OPENBLAS_NUM_THREADS=1 python tests/benchmarks/grouping_validation.py [--rounds 4 16] [--dampings 1 .3 .03]

Exact: conjugate gradients on either half of the sequences, judged by products on the other half. Kernels: the same
halves. The gradient is of all sequences in both. Dampings are the largest eigenvalue of G (about 7 here) over 7, 20 and
200: at 1 few directions matter and a few hundred sketches are enough, at .03 hundreds do and they are not. tr G / p
(about 5e-4) is no scale for them: most of the p directions carry no curvature at all.
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
import torch
from torch import Tensor

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.instruments.cross_layer.grouping.groupings import relative_decrease
from hessprobe.instruments.cross_layer.grouping.sketch_space import CrossFit
from hessprobe.instruments.cross_layer.grouping.sketches import Sketches
from hessprobe.kernels.layer_kernels import LayerKernels, layer_kernels
from hessprobe.models.transformer import SIZES, Decoder
from hessprobe.optimization.conjugate_gradient import conjugate_gradient
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.text.corpus import Corpus

CONTEXT, WARM_UP = 32, 100
Batch = tuple[Tensor, Tensor]


def draw(tokens: np.ndarray, count: int, rng: np.random.Generator) -> Batch:
    """Returns windows of the corpus as (inputs, targets)."""
    starts = rng.integers(0, len(tokens) - CONTEXT - 1, count)
    windows = torch.as_tensor(np.stack([tokens[i : i + CONTEXT + 1] for i in starts]).astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def groupings(blocks: tuple[str, ...]) -> dict[str, list[list[str]]]:
    """Returns layerwise, full, and two in between."""
    pairs = [list(blocks[i : i + 2]) for i in range(0, len(blocks), 2)]
    ends = [[blocks[0]], list(blocks[1:-1]), [blocks[-1]]]
    return {
        "layerwise": [[b] for b in blocks],
        "pairs": pairs,
        "embedding|rest|head": ends,
        "full": [list(blocks)],
    }


def exact_decrease(
    halves: list[GaussNewton], gradient: Tensor, groups: list[list[str]], damping: float
) -> tuple[float, int]:
    """Returns the mean of (g.d)^2 / (2 d.(G_held + mu)d) over both ways, and the products spent (of any width)."""
    found, products = [], 0
    for built, held in (halves, halves[::-1]):
        d = torch.zeros_like(gradient)
        for group in groups:
            solution = conjugate_gradient(
                built.damped(damping), -gradient[None], tolerance=3e-3, iterations=500, blocks=group
            )
            assert solution.converged, f"damping {damping}, {group}: {solution.outcome}"
            d, products = d + solution.x[0], products + solution.iterations
        curvature = float(d @ held.damped(damping).apply(d[None])[0])
        found.append(float(gradient @ d) ** 2 / (2 * curvature))
    return float(np.mean(found)), products


def sketches_of(kernels: LayerKernels) -> Sketches:
    return Sketches(
        blocks=kernels.blocks,
        kernel=kernels.kernel.numpy(),
        alignment=kernels.alignment["gradient"].numpy(),
        norm2=kernels.norm2["gradient"].numpy(),
        sequence=kernels.sequence.numpy(),
        round=kernels.round.numpy(),
        tokens=kernels.tokens.numpy(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--dampings", type=float, nargs="+", default=[1.0, 0.3, 0.03])
    parser.add_argument("--sequences", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    start = time.perf_counter()
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    model = Decoder(SIZES["nano"], generator=generator)
    tokens = Corpus.open("stdlib", context=CONTEXT).train
    objective, partition = Objective(model), Partition.of(model, "layer")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(WARM_UP):
        loss = objective.loss(draw(tokens, 16, rng))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    x, y = draw(tokens, options.sequences, rng)
    loss, gradient = objective.gradient((x, y), partition)
    halves = [GaussNewton(objective, (x[h::2], y[h::2]), partition) for h in (0, 1)]
    spaces = {
        rounds: sketches_of(
            layer_kernels(
                objective, (x, y), partition, rounds=rounds, generator=generator, along={"gradient": gradient}
            )
        )
        for rounds in options.rounds
    }
    named = groupings(partition.blocks)
    fits = {(d, r): CrossFit(space, d) for d in options.dampings for r, space in spaces.items()}
    plain = {
        (d, r): CrossFit(space, d, corrected=False) for d in options.dampings for r, space in spaces.items()
    }
    exact = {
        (d, name): exact_decrease(halves, gradient, groups, d)
        for d in options.dampings
        for name, groups in named.items()
    }
    print(
        f"nano decoder, p = {partition.size:,}, {WARM_UP} AdamW steps, loss {float(loss):.3f}; {options.sequences} "
        f"sequences of {CONTEXT} tokens. Columns for each number of sketches: ratio, the same with z = mu, freedom, resolved"
    )
    for baseline in ("full", "layerwise"):
        print(
            f"\ndecrease over {baseline}'s\n{'damping':>8} {'grouping':<20} {'exact':>7} {'products':>8}",
            end="",
        )
        print("".join(f" | {f'{rounds * options.sequences} sketches':<41}" for rounds in spaces))
        for damping in options.dampings:
            for name, groups in named.items():
                if name == baseline:
                    continue
                decrease, products = exact[damping, name]
                print(
                    f"{damping:>8g} {name:<20} {decrease / exact[damping, baseline][0]:>7.3f} {products:>8}",
                    end="",
                )
                for rounds in spaces:
                    fit = fits[damping, rounds]
                    found = relative_decrease(fit, groups, baseline)
                    uncorrected = float(relative_decrease(plain[damping, rounds], groups, baseline).value)
                    freedom = min(
                        fit.freedom(group) for group in (*fit.groups(groups), *fit.groups(baseline))
                    )
                    said = "yes" if found.resolved else str(found.reason).split()[0]
                    value = f"{float(found.value):.3f} ± {float(found.stderr):.3f}"
                    print(f" | {value} {uncorrected:>7.3f} {freedom:>6.2f}   {said:<8}", end="    ")
                print(flush=True)
    print(f"{time.perf_counter() - start:.0f} s, one thread")


if __name__ == "__main__":
    main()
