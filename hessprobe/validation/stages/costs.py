"""Products, kernels and attention in gradients of time and memory, beside curvlinops and double backward, interleaved."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from curvlinops import GGNLinearOperator
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.kernels.layer_kernels import layer_kernels
from hessprobe.kernels.verification import verified_plan
from hessprobe.machine.devices import free_memory
from hessprobe.machine.memory import is_out_of_memory
from hessprobe.problem.measuring import measuring
from hessprobe.validation.figures import Figure, failure, measured, skipped
from hessprobe.validation.modes import BFLOAT16, matmuls, precisions
from hessprobe.validation.problems import LENGTHS, POSITIONS, SIZES, Problem, named, study_config
from hessprobe.validation.runner import Bench
from hessprobe.validation.timing import Call, forget, peak_growth, seconds_of

ROUNDS, MANY = {False: 5, True: 2}, 4  # fewer where sizes are shrunken
# A call takes at most so many gradients, so a setting's rounds can be told to fit before they are begun.
GRADIENTS = 40
# Of double backward and curvlinops, whose attention keeps the (b, h, t, t) weights of every layer several times.
COPIES_OF_WEIGHTS = 8


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One call that is timed; `products` in it, and whether it is hessprobe's own."""

    call: Call
    products: int = 1
    ours: bool = True


def costs(bench: Bench) -> Iterator[Figure]:
    """Yields the settings in order of worth: the smaller model first, the usual length before the long one."""
    yield from _attention(bench)
    for size in SIZES:
        for length in LENGTHS[bench.small]:
            for precision in precisions(bench.device):
                words = f"{named(size, bench.small)}, T = {length:,}, {precision}"
                try:
                    yield from _setting(bench, size, length, precision, words)
                except Exception as error:  # another setting may still fit
                    yield (
                        skipped(words, "out of memory") if is_out_of_memory(error) else failure(words, error)
                    )
                forget(bench.device)


