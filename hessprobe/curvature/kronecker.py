"""K-FAC and EK-FAC of a model's linear layers: blocks of G as L (x) R diag(e) L^T (x) R^T, L and R orthogonal.

K-FAC (Martens, Grosse 2015; weights shared over positions: "expand", Eschenhagen et al. 2023): e = eigenvalues of
B (x) A, with A = mean of a a^T over the rows a that enter the layer, B = (1/N) sum of g g^T over the gradients g of
the summed loss of sampled labels at the rows that leave it. EK-FAC (George et al. 2018): the same bases, but e[i, j]
= the second moment of a sequence's gradient along them, so that the trace of the block is exact.
curvlinops collects the sums; their scale, which it takes from the shapes of data and outputs, is set here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version

import curvlinops
import torch
from torch import Tensor, nn

from hessprobe.curvature.kronecker_factors import KINDS, KroneckerBlock, KroneckerFactors
from hessprobe.curvature.summed_outputs import (
    EMPIRICAL,
    LOSSES,
    SummedOutputs,
    counted,
    hooks_taken_out,
    module_of,
)
from hessprobe.errors import RunFailed, UserError, unknown_name
from hessprobe.problem.measuring import measuring
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition

FISHERS = ("mc", "exact", "empirical")
# What is used of curvlinops' operators, some of it beyond what its documentation promises to keep.
NEEDED = {
    "KFACLinearOperator": ("compute_kronecker_factors", "state_dict"),
    "EKFACLinearOperator": ("compute_kronecker_factors", "compute_eigenvalue_correction", "state_dict"),
}
LARGEST = 8192  # a longer side's factor would take gigabytes: such a layer is left out


def kronecker_names(model: nn.Module, partition: Partition, *, largest: int = LARGEST) -> tuple[str, ...]:
    """Returns the parameters K-FAC takes: weights and biases of nn.Linear with sides up to `largest`, used by one module.

    Left out: embeddings, norms, a head tied to the embedding, Hugging Face's Conv1D, parameters not in the partition;
    and by `kronecker_factors`, which sees the model run, modules called more than once in a forward pass, or never
    (those whose parameters nn.MultiheadAttention takes without calling them).
    """
    uses: dict[int, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        uses[id(p)] = uses.get(id(p), 0) + 1
    found = []
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Linear) and max(module.in_features, module.out_features) <= largest:
            for short, p in module.named_parameters(recurse=False):
                name = f"{module_name}.{short}".lstrip(".")
                if short in ("weight", "bias") and name in partition.names and uses[id(p)] == 1:
                    found.append(name)
    return tuple(found)


def kronecker_factors(
    objective: Objective,
    batches: Batch | list[Batch],
    partition: Partition,
    *,
    kind: str = "kfac",
    fisher: str = "mc",
    samples: int = 1,
    largest: int = LARGEST,
    generator: torch.Generator,
    parameters: Mapping[str, Tensor] | None = None,
) -> KroneckerFactors:
    """Returns K-FAC's or EK-FAC's stand-in for G of the mean loss per token, on the parameters of `kronecker_names`.

    Args:
        kind: "kfac" or "ekfac".
        fisher: "mc" (labels drawn from the model: G in the mean), "exact" (every class of every position in turn: for
            small problems), or "empirical" (the data's labels: NOT Gauss-Newton).
        samples: labels drawn per token.
        largest: layers with a longer side are left out.
        generator: of the labels.
        parameters: theta by name, put in the model's place while it is measured; default: the model's own.

    K-FAC's trace is trace(A) trace(B): it equals that of G's block only where the sizes of a row's input and gradient
    are unrelated and its positions independent; EK-FAC's equals it in the mean. Where micro-batches differ in length,
    EK-FAC's input basis weighs them by sequences; everything else is weighted by tokens.

    Cost: one gradient and, for matrices as wide as high, 2/3 for the sums of outer products; EK-FAC twice that;
    "exact" (1 + 2 classes) / 3 gradients per position of a sequence.

    Raises:
        UserError: an unknown kind, fisher or loss; no sample; no layer it can take; a layer outside the computation.
        RunFailed: factors that are not finite.
    """
    if kind not in KINDS:
        raise unknown_name("Kronecker factorisation", kind, KINDS)
    if fisher not in FISHERS:
        raise unknown_name("fisher", fisher, FISHERS)
    if samples < 1:
        raise UserError(f"K-FAC: samples must be at least 1, got {samples}")
    loss = objective.loss_function
    if loss.family not in LOSSES or (fisher == "empirical" and loss.name not in EMPIRICAL):
        known = (
            EMPIRICAL if fisher == "empirical" else (*EMPIRICAL, "mean_squared_error", "binary_cross_entropy")
        )
        raise UserError(
            f"K-FAC takes the losses {', '.join(known)}, got {loss.name}: use one of them, or "
            "a method that needs no factors of the loss's Hessian"
        )
    _check_curvlinops()
    listed = objective.micro_batches(batches).with_targets
    names = kronecker_names(objective.model, partition, largest=largest)
    if not names:
        raise UserError(
            f"K-FAC needs a layer it can factor: an nn.Linear with sides up to {largest:,}, trained, its weight used by no "
            f"other module. {type(objective.model).__name__} has none in the partition (its matrices may be in modules of "
            "another kind such as Conv1D, tied, or frozen): take a method that needs no layers, such as shampoo"
        )
    presented = SummedOutputs(objective, fisher, samples)
    with measuring(objective.model, forward_mode=False), hooks_taken_out(objective.model, parameters):
        try:
            collect = _ekfac_blocks if kind == "ekfac" else _kfac_blocks
            blocks = collect(presented, listed, names, generator)
        except RuntimeError as error:
            if "to not have been used" not in str(error):
                raise
            raise UserError(
                "K-FAC: a linear layer takes no part in the outputs; freeze it (requires_grad_(False)) and make "
                "the partition anew"
            ) from error
    if not blocks:
        raise UserError(
            f"K-FAC needs a layer it can factor: an nn.Linear that is called once in a forward pass. Of "
            f"{type(objective.model).__name__}'s, {', '.join(names[:4])}{' ...' if len(names) > 4 else ''} are called more "
            "often, or never (nn.MultiheadAttention takes weights without calling their module): take a method that needs "
            "no layers, such as shampoo"
        )
    return KroneckerFactors(blocks=blocks, gradient_equivalents=presented.cost(names))


def _kfac_blocks(
    presented: SummedOutputs, batches: MicroBatches, names: Sequence[str], generator: torch.Generator
) -> dict[str, KroneckerBlock]:
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    rows: dict[str, float] = {}
    again: set[str] = set()
    for i in range(len(batches)):
        operator = curvlinops.KFACLinearOperator(
            **presented.arguments(batches[i : i + 1], names, _seed(generator))
        )
        before = presented.forwards
        with counted(presented, names) as counts:
            operator.compute_kronecker_factors()
        state, forwards = operator.state_dict(), presented.forwards - before
        for module, outer in state["gradient_covariances"].items():
            gradients[module] = gradients[module] + outer if module in gradients else outer
        for module, outer in state["input_covariances"].items():
            # It divides the sum by the rows of a sequence, for which it takes the inner dimensions of whatever the
            # module is called with: not so where the model flattens its tokens.
            total = outer * (counts[module].divisor / forwards)
            inputs[module] = inputs[module] + total if module in inputs else total
            rows[module] = rows.get(module, 0) + counts[module].rows / forwards
        again |= {module for module, count in counts.items() if count.calls > forwards}
    scale, blocks = presented.scale(batches), {}
    leaving = {module: _eigen(outer * scale) for module, outer in gradients.items()}
    entering = {module: _eigen(total / rows[module]) for module, total in inputs.items()}
    for name in names:
        module, kind = module_of(name)
        if module not in leaving or module in again:
            continue
        out_values, left = leaving[module]
        if kind == "bias":
            blocks[name] = KroneckerBlock(left=left, right=None, eigenvalues=out_values)
        else:
            in_values, right = entering[module]
            values = torch.outer(out_values, in_values)
            blocks[name] = KroneckerBlock(left=left, right=right, eigenvalues=values)
    return blocks


def _ekfac_blocks(
    presented: SummedOutputs, batches: MicroBatches, names: Sequence[str], generator: torch.Generator
) -> dict[str, KroneckerBlock]:
    operator = curvlinops.EKFACLinearOperator(**presented.arguments(batches, names, _seed(generator)))
    with counted(presented, names) as counts:
        operator.compute_kronecker_factors()
        operator.compute_eigenvalue_correction()
    state, scale, blocks = operator.state_dict(), presented.scale(batches), {}
    for position, name in enumerate(names):
        module, kind = module_of(name)
        # Of a module called twice it would pair the gradients of one call with the inputs of the other.
        if module not in state["corrected_eigenvalues"] or counts[module].calls > presented.forwards:
            continue
        blocks[name] = KroneckerBlock(
            left=state["gradient_covariances_eigenvectors"][module],
            right=None if kind == "bias" else state["input_covariances_eigenvectors"][module],
            eigenvalues=state["corrected_eigenvalues"][module][position] * scale,
        )
    return blocks


def _check_curvlinops() -> None:
    """Raises a UserError where curvlinops' operators are no longer those that this file was written for."""
    for name, methods in NEEDED.items():
        operator = getattr(curvlinops, name, None)
        lacks = [method for method in methods if not hasattr(operator, method)]
        if operator is None or lacks:
            what = f"{name}.{lacks[0]}" if operator is not None else name
            raise UserError(
                f"K-FAC: curvlinops {version('curvlinops-for-pytorch')} has no {what}; wanted one that does: "
                "pip install 'curvlinops-for-pytorch>=3.0.1,<4'"
            )


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    if not bool(torch.isfinite(matrix).all()):
        raise RunFailed(
            "K-FAC: a layer's factors are not finite; a lower learning rate or more damping helps"
        )
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values.clamp_min(0), vectors
