"""What a recipe would do, before anything is read or computed: sizes, tokens, memory and operations.

Shapes are counted on torch's meta device, which holds no numbers; nothing here touches data or a network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from hessprobe.optimization.baselines import BASELINE_REFRESH
from hessprobe.optimization.group_models import LocalModels, product_cost
from hessprobe.optimization.inner_solver import LARGEST, hidden_matrices
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.problem.transformer import Decoder, DecoderConfig
from hessprobe.recipe import OptimizerRecipe, Recipe
from hessprobe.recipe.runs import variant_run, warm_up_run
from hessprobe.training.optimizers import gauss_newton_settings, learning_rate
from hessprobe.training.setup import decoder_config

FLOAT = 4  # bytes; everything is float32
TOKEN = 16  # bytes: as an input and as a target
GIB = 2**30
GPU = 80e9  # bytes, of the accelerator that the advice is about
# Peak of one pass in multiples of (what a forward pass saves for its reverse, one minibatch's logits), fitted to the
# resident memory of a CPU process at 4 sizes of the decoder: within 15 %. Attention is fused in a gradient; a dual
# pass keeps its weights.
ESTIMATE = {"sophia": 1, "kfac": 3}  # gradients that an estimate of curvature costs, a minibatch
GRADIENT, DUAL, SHARED = (1.2, 4.5), (2.7, 11.0), (3.4, 9.0)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """An estimate in bytes: what lies there all the time, and what one minibatch's pass needs on top."""

    weights: float
    state: float
    gradient: float
    data: float
    activations: float
    dual: float

    @property
    def peak(self) -> float:
        """The most at one time: the passes come one after the other."""
        return self.weights + self.state + self.gradient + self.data + max(self.activations, self.dual)


def plan(recipe: Recipe, seeds: int | None = None) -> str:
    """Returns the plan of a recipe as text: blocks, tokens, steps, memory and cost; of a study's runs too.

    Raises:
        UserError: numbers that make no decoder.
    """
    model = Decoder(decoder_config(recipe), generator=None)
    partition = Partition.of(model, recipe.partition)
    read = recipe.data.tokenizer or "read as bytes or tokens"
    lines = [
        f"recipe    {recipe.name}, model {recipe.model.size}, seed {recipe.seed}",
        f"data      {recipe.data.source}, {read}, windows of {model.config.context:,} tokens",
        "",
        partition.summary(),
        "",
    ]
    if recipe.study is None:
        lines += [*_of_run(recipe, model, partition), *_of_memory(recipe.optimizer, model, partition)]
        lines += [f"seeds     {seeds} runs of it"] if seeds else []
        return "\n".join(lines)
    return "\n".join([*lines, *_of_study(recipe, seeds or recipe.study.seeds, model, partition)])


def _of_run(recipe: Recipe, model: Decoder, partition: Partition) -> Iterator[str]:
    optimizer, steps = recipe.optimizer, recipe.training.steps
    window = optimizer.sequences * model.config.context
    tokens, searched = optimizer.minibatches * window, optimizer.searched * window
    warmup = min(optimizer.warmup_steps, steps)
    proper = steps - warmup
    until = (
        "" if recipe.training.stop_at is None else f" at most, until held-out loss {recipe.training.stop_at}"
    )
    how = [f"{optimizer.name} by {optimizer.inner_solver}" if optimizer.is_gauss_newton else optimizer.name]
    if how != [f"{optimizer.name} by cg"]:  # which has no learning rate
        how += [f"learning rate {learning_rate(optimizer):g}", f"schedule {optimizer.schedule}"]
    yield f"optimizer {', '.join(how)}"
    yield (
        f"step      {optimizer.minibatches:,} minibatches of {optimizer.sequences:,} sequences: {tokens:,} tokens"
        + (f", and {searched:,} for the line search" if searched else "")
    )
    yield (
        f"steps     {steps:,}{until}, {warmup:,} of them AdamW's warm-up: {steps * tokens:,} tokens"
        + (f", and {proper * searched:,} for line searches" if searched else "")
    )
    spent = cost(optimizer, model, partition)
    yield f"cost      {spent:,.0f} gradients of a minibatch an outer step; {optimizer.minibatches:,} in the warm-up"
    yield f"memory    about {_bytes(memory(optimizer, model, partition).peak)} at the peak, an estimate"