def _setting(bench: Bench, size: str, length: int, precision: str, words: str) -> Iterator[Figure]:
    config = study_config(size, bench.small, length)
    sequences = max(1, POSITIONS[bench.small] // length)
    problem = Problem.of(config, sequences, bench.device)
    with matmuls(precision):
        problem.gradient(precision)
        unit = min(seconds_of(lambda: problem.gradient(precision), bench.device) for _ in range(2))
        expected = GRADIENTS * unit * 3
        if not bench.budget.fits(expected):
            left = bench.budget.stage_left
            reason = f"a gradient takes {unit:.3g} s, so this about {expected:.0f} s, and {left:.0f} are left"
            yield skipped(words, reason)
            return
        yield measured(f"{words}: one gradient, {sequences} sequences", 1e3 * unit, "ms")
        weights = 4 * sequences * config.heads * length**2 * config.layers * COPIES_OF_WEIGHTS
        found = contenders(problem, precision, peers=weights < free_memory(bench.device))
        yield from _compared(bench, found, words, unit)


def contenders(problem: Problem, precision: str, *, peers: bool = True) -> dict[str, Contender]:
    """Returns what is compared by name, the gradient first."""
    # Products differentiate the model as it is, so in bfloat16 its parameters are; kernels run under autocast.
    own = copy.deepcopy(problem.model).bfloat16() if precision == BFLOAT16 else problem.model
    product = Problem(config=problem.config, model=own, batch=problem.batch)
    partition, objective = product.partition, product.objective
    theta = partition.vector(own)
    generator = torch.Generator(theta.device).manual_seed(4)
    rows = torch.randn(MANY, partition.size, generator=generator, device=theta.device).to(theta)
    gauss_newton = GaussNewton(objective, product.batch, partition)
    hessian = Hessian(objective, product.batch, partition)
    plan = verified_plan(problem.objective, [problem.batch], problem.partition)

    def kernels(rounds: int) -> Call:
        return lambda: layer_kernels(
            problem.objective,
            problem.batch,
            problem.partition,
            rounds=rounds,
            plan=plan,
            generator=torch.Generator().manual_seed(0),
            autocast=torch.bfloat16 if precision == BFLOAT16 else None,
        )

    found = {
        "gradient": Contender(call=lambda: problem.gradient(precision)),
        "G v": Contender(call=lambda: gauss_newton.apply(rows[:1])),
        f"G v, {MANY} rows": Contender(call=lambda: gauss_newton.apply(rows), products=MANY),
        "H v": Contender(call=lambda: hessian.apply(rows[:1])),
        f"H v, {MANY} rows": Contender(call=lambda: hessian.apply(rows), products=MANY),
        "layer kernels, 1 round": Contender(call=kernels(1)),
        "layer kernels, 2 rounds": Contender(call=kernels(2)),
    }
    if peers:
        found |= _peers(product, rows[0])
    return found


class FlatLogits(nn.Module):
    """A decoder with tokens flattened, as curvlinops and CrossEntropyLoss take them together."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits (b t, v)."""
        return self.model(tokens).flatten(0, 1)


def _peers(problem: Problem, v: Tensor) -> dict[str, Contender]:
    inputs, targets = problem.batch
    named_parameters = dict(problem.model.named_parameters())
    own = [named_parameters[name] for name in problem.partition.names]
    tangents = list(problem.partition.unflatten(v).values())
    peer = GGNLinearOperator(
        FlatLogits(problem.model),
        nn.CrossEntropyLoss(),
        own,
        [(inputs, targets.flatten())],
        check_deterministic=False,
        num_data=inputs.shape[0],
    )

    def their_product() -> object:
        with sdpa_kernel(SDPBackend.MATH):
            return peer @ v

    def double_backward() -> object:
        with sdpa_kernel(SDPBackend.MATH):
            loss = F.cross_entropy(problem.model(inputs).flatten(0, 1), targets.flatten())
            firsts = torch.autograd.grad(loss, own, create_graph=True)
            return torch.autograd.grad(firsts, own, tangents)

    return {
        "G v, curvlinops": Contender(call=their_product, ours=False),
        "H v, double backward": Contender(call=double_backward, ours=False),
    }


def _compared(bench: Bench, calls: dict[str, Contender], words: str, unit: float) -> Iterator[Figure]:
    """Yields time and memory in the first one's, of calls that work; medians of interleaved rounds."""
    working, memory = {}, {}
    for name, contender in calls.items():  # this warms up, too
        try:
            memory[name] = peak_growth(contender.call, bench.device, collect=False)
            working[name] = contender
        except Exception as error:
            lost = f"{words}: {name}"
            if is_out_of_memory(error):
                yield skipped(lost, "out of memory")
            elif contender.ours:
                yield failure(lost, error)
            else:
                yield skipped(lost, f"it raises: {str(error)[:200]}")
            forget(bench.device)
    times: dict[str, list[float]] = {name: [] for name in working}
    for attempt in range(ROUNDS[bench.small]):
        # All of a round or none: ratios are of what ran beside each other.
        if attempt and not bench.budget.fits(sum(seconds[-1] for seconds in times.values())):
            break
        for name, contender in working.items():
            times[name].append(seconds_of(contender.call, bench.device) / contender.products)
    gradient = statistics.median(times["gradient"]) if "gradient" in times else unit
    base = memory.get("gradient", float("nan"))
    note = f"median of {len(times['gradient'])} rounds" if "gradient" in times else ""
    for name in working:
        if name == "gradient":
            continue
        yield measured(f"{words}: {name}", statistics.median(times[name]) / gradient, "gradients", note)
        if base > 0 and memory[name] == memory[name]:
            yield measured(f"{words}: {name}, memory", memory[name] / base, "gradients' memory")


def _attention(bench: Bench) -> Iterator[Figure]:
    """Yields the attention of one layer by itself: its math path, and the dual pass of a product, in the fused one's."""
    for length in LENGTHS[bench.small]:
        config = study_config("150M", bench.small, length)
        words = f"attention of one layer, {config.heads} heads, T = {length:,}"
        try:
            calls = _attention_calls(bench, length, config.heads, config.width // config.heads)
            yield from _compared(bench, calls, words, 1.0)
        except Exception as error:
            yield failure(words, error)
        forget(bench.device)


def _attention_calls(bench: Bench, length: int, heads: int, size: int) -> dict[str, Contender]:
    generator = torch.Generator().manual_seed(0)
    shape = (max(1, POSITIONS[bench.small] // length), heads, length, size)
    q, k, v, *tangents = torch.randn(6, *shape, generator=generator).to(bench.device)
    leaves = [x.requires_grad_() for x in (q.clone(), k.clone(), v.clone())]
    cotangent = torch.ones_like(q)
    holder = nn.Linear(1, 1, device=bench.device)  # `measuring` asks a model for its device

    def gradient(backends: list[SDPBackend] | None) -> Callable[[], object]:
        def call() -> object:
            if backends is None:
                mixed = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], is_causal=True)
            else:
                with sdpa_kernel(backends):
                    mixed = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], is_causal=True)
            return torch.autograd.grad(mixed, leaves, cotangent)

        return call

    def dual() -> object:
        with measuring(holder), forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(leaves, tangents, strict=True)]
            mixed = F.scaled_dot_product_attention(duals[0], duals[1], duals[2], is_causal=True)
            primal, tangent = forward_ad.unpack_dual(mixed)
            assert tangent is not None
            return torch.autograd.grad(primal, leaves, tangent.detach())

    return {
        "gradient": Contender(call=gradient(None)),
        "gradient on the math path": Contender(call=gradient([SDPBackend.MATH])),
        "dual pass and pull-back of a product": Contender(call=dual),
    }
