"""What the instruments cost: rows of each probe, in gradients and seconds, and their estimates beside other packages'.

    python tests/benchmarks/instruments.py [--rounds 7] [--threads 1] [--parts ab] [--presets light,standard]
        [--trained 100] [--quick]

(a) one row of each probe and preset, declared (by operation count) and measured, in gradients of its own batch.
(b) traces, norms and spectral densities of G and H from as many products on both sides, in one interleaved run:
curvlinops' GGN (its estimators, its Lanczos, which does not reorthogonalise) and the Hessian by double backward as
PyHessian takes it (one graph of the gradient, a backward pass through it for each vector). At initialisation, on random
tokens; then traces and the gap again after --trained steps of AdamW on the standard library's source, where instruments
are for: how much of H is G decides what tr H takes.
The default decoder (0.23 M parameters, 64-token sequences). --quick checks that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from curvlinops import GGNLinearOperator, hutchinson_squared_fro, hutchinson_trace
from curvlinops.papyan2020traces.spectrum import fast_lanczos
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hessprobe as hp
from hessprobe.curvature.residual import Residual
from hessprobe.estimation.sampling import Estimate, rademacher
from hessprobe.estimation.shared_probes import shared_probes
from hessprobe.instruments.snapshot import Snapshot
from hessprobe.kernels.verification import verified_plan
from hessprobe.measuring.row_recorder import build_probes
from hessprobe.models.transformer import SIZES, Decoder, DecoderConfig
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.recipe import Recipe
from hessprobe.text.corpus import Corpus
from hessprobe.validation.stages.costs import FlatLogits

TINY = DecoderConfig(layers=1, width=16, feedforward=32, heads=2, vocabulary=32, context=8)
PRESETS = ("light", "standard", "deep")
KEEP = 2**30


class Problem:
    """A decoder, a batch, and its training gradient as the unit of cost."""

    def __init__(self, sequences: int, quick: bool, trained: int = 0) -> None:
        config, generator = TINY if quick else SIZES["nano"], torch.Generator().manual_seed(0)
        self.model = Decoder(config, generator=generator)
        shape = (sequences, config.context + 1)
        tokens = torch.randint(0, config.vocabulary, shape, generator=generator)
        self.batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        self.objective, self.partition = Objective(self.model), Partition.of(self.model)
        self.line = f"{self.partition.size:,} parameters, {sequences} x {config.context} tokens, "
        self.line += f"after {trained} steps" if trained else "at initialisation"
        if trained:
            self.train(trained, sequences, config)

    def train(self, steps: int, sequences: int, config: DecoderConfig) -> None:
        """Trains on the default corpus; the batch is then one of its held-out part."""
        corpus = Corpus.open("stdlib", context=config.context)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        for step in range(steps + 1):
            stream = "train" if step < steps else "held_out"
            tokens = corpus.batch(seed=0, step=step, sequences=sequences, stream=stream)
            self.batch = tuple(x % config.vocabulary for x in tokens)
            if step < steps:
                optimizer.zero_grad()
                self.loss().backward()
                optimizer.step()
        optimizer.zero_grad()

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.batch[0]).flatten(0, 1), self.batch[1].flatten())

    def gradient(self) -> object:
        return torch.autograd.grad(self.loss(), list(self.model.parameters()))

    def snapshot(self) -> Snapshot:
        parameters = self.partition.vector(self.model)
        _, gradient = self.objective.gradient(self.batch, self.partition)
        return Snapshot(
            step=0, objective=self.objective, partition=self.partition, parameters=parameters,
            batches=[self.batch], update=-1e-3 * gradient, seed=0,
        )  # fmt: skip


@dataclass
class Timed:
    """A call's seconds over rounds, and what it returned in each."""

    call: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    results: list[object] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timed]:
    """Runs all calls in turn, `rounds` times after a round that warms up."""
    timed = {name: Timed(call) for name, call in calls.items()}
    for attempt in range(rounds + 1):
        for one in timed.values():
            start = time.perf_counter()
            result = one.call()
            if attempt:
                one.seconds.append(time.perf_counter() - start)
                one.results.append(result)
    return timed


# -- (a) rows of the probes --------------------------------------------------------------------------------


