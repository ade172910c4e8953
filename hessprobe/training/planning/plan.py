"""What a recipe would do, before anything is read or computed: sizes, tokens, memory, operations, measuring.

Shapes are counted on torch's meta device, which holds no numbers; nothing here touches data or a network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from hessprobe.models.transformer import Decoder
from hessprobe.problem.partition import Partition
from hessprobe.recipe import OptimizerRecipe, Recipe
from hessprobe.recipe.runs import variant_run, warm_up_run
from hessprobe.training.builds import decoder_config
from hessprobe.training.optimizers import learning_rate
from hessprobe.training.planning.estimate import GPU_SPEED, cost, memory, said_bytes, seconds
from hessprobe.training.planning.measuring_plan import measuring_lines, probe_plans

GPU = 80e9  # bytes, of the accelerator that the advice is about


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
        lines += _of_probes(recipe, model, partition)
        lines += [_of_time(run_seconds(recipe, model, partition))]
        lines += [f"seeds     {seeds} runs of it"] if seeds else []
        return "\n".join(lines)
    return "\n".join([*lines, *_of_study(recipe, seeds or recipe.study.seeds, model, partition)])


def run_seconds(recipe: Recipe, model: Decoder, partition: Partition) -> float:
    """Returns how long a run's training and measuring take by operation count, at GPU_SPEED."""
    optimizer, steps = recipe.optimizer, recipe.training.steps
    warmup = min(optimizer.warmup_steps, steps)
    gradients = (steps - warmup) * cost(optimizer, model, partition) + warmup * optimizer.minibatches
    gradients += sum(probe.gradients for probe in probe_plans(recipe, model, partition))
    return seconds(gradients, optimizer.sequences, model.config)


def study_seconds(recipe: Recipe, seeds: int) -> float:
    """Returns how long all of a study's runs take by operation count, at GPU_SPEED, each to its last step."""
    study = recipe.study
    assert study is not None
    runs = [(warm_up_run(recipe, recipe.seed), seeds)] if study.warm_up_steps else []
    for variant in study.variants:
        run = variant_run(recipe, variant, variant.learning_rates[0], recipe.seed, None)
        runs.append((run, len(variant.learning_rates) + seeds - 1))
    total = 0.0
    for run, times in runs:
        model = Decoder(decoder_config(run), generator=None)
        total += times * run_seconds(run, model, Partition.of(model, run.partition))
    return total


def _of_time(spent: float) -> str:
    said = f"{spent / 3600:,.1f} h" if spent >= 7200 else f"{spent / 60:.1f} min"
    return f"time      about {said} by operation count on a GPU that makes {GPU_SPEED / 1e12:.0f} TFLOP/s in float32 (H100)"


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
    yield f"memory    about {said_bytes(memory(optimizer, model, partition).peak)} at the peak, an estimate"


def _of_memory(optimizer: OptimizerRecipe, model: Decoder, partition: Partition) -> Iterator[str]:
    found = memory(optimizer, model, partition)
    whole = found.sequences == optimizer.sequences
    one = "one minibatch" if whole else f"{found.sequences} sequences of a minibatch"
    yield f"          float32, {one} at a time; of the last two the larger counts:"
    for name, size in (
        ("weights", found.weights),
        ("optimizer state", found.state),
        ("gradient", found.gradient),
        ("an outer step's tokens", found.data),
        ("a gradient's activations", found.activations),
        ("a dual pass", found.dual),
    ):
        yield f"          {said_bytes(size):>12}  {name}"
    if found.peak > GPU:
        each = max(found.activations, found.dual) / found.sequences
        fitting = int((GPU - found.peak) // each + found.sequences)
        way_out = (
            f"{2 ** int(math.log2(fitting))} sequences a minibatch would (--set optimizer.sequences=)"
            if fitting >= 1
            else "nor does a minibatch of 1 sequence"
        )
        yield f"          that does not fit {GPU / 1e9:.0f} GB; {way_out}"


def _of_probes(recipe: Recipe, model: Decoder, partition: Partition) -> Iterator[str]:
    for label, line in measuring_lines(probe_plans(recipe, model, partition), recipe.training.probe_share):
        yield f"{label:<10}{line}"


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
        parts = run, own, Partition.of(own, run.partition)
        lines = *_of_run(*parts), *_of_probes(*parts)
        yield from _indented(f"{variant.name}, learning rates {rates}", lines)
    yield from ("", _of_time(study_seconds(recipe, seeds)))


def _indented(title: str, lines: Iterable[str]) -> Iterator[str]:
    yield from ("", title)
    yield from (f"  {line}" for line in lines)