def _of_memory(optimizer: OptimizerRecipe, model: Decoder, partition: Partition) -> Iterator[str]:
    found = memory(optimizer, model, partition)
    yield "          float32, one minibatch at a time; of the last two the larger counts:"
    for name, size in (
        ("weights", found.weights),
        ("optimizer state", found.state),
        ("gradient", found.gradient),
        ("an outer step's tokens", found.data),
        ("a gradient's activations", found.activations),
        ("a dual pass", found.dual),
    ):
        yield f"          {_bytes(size):>12}  {name}"
    if found.peak > GPU:
        each = max(found.activations, found.dual) / optimizer.sequences
        fitting = int((GPU - found.peak) // each + optimizer.sequences)
        way_out = (
            f"{2 ** int(math.log2(fitting))} sequences a minibatch would (--set optimizer.sequences=)"
            if fitting >= 1
            else "nor does a minibatch of 1 sequence"
        )
        yield f"          that does not fit {GPU / 1e9:.0f} GB; {way_out}"


def _of_study(recipe: Recipe, seeds: int, model: Decoder, partition: Partition) -> Iterator[str]:
    study = recipe.study
    assert study is not None
    total = (seeds if study.warm_up_steps else 0) + sum(
        len(v.learning_rates) + seeds - 1 for v in study.variants
    )
    yield f"study     {total} runs at {seeds} seeds, each until held-out loss {study.target_loss} or its last step"
    warm_up = warm_up_run(recipe, recipe.seed) if study.warm_up_steps else None
    if warm_up:
        yield from _indented("warm-up", _of_run(warm_up, model, partition))
    for variant in study.variants:
        rates = ", ".join(f"{rate:g}" for rate in variant.learning_rates)
        run = variant_run(recipe, variant, variant.learning_rates[0], recipe.seed, None)
        own = Decoder(decoder_config(run), generator=None)
        lines = _of_run(run, own, Partition.of(own, run.partition))
        yield from _indented(f"{variant.name}, learning rates {rates}", lines)


def _indented(title: str, lines: Iterable[str]) -> Iterator[str]:
    yield from ("", title)
    yield from (f"  {line}" for line in lines)


def _bytes(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:,.1f} MiB"


def cost(recipe: OptimizerRecipe, model: Decoder, partition: Partition) -> float:
    """Returns gradient-equivalents of one outer step by operation count, in gradients of a minibatch.

    The most that conjugate gradients and K-FAC may take; the mean over steps where curvature is estimated anew in some.
    """
    if not recipe.is_gauss_newton:
        estimate = ESTIMATE.get(recipe.name, 0) / (recipe.refresh or BASELINE_REFRESH.get(recipe.name, 1))
        return recipe.minibatches * (1 + estimate)
    names = (
        [partition.names] if not recipe.layerwise else [partition.parameters_of(b) for b in partition.blocks]
    )
    local, settings = LocalModels(Objective(model), names), gauss_newton_settings(recipe, 1)
    if recipe.inner_solver == "cg":
        products = len(names) * (
            settings.cg_iterations + 2
        )  # besides the iterations one to start and one to check
        solving = recipe.minibatches * (1 + products * product_cost(len(names)))
    else:
        solving = local.cost * (recipe.inner_steps or recipe.minibatches)
    return solving + ((recipe.step_sizes + 1) / 3 + 1) * recipe.searched


def memory(recipe: OptimizerRecipe, model: Decoder, partition: Partition) -> Memory:
    """Returns an estimate of the memory that training needs, in bytes."""
    size = partition.size * FLOAT
    config, b = model.config, recipe.sequences
    logits = b * config.context * config.vocabulary * FLOAT
    attention = b * config.layers * config.heads * config.context**2 * FLOAT
    saved = b * _saved_bytes(config)
    activations = GRADIENT[0] * (saved - attention) + GRADIENT[1] * logits
    dual = 0.0
    if recipe.is_gauss_newton:
        passes = SHARED if recipe.layerwise else DUAL
        dual = passes[0] * saved + passes[1] * logits
    solver = recipe.inner_solver if recipe.is_gauss_newton else recipe.name
    # Gauss-Newton holds theta, the inner solution and the way there besides its solver's state.
    copies = 4 if recipe.is_gauss_newton else 2
    return Memory(
        weights=size,
        state=copies * size + FLOAT * _solver_floats(solver, model, partition),
        gradient=size,
        data=(recipe.minibatches + recipe.searched) * b * config.context * TOKEN,
        activations=activations,
        dual=dual,
    )


def _saved_bytes(config: DecoderConfig) -> int:
    """Returns what a forward pass over one sequence keeps for its reverse, attention weights included."""
    model, sizes = Decoder(replace(config, attention="math"), generator=None), {}
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = (storage.nbytes(), tensor)  # held, so that no storage takes another's place
        return tensor

    tokens = torch.empty(1, config.context, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        model(tokens)
    return sum(size for key, (size, _) in sizes.items() if key not in own)


def _solver_floats(solver: str, model: Decoder, partition: Partition) -> int:
    """Returns how many numbers a solver keeps: two for every parameter that is AdamW's, and its own for matrices."""
    if solver == "cg":
        return 5 * partition.size
    hidden = set(hidden_matrices(model))
    if solver == "kfac":
        from hessprobe.curvature.kronecker import kronecker_names  # curvlinops: only who asks for it pays

        hidden = set(kronecker_names(model, partition))
    total = 0
    for slot in partition.slots:
        size = slot.shape.numel()
        if slot.name not in hidden or solver in ("adamw", "sophia"):
            total += 2 * size
            continue
        squares = {"muon": 0, "kfac": 1}.get(solver, 2)  # factors and what is made of them, for each side
        total += (1 if solver == "muon" else 2) * size
        total += squares * sum(side**2 for side in slot.shape if side <= LARGEST)
    return total
