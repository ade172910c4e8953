"""Curvature products in gradients: ours beside curvlinops and double backward, one interleaved run.

    python tests/benchmarks/products.py [--rounds 7] [--threads 1] [--width 512] [--layers 2]

The unit is a training gradient of the same batch: the model's own attention, torch's cross-entropy, one backward
pass. Peak memory is the growth of a process's resident set during one call (Linux), in the gradient's: a process of
its own for each, at its third call, since what earlier calls leave in the heap would hide what a later one needs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from curvlinops import GGNLinearOperator, HessianLinearOperator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.validation.stages.costs import FlatLogits
from hessprobe.validation.timing import peak_growth

ROWS = 16


def cases(width: int, layers: int, sequences: int) -> tuple[dict[str, tuple[Callable[[], object], int]], str]:
    """Returns every contender as (call, products per call), and a line that says on what."""
    config = DecoderConfig(
        layers=layers, width=width, feedforward=4 * width, heads=8, vocabulary=512, context=128
    )
    generator = torch.Generator().manual_seed(0)
    model = Decoder(config, generator=generator)
    tokens = torch.randint(0, 512, (sequences, 129), generator=generator)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    objective, partition = Objective(model), Partition.of(model)
    one = torch.randn(1, partition.size, generator=generator)
    many = torch.randn(ROWS, partition.size, generator=generator)
    gauss_newton = GaussNewton(objective, (inputs, targets), partition)
    hessian = Hessian(objective, (inputs, targets), partition)
    differences = {
        letter: kind(objective, (inputs, targets), partition, engine="first-order")
        for letter, kind in (("G", GaussNewton), ("H", Hessian))
    }
    doubled = GaussNewton(objective, (inputs, targets), partition, engine="double-backward")

    parameters = dict(model.named_parameters())
    flat, data = FlatLogits(model), [(inputs, targets.flatten())]
    own = [parameters[name] for name in partition.names]
    shared = {"check_deterministic": False, "num_data": inputs.shape[0]}
    peer_g = GGNLinearOperator(flat, nn.CrossEntropyLoss(), own, data, **shared)
    peer_h = HessianLinearOperator(flat, nn.CrossEntropyLoss(), own, data, **shared)

    def gradient() -> object:
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        return torch.autograd.grad(loss, own)

    def pyhessian() -> object:
        with sdpa_kernel(SDPBackend.MATH):
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            firsts = torch.autograd.grad(loss, own, create_graph=True)
            tangents = list(partition.unflatten(one[0]).values())
            return torch.autograd.grad(firsts, own, tangents)

    def math(call: Callable[[], object]) -> Callable[[], object]:
        def under_math() -> object:
            with sdpa_kernel(SDPBackend.MATH):
                return call()

        return under_math

    contenders: dict[str, tuple[Callable[[], object], int]] = {
        "gradient": (gradient, 1),
        "G hessprobe": (lambda: gauss_newton.apply(one), 1),
        f"G hessprobe, {ROWS} rows": (lambda: gauss_newton.apply(many), ROWS),
        "G hessprobe, double backward": (lambda: doubled.apply(one), 1),
        "G hessprobe, first-order": (lambda: differences["G"].apply(one), 1),
        "G curvlinops": (math(lambda: peer_g @ one[0]), 1),
        "H hessprobe": (lambda: hessian.apply(one), 1),
        f"H hessprobe, {ROWS} rows": (lambda: hessian.apply(many), ROWS),
        "H hessprobe, first-order": (lambda: differences["H"].apply(one), 1),
        "H PyHessian style (double backward)": (pyhessian, 1),
        "H curvlinops": (math(lambda: peer_h @ one[0]), 1),
    }
    theirs, ours = math(lambda: peer_g @ one[0])(), gauss_newton.apply(one)[0]
    assert isinstance(theirs, Tensor)
    agree = (theirs - ours).norm() / ours.norm()
    line = (
        f"decoder of {partition.size:,} parameters ({layers} layers, width {width}), {sequences} x 128 tokens, "
        f"float32; our G against curvlinops': {float(agree):.1e} relative"
    )
    for letter, exact in (("G", gauss_newton), ("H", hessian)):
        found, wanted = differences[letter].apply(one), exact.apply(one)
        stated = differences[letter].step_errors
        assert stated is not None
        tried = ", ".join(f"{e:.0e} at {d:.2g}" for d, e in zip(stated.distances, stated.errors, strict=True))
        line += (
            f"\n{letter} first-order: {float((found - wanted).norm() / wanted.norm()):.1e} from the exact one, stated "
            f"{stated.error:.1e} at e|v| = {stated.distance:.2g} ({tried})"
        )
    return contenders, line


def memory_of(name: str, options: argparse.Namespace) -> float:
    """Returns peak_growth of one contender's third call in a process of its own."""
    given = {k: v for k, v in vars(options).items() if k != "memory_of"}
    command = [sys.executable, __file__, "--memory-of", name, *(f"--{k}={v}" for k, v in given.items())]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(options.threads)
    contenders, line = cases(options.width, options.layers, options.sequences)
    if options.memory_of:
        call = contenders[options.memory_of][0]
        call()
        call()
        print(peak_growth(call))
        return
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for attempt in range(options.rounds + 1):  # the first round warms up
        for name, (call, products) in contenders.items():
            start = time.perf_counter()
            call()
            if attempt:
                times[name].append((time.perf_counter() - start) / products)
    unit = statistics.median(times["gradient"])
    linux = sys.platform == "linux"
    memory = {name: memory_of(name, options) for name in contenders} if linux else {}
    print(f"{line}, {options.threads} thread(s), median of {options.rounds} rounds")
    print(f"{'':<38}{'gradients a product':>20}{'fastest':>10}{'peak memory':>14}")
    for name, seconds in times.items():
        ratio, best = statistics.median(seconds) / unit, min(seconds) / min(times["gradient"])
        peak = f"{memory[name] / memory['gradient']:.2f}" if memory else "not measured"
        print(f"{name:<38}{ratio:>20.2f}{best:>10.2f}{peak:>14}")
    print(f"one gradient: {unit * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
