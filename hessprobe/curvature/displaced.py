"""Passes of a model at theta + e v: forward passes and gradients alone, by the model's own kernels and hooks.

Whole parameters have others put in their places. Of sharded ones (FSDP2) each process moves its own shard in place by its
part of e v, and puts the saved bits back: gathering and its hooks are the model's own, and no `.grad` changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from hessprobe.errors import UserError
from hessprobe.problem.leaves import Leaves
from hessprobe.problem.measuring import measuring, with_parameters
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.operation_rules import without_rules
from hessprobe.problem.parameter_kinds import present
from hessprobe.problem.partition import Partition
from hessprobe.problem.shares import is_sharded
from hessprobe.problem.swapping import HALF

Named = Mapping[str, Tensor]


class Displaced:
    """An objective's model at theta + e v, for any direction v given by name.

    Args:
        theta: values by name; default: the model's own, read at every pass.

    Raises:
        UserError: theta for a model whose parameters are sharded; no process could hold it.
    """

    def __init__(self, objective: Objective, partition: Partition, theta: Named | None = None) -> None:
        self.objective, self.partition, self.theta = objective, partition, theta
        self.sharded = is_sharded(objective.model)
        self._named_inputs = True  # whether the model's backward pass may be asked for some leaves alone
        Leaves(objective, partition, theta)

    def norm(self) -> float:
        """Returns |theta|, the same in every process."""
        if self.sharded:
            _let_go(self.objective.model)
            own = present(self.objective.model, self.partition.shapes).values()
            return sum(float(_whole(p.detach().square().sum())) for p in own) ** 0.5
        return float(torch.stack([x.norm() for x in self._leaves(()).values()]).norm())

    def outputs(self, batch: Batch, v: Named | None = None, e: float = 0.0) -> Tensor:
        """Returns z (n, c) without a graph. Cost: a forward pass."""
        with (
            self._moved(v, e),
            measuring(self.objective.model, forward_mode=False),
            torch.no_grad(),
            warnings.catch_warnings(),  # of checkpoints with use_reentrant=True, which want gradients
        ):
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad", UserWarning)
            return self.objective.outputs(batch, None if self.sharded else self._leaves((), v, e))

    def pulled_back(
        self,
        batch: Batch,
        cotangent: Callable[[Tensor], Tensor],
        wanted: Sequence[str],
        v: Named | None = None,
        e: float = 0.0,
    ) -> dict[str, Tensor]:
        """Returns J^T c by name, for the parameters `wanted`; what is missing is zero. Cost: a gradient.

        Args:
            cotangent: c (n, c) from the outputs.

        Raises:
            UserError: sharded parameters that the model gathers in half precision.
        """
        with self._moved(v, e), measuring(self.objective.model, forward_mode=False):
            if self.sharded:
                return self._from_gathered(batch, cotangent, wanted)
            while True:
                # All of them want gradients: a checkpoint with use_reentrant=True has none where its inputs want none.
                leaves = self._leaves(None, v, e)
                try:
                    return with_parameters(
                        self.objective.model,
                        leaves,
                        lambda leaves=leaves: self._gradients(batch, leaves, cotangent, wanted),
                    )
                except RuntimeError as refusal:
                    # What a checkpoint with use_reentrant=True says where some leaves alone are asked for.
                    if not self._named_inputs or "use_reentrant=True" not in str(refusal):
                        raise
                    self._named_inputs = False

    def _leaves(
        self, wanted: Sequence[str] | None, v: Named | None = None, e: float = 0.0
    ) -> dict[str, Tensor]:
        found = self.objective.leaves(self.partition, self.theta, wanted)
        with without_rules(), torch.no_grad():
            for name, along in (v or {}).items():
                moved = torch.add(found[name].detach(), along, alpha=e)
                found[name] = moved.requires_grad_(found[name].requires_grad)
        return found

    def _gradients(
        self, batch: Batch, leaves: Named, cotangent: Callable[[Tensor], Tensor], wanted: Sequence[str]
    ) -> dict[str, Tensor]:
        z = self.objective.outputs(batch, leaves)
        if not z.requires_grad:
            return {}
        c = cotangent(z.detach())
        inputs = [leaves[name] for name in wanted]
        if self._named_inputs:
            found = torch.autograd.grad(z, inputs, c, allow_unused=True)
        else:
            z.backward(c)  # into the leaves, which are nobody else's
            found = [x.grad for x in inputs]
        return {name: x for name, x in zip(wanted, found, strict=True) if x is not None}

    def _from_gathered(
        self, batch: Batch, cotangent: Callable[[Tensor], Tensor], wanted: Sequence[str]
    ) -> dict[str, Tensor]:
        gathered = Leaves(self.objective, self.partition, wanted=wanted)

        def passed() -> dict[str, Tensor]:
            z = self.objective.outputs(batch)
            there = [name for name in wanted if name in gathered]
            inputs = [gathered[name] for name in there]
            if half := {str(x.dtype).removeprefix("torch.") for x in inputs if x.dtype in HALF}:
                raise UserError(
                    f"fully_shard gathers parameters in {', '.join(half)} (its mp_policy=), in which differences of forward "
                    "passes are rounding alone: measure a model sharded without mp_policy=, or a checkpoint of the run "
                    "(hessprobe probe)"
                )
            found = torch.autograd.grad(z, inputs, cotangent(z.detach()), allow_unused=True)
            return {name: x for name, x in zip(there, found, strict=True) if x is not None}

        return gathered.run(passed)

    @contextmanager
    def _moved(self, v: Named | None, e: float) -> Iterator[None]:
        """Moves this process's shards, if any, by their part of e v; within it gathered parameters are those moved."""
        if not self.sharded:
            yield
            return
        model, saved = self.objective.model, list[tuple[Tensor, Tensor]]()
        _let_go(model)  # what a forward pass of the loop's own has left gathered stands in the shards' places
        own = present(model, self.partition.shapes)
        try:
            with torch.no_grad():
                for name, along in (v or {}).items():
                    shard = _local(own[name].detach())
                    saved.append((shard, shard.clone()))
                    with _unsafe_preserve_version_counter(shard):
                        shard.add_(_part(along, own[name]).to(shard), alpha=e)
            yield
        finally:
            with torch.no_grad():
                for shard, before in saved:
                    with _unsafe_preserve_version_counter(shard):
                        shard.copy_(before)
            _let_go(model)


def _let_go(model: nn.Module) -> None:
    """Frees gathered parameters: FSDP2 keeps those of its root after a forward pass, and would not gather them again."""
    for module in model.modules():
        if hasattr(module, "set_requires_gradient_sync") and hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def _local(tensor: Tensor) -> Tensor:
    """Returns this process's shard of a DTensor, which shares its memory; a plain tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """Returns of a tensor that every process holds the part that belongs to a parameter's shard; nothing is sent."""
    if not hasattr(like, "placements"):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh, everywhere = like.device_mesh, [Replicate()] * like.device_mesh.ndim  # type: ignore[attr-defined]
    found = DTensor.from_local(whole.contiguous(), mesh, everywhere, run_check=False)
    return found.redistribute(placements=like.placements).to_local()  # type: ignore[attr-defined]