def rows(presets: list[str], rounds: int, quick: bool) -> None:
    """(a): what one row of each probe and preset takes."""
    small = {
        "cross_layer": {"sequences": 3},
        "gn_hessian": {"sequences": 2, "lanczos_steps": 2, "samples": 2},
        "preconditioner": {"curvature_sequences": (2, 4), "held_out_sequences": 4, "folds": 2},
    }
    instruments = [("cross_layer", "")] + [(n, p) for n in ("gn_hessian", "preconditioner") for p in presets]
    print(
        f"\n(a) one row; medians of {rounds} rounds, each with a gradient of the row's own unit batch beside it"
    )
    print(f"  {'probe':<26}{'sequences':>10}{'declared':>10}{'measured':>10}{'seconds':>9}{'vectors':>9}")
    for name, preset in instruments:
        section = (small[name] if quick else {}) | ({"preset": preset} if preset else {})
        (probe,) = build_probes(Recipe.model_validate({"probes": (name,), name: section}))
        problem, unit = Problem(probe.sequences, quick), Problem(probe.unit_sequences, quick)
        snapshot = problem.snapshot()
        found = interleaved(
            {"gradient": unit.gradient, "row": lambda p=probe, s=snapshot: p.measure(s)}, rounds
        )
        row = found["row"].results[-1]
        assert isinstance(row, dict)
        print(
            f"  {f'{name} {preset}':<26}{probe.sequences:>10}{float(row['gradient_equivalents']):>10.1f}"
            f"{found['row'].median / found['gradient'].median:>10.1f}{found['row'].median:>9.2f}"
            f"{probe.vectors(problem.partition):>9.1f}"
        )
    print("  declared, measured: in gradients of the unit batch; vectors: as long as theta, held at once")


# -- (b) the same estimates elsewhere ----------------------------------------------------------------------


class DoubleBackward:
    """Hessian products as PyHessian takes them: the gradient's graph once, a backward pass for each vector."""

    def __init__(self, problem: Problem) -> None:
        named = dict(problem.model.named_parameters())
        self.partition, self.own = problem.partition, [named[name] for name in problem.partition.names]
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
            self.firsts = torch.autograd.grad(problem.loss(), self.own, create_graph=True)

    def __matmul__(self, v: Tensor) -> Tensor:
        tangents = list(self.partition.unflatten(v).values())
        found = torch.autograd.grad(self.firsts, self.own, tangents, retain_graph=True)
        return torch.cat([x.reshape(-1) for x in found])


