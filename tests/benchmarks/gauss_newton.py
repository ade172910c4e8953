"""Gauss-Newton training in gradients: a full and a layerwise inner step, and what the loop around them adds.

    python tests/benchmarks/gauss_newton.py [--rounds 7] [--threads 1] [--width 512] [--sequences 4] [--minibatches 4]

The unit is a training gradient of the same minibatch: the model's own attention, torch's cross-entropy, one backward
pass. An inner step is the model's value and gradient at a displacement; "counted" is by operations of matrix products.
The overhead is what is left of an outer step without its inner steps, the optimizer's arithmetic on the parameters, the
forward passes of its line search and the predicted decrease that it records.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.optimization import gauss_newton
from hessprobe.optimization.gauss_newton import GaussNewton
from hessprobe.problem.objective import Objective
from hessprobe.validation.timing import peak_growth

LAYERS = (4, 12)  # K = 6 and 14 blocks, as the study's 45M and 150M
STRUCTURES = ("full", "layerwise")
PARTS = ("inner steps", "arithmetic", "line search", "prediction")


class Problem:
    """A decoder, minibatches, and a Gauss-Newton optimizer of either structure."""

    def __init__(self, options: argparse.Namespace, layers: int) -> None:
        width, context = options.width, options.context
        config = DecoderConfig(
            layers=layers, width=width, feedforward=4 * width, heads=8, vocabulary=512, context=context
        )
        generator = torch.Generator().manual_seed(0)
        self.model = Decoder(config, generator=generator)
        tokens = torch.randint(
            0, 512, (options.minibatches, options.sequences, context + 1), generator=generator
        )
        self.batches = [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]
        self.objective = Objective(self.model)
        self.optimizers = {
            structure: GaussNewton(
                self.model, self.objective, structure=structure, solver="adamw", learning_rate=1e-4
            )
            for structure in STRUCTURES
        }
        partition = self.optimizers["full"].partition
        self.size, self.blocks = partition.size, len(partition)
        self.theta = partition.unflatten(partition.vector(self.model))
        self.delta = partition.unflatten(1e-3 * torch.randn(self.size, generator=generator))

    def gradient(self) -> object:
        inputs, targets = self.batches[0]
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        return torch.autograd.grad(loss, list(self.model.parameters()))

    def inner(self, structure: str) -> object:
        return self.optimizers[structure].local.gradients(self.batches[0], self.theta, self.delta)

    def calls(self) -> dict[str, Callable[[], object]]:
        """Returns every contender of this model by name."""
        return {"gradient": self.gradient} | {s: lambda s=s: self.inner(s) for s in STRUCTURES}

    def outer(self, structure: str) -> dict[str, float]:
        """Takes an outer step; returns the seconds of its parts and of the whole."""
        optimizer = self.optimizers[structure]
        spent = dict.fromkeys(PARTS, 0.0)

        def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*given: Any, **named: Any) -> Any:
                began = time.perf_counter()
                found = call(*given, **named)
                spent[part] += time.perf_counter() - began
                return found

            return run

        with _replaced(
            (optimizer.local, "gradients", timed("inner steps", optimizer.local.gradients)),
            *((s, "step", timed("arithmetic", s.step)) for s in optimizer.solvers),
            (self.objective, "loss", timed("line search", self.objective.loss)),
            (gauss_newton, "predicted_decrease", timed("prediction", gauss_newton.predicted_decrease)),
        ):
            began = time.perf_counter()
            optimizer.step(self.batches)
            whole = time.perf_counter() - began
        return {**spent, "overhead": whole - sum(spent.values()), "whole": whole}


class _replaced:
    """Puts other functions in the places of (owner, name) for a while."""

    def __init__(self, *changes: tuple[Any, str, Any]) -> None:
        self.changes = changes

    def __enter__(self) -> None:
        self.kept = [(owner, name, getattr(owner, name)) for owner, name, _ in self.changes]
        for owner, name, new in self.changes:
            setattr(owner, name, new)

    def __exit__(self, *error: object) -> None:
        for owner, name, old in self.kept:
            setattr(owner, name, old)


def operations(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def inner_steps(problem: Problem, rounds: int) -> None:
    """Prints both inner steps in gradients and in each other."""
    calls = problem.calls()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for attempt in range(rounds + 1):  # the first round warms up
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if attempt:
                seconds[name].append(time.perf_counter() - began)
    counts = {name: operations(call) for name, call in calls.items()}
    memory = {name: peak_growth(call) for name, call in calls.items()}
    time_of = {name: statistics.median(found) for name, found in seconds.items()}
    k = problem.blocks
    print(f"K = {k} blocks, {problem.size:,} parameters; one gradient: {time_of['gradient'] * 1e3:.0f} ms")
    print(f"  {'':<28}{'measured':>10}{'counted':>10}{'peak memory':>13}")
    for name in STRUCTURES:
        row = [found[name] / found["gradient"] for found in (time_of, counts, memory)]
        target = " (target 2.0)" if name == "full" else ""
        print(f"  {name + ', in gradients':<28}{row[0]:>10.2f}{row[1]:>10.2f}{row[2]:>13.2f}{target}")
    ratios = [found["layerwise"] / found["full"] for found in (time_of, counts, memory)]
    print(f"  {'layerwise, in full':<28}{ratios[0]:>10.2f}{ratios[1]:>10.2f}{ratios[2]:>13.2f}")
    shares = f"{ratios[0] / k:>10.2f}{ratios[1] / k:>10.2f}"
    print(f"  {'layerwise, in full, over K':<28}{shares}{'':>13} (target 0.6)")


def outer_steps(problem: Problem, rounds: int) -> None:
    """Prints the parts of an outer step."""
    found: dict[str, list[dict[str, float]]] = {structure: [] for structure in STRUCTURES}
    for attempt in range(rounds + 1):
        for structure in STRUCTURES:
            parts = problem.outer(structure)
            if attempt:
                found[structure].append(parts)
    print(
        f"an outer step of {len(problem.batches)} minibatches, K = {problem.blocks}, AdamW inside, in per cent"
    )
    print(f"  {'':<12}" + "".join(f"{part:>13}" for part in (*PARTS, "overhead")) + "   (target: overhead 5)")
    for structure, rows in found.items():
        shares = [
            statistics.median(100 * r[part] / r["whole"] for r in rows) for part in (*PARTS, "overhead")
        ]
        print(f"  {structure:<12}" + "".join(f"{share:>13.1f}" for share in shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=4)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(options.threads)
    print(
        f"decoders of width {options.width}, minibatches of {options.sequences} x {options.context} tokens, float32, "
        f"{options.threads} thread(s), medians of {options.rounds} interleaved rounds"
    )
    for layers in LAYERS:
        problem = Problem(options, layers)
        inner_steps(problem, options.rounds)
        if layers == LAYERS[0]:
            outer_steps(problem, options.rounds)


if __name__ == "__main__":
    main()
