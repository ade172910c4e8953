"""What a recipe's training costs by estimate: gradients of an outer step, and memory.

Shapes are counted on torch's meta device, which holds no numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from hessprobe.curvature import cost as cost_of
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.optimization.group_models import LocalModels
from hessprobe.optimization.inner_solver import hidden_matrices
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.problem.splitting import sequences_at_once
from hessprobe.recipe import OptimizerRecipe
from hessprobe.schema.optimizers import ENTRIES, LARGEST
from hessprobe.training.optimizers import gauss_newton_settings

# Operations a second that an accelerator makes of float32 products: 60 % of an H100's 67 TFLOP/s. TF32 is several times
# faster, and not what torch computes in unless it is told to.
GPU_SPEED = 40e12
FLOAT = 4  # bytes; everything is float32
TOKEN = 16  # bytes: as an input and as a target
GIB = 2**30
# Peak of one pass in multiples of (what a forward pass saves for its reverse, one batch's logits), fitted to the resident
# memory of a CPU process at 4 sizes of the decoder: within 20 %. Attention is fused in a gradient; a dual pass keeps its
# weights.
GRADIENT, DUAL, SHARED = (1.2, 4.5), (2.7, 11.0), (3.7, 9.0)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """An estimate in bytes: what lies there all the time, and what a pass over `sequences` of a minibatch needs on top."""

    sequences: int
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


def cost(recipe: OptimizerRecipe, model: Decoder, partition: Partition) -> float:
    """Returns gradient-equivalents of one outer step by operation count, in gradients of a minibatch.

    The most that conjugate gradients and K-FAC may take; the mean over steps where curvature is estimated anew in some.
    """
    if not recipe.is_gauss_newton:
        entry = ENTRIES[recipe.name]
        return recipe.minibatches * (1 + entry.estimate / (recipe.refresh or entry.refresh or 1))
    names = (
        [partition.names] if not recipe.layerwise else [partition.parameters_of(b) for b in partition.blocks]
    )
    local, settings = LocalModels(Objective(model), names), gauss_newton_settings(recipe, 1)
    if recipe.inner_solver == "cg":
        products = len(names) * (
            settings.cg_iterations + 2
        )  # besides the iterations one to start and one to check
        solving = recipe.minibatches * (1 + products * cost_of.dual_pass(len(names)))
    else:
        solving = local.cost * (recipe.inner_steps or recipe.minibatches)
    return solving + (cost_of.line_search(recipe.step_sizes) + 1) * recipe.searched


def seconds(gradients: float, sequences: int, config: DecoderConfig) -> float:
    """Returns how long gradients of so many sequences take at GPU_SPEED.

    A multiply-add is two operations, and a token takes one for every weight of a matrix, forward and twice back; attention
    adds two products of t x d a token and layer.
    """
    matrices = config.layers * (4 * config.width**2 + 2 * config.width * config.feedforward)
    attention = 2 * config.layers * config.width * config.context
    token = 6 * (matrices + config.width * config.vocabulary + attention)
    return gradients * sequences * config.context * token / GPU_SPEED


def memory(recipe: OptimizerRecipe, model: Decoder, partition: Partition) -> Memory:
    """Returns an estimate of the memory that training needs, in bytes."""
    size = partition.size * FLOAT
    config, b = model.config, recipe.sequences
    together = sequences_at_once(b, config.context)
    passes = pass_memory(config, together)
    dual = 0.0
    if recipe.is_gauss_newton:  # a linearisation holds J^T w too
        dual = passes["layerwise"] + size if recipe.layerwise else passes["full"]
    solver = recipe.inner_solver if recipe.is_gauss_newton else recipe.name
    # Gauss-Newton holds theta, the inner solution and the way there besides its solver's state.
    copies = 4 if recipe.is_gauss_newton else 2
    return Memory(
        sequences=together,
        weights=size,
        state=copies * size + FLOAT * _solver_floats(solver, model, partition),
        gradient=size * (1 if together == b else 2),  # a piece's, and the sum so far
        data=(recipe.minibatches + recipe.searched) * b * config.context * TOKEN,
        activations=passes["gradient"],
        dual=dual,
    )


def pass_memory(config: DecoderConfig, sequences: int) -> dict[str, float]:
    """Returns bytes at the peak of one pass over a batch: a gradient, a dual pass of the whole model, or of every layer."""
    logits = sequences * config.context * config.vocabulary * FLOAT
    attention = sequences * config.layers * config.heads * config.context**2 * FLOAT
    saved = sequences * _saved_bytes(config)
    return {
        "gradient": GRADIENT[0] * (saved - attention) + GRADIENT[1] * logits,
        "full": DUAL[0] * saved + DUAL[1] * logits,
        "layerwise": SHARED[0] * saved + SHARED[1] * logits,
    }


def said_bytes(size: float) -> str:
    """Returns a size as people read it."""
    return f"{size / GIB:,.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:,.1f} MiB"


@cache
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
    """Returns how many numbers a solver keeps: AdamW's for every parameter that it does not take, and its own."""
    if solver == "cg":
        return 5 * partition.size
    hidden = set(hidden_matrices(model))
    if solver == "kfac":
        from hessprobe.curvature.kronecker import kronecker_names  # curvlinops: only who asks for it pays

        hidden = set(kronecker_names(model, partition))
    entry, total = ENTRIES[solver], 0
    for slot in partition.slots:
        if not entry.elementwise and slot.name not in hidden:
            total += ENTRIES["adamw"].floats * slot.shape.numel()
            continue
        total += entry.floats * slot.shape.numel()
        total += entry.squares * sum(side**2 for side in slot.shape if side <= LARGEST)
    return total