def lanczos_by(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """Returns Ritz values as PyHessian finds them: one vector at a time, each orthogonalised against all before."""
    basis, alphas, betas = [start / start.norm()], [], []
    for _ in range(steps):
        w = product(basis[-1])
        alphas.append(float(w @ basis[-1]))
        for q in basis:
            w = w - (w @ q) * q
        betas.append(float(w.norm()))
        basis.append(w / w.norm())
    off = torch.tensor(betas[:-1])
    return torch.linalg.eigvalsh(torch.diag(torch.tensor(alphas)) + torch.diag(off, 1) + torch.diag(off, -1))


def estimates(problem: Problem, samples: int, steps: int, starts: int) -> dict[str, Callable[[], object]]:
    """Returns every contender: estimates from `samples` probes, densities from `starts` x `steps` products."""
    objective, partition, batch = problem.objective, problem.partition, problem.batch
    at = objective, batch, partition

    # Made anew in every call, graphs included: as a probe does in every row, theta having moved.
    def g() -> hp.GaussNewton:
        return hp.GaussNewton(*at).linearised(KEEP)

    def h(kind: type[hp.Hessian] = hp.Hessian) -> hp.Hessian:
        return kind(*at).linearised(KEEP, compare=False)  # what a probe compares once a run

    parameters = dict(problem.model.named_parameters())
    own = [parameters[name] for name in partition.names]
    data = [(batch[0], batch[1].flatten())]
    peer = GGNLinearOperator(
        FlatLogits(problem.model), nn.CrossEntropyLoss(), own, data,
        check_deterministic=False, num_data=len(batch[0]),
    )  # fmt: skip
    generator, plan = torch.Generator().manual_seed(1), verified_plan(objective, batch, partition)

    def signs(k: int) -> Tensor:
        return rademacher(k, partition.size, generator=generator, dtype=own[0].dtype)

    def under(call: Callable[[], object]) -> Callable[[], object]:
        def under_math() -> object:
            with sdpa_kernel(SDPBackend.MATH):
                return call()

        return under_math

    def double_backward_trace() -> Tensor:
        doubled = DoubleBackward(problem)
        return torch.stack([v @ (doubled @ v) for v in signs(samples)]).mean()

    def hessian_density() -> Tensor:
        doubled = DoubleBackward(problem)
        return torch.stack([lanczos_by(doubled.__matmul__, v, steps) for v in signs(starts)])[:, -1].max()

    def both() -> Tensor:
        doubled, gap = DoubleBackward(problem), []
        for v in signs(samples):
            gv = peer @ v
            assert isinstance(gv, Tensor)
            gap.append(torch.stack([(doubled @ v - gv).square().sum(), gv.square().sum()]))
        rr, gg = torch.stack(gap).mean(0)
        return (rr / gg).sqrt()

    def kernels(rounds: int) -> hp.LayerKernels:
        return hp.layer_kernels(objective, batch, partition, rounds=rounds, generator=generator, plan=plan)

    def kernel_trace(rounds: int = 2) -> Estimate:
        found = hp.layer_kernels(
            objective, batch, partition, rounds=rounds, generator=generator, plan=plan, cotangent="sign"
        )
        return found.trace("batch", whole=True)

    def split_trace() -> Estimate:
        return hp.hessian_trace(
            hp.GaussNewton(*at), h(), h(Residual), samples,
            known=lambda: kernel_trace(max(2, samples // 2)), generator=generator,
        )  # fmt: skip

    def norm() -> Estimate:
        return Estimate.of(hp.GaussNewton(*at).apply(signs(samples)).square().sum(1))

    def top_of(operator: hp.GaussNewton | hp.Hessian) -> float:
        return hp.spectral_density(operator, steps, starts, generator=generator).extreme()[0]

    return {
        "gradient": problem.gradient,
        "tr G": lambda: hp.hutchinson_trace(hp.GaussNewton(*at), samples, generator=generator),
        "tr G, our layer kernels": kernel_trace,
        "tr G, curvlinops": under(lambda: hutchinson_trace(peer, samples)),
        "|G|_F^2": norm,
        "|G|_F^2, our layer kernels": lambda: kernels(2).block_norms("batch").mean.sum(),
        "|G|_F^2, curvlinops": under(lambda: hutchinson_squared_fro(peer, samples)),
        "density of G": lambda: top_of(g()),
        "density of G, curvlinops": under(
            lambda: max(fast_lanczos(peer, steps)[0].max() for _ in range(starts))
        ),
        "tr H": lambda: hp.hutchinson_trace(h(), samples, generator=generator),
        "tr H, our kernels and residual": split_trace,
        "tr H, PyHessian style": double_backward_trace,
        "density of H": lambda: top_of(h()),
        "density of H, PyHessian style": hessian_density,
        "gap of G and H": lambda: shared_probes(g(), h(Residual), samples, generator=generator).gap,
        "gap of G and H, both of them": under(both),
    }


def beside_others(rounds: int, quick: bool, trained: int) -> None:
    """(b): cost and error of the same estimates, ours and theirs."""
    samples, steps, starts = (2, 2, 1) if quick else (8, 10, 2)
    problem = Problem(2 if quick else 32, quick, trained)
    calls = estimates(problem, samples, steps, starts)
    if trained:
        calls = {name: call for name, call in calls.items() if name.startswith(("gradient", "tr ", "gap "))}
    found = interleaved(calls, rounds)
    unit = found["gradient"].median
    print(
        f"\n(b) {problem.line}; {samples} probes; densities of {starts} x {steps} Lanczos steps; {rounds} rounds"
    )
    print(
        f"  {'':<32}{'gradients':>10}{'fastest':>9}{'times ours':>11}{'value':>11}{'error':>8}{'to 1 %':>9}"
    )
    ours, law = 0.0, math.nan
    for name, timed in found.items():
        if name == "gradient":
            continue
        cost, best = timed.median / unit, min(timed.seconds) / min(found["gradient"].seconds)
        values = torch.tensor([float(x.mean if isinstance(x, Estimate) else x) for x in timed.results])  # type: ignore[arg-type]
        squares = [float(x.stderr) ** 2 for x in timed.results if isinstance(x, Estimate)]
        if "," not in name:
            ours, law = cost, math.nan
        if squares:
            relative = statistics.mean(squares) ** 0.5 / abs(float(values.mean()))
            law = relative if "kernels" not in name else law
        elif "kernels" in name:
            relative = float(values.std() / values.mean()) if rounds > 1 else math.nan
        else:  # the same number of the same signs as ours: one law, and ours are known from all rounds
            relative = law
        shown = (
            ("", "") if math.isnan(relative) else (f"{relative:.1%}", f"{cost * (relative / 0.01) ** 2:.0f}")
        )
        print(
            f"  {name:<32}{cost:>10.1f}{best:>9.1f}{cost / ours:>11.2f}{float(values.mean()):>11.4g}"
            f"{shown[0]:>8}{shown[1]:>9}"
        )
    print("  error: relative, of one call; to 1 %: gradients until it is 1 % (it falls as probes^-1/2).")
    print(
        "  Densities: the largest node of all starts. curvlinops' starts are Gaussian, and not reorthogonalised."
    )
    print(f"  one gradient: {unit * 1e3:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", default="ab")
    parser.add_argument("--presets", default="light", help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--trained", type=int, default=100, help="steps before (b) is done again; 0: not")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    presets = options.presets.split(",")
    if not set(presets) <= set(PRESETS):
        parser.error(f"--presets {options.presets}: wanted some of {', '.join(PRESETS)}, separated by commas")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    rounds = 1 if options.quick else options.rounds
    print(f"CPU, {options.threads} thread(s), float32, torch {torch.__version__}")
    if "a" in options.parts:
        rows(presets, rounds, options.quick)
    if "b" in options.parts:
        for trained in dict.fromkeys((0, min(options.trained, 3) if options.quick else options.trained)):
            beside_others(rounds, options.quick, trained)


if __name__ == "__main__":
    main()
