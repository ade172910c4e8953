"""What the Gauss-Newton matrix and the Hessian of a model share: theta, micro-batches, memory, ways to differentiate.

Each has several engines, best first. One that the model forbids (a custom function without forward mode,
activation checkpointing, an in-place operation under vmap) is dropped at its first failure, for good. The last one,
"first-order", has no derivative but the gradient's (curvature/difference_steps.py), and an error that it states.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from hessprobe.curvature import cost
from hessprobe.curvature.difference_steps import Named, StepErrors
from hessprobe.curvature.first_order_products import (
    FIRST_ORDER,
    FirstOrderProducts,
    check_precision,
    engines_of,
    warn_of_differences,
)
from hessprobe.curvature.forward_mode import NoForwardMode
from hessprobe.curvature.operator import Blocks, CurvatureOperator, over_groups
from hessprobe.errors import UserError
from hessprobe.machine.devices import working_memory
from hessprobe.machine.memory import is_out_of_memory
from hessprobe.machine.seeds import trial_vectors
from hessprobe.problem.measuring import measuring
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.operation_rules import without_rules
from hessprobe.problem.parameter_kinds import present
from hessprobe.problem.partition import Partition
from hessprobe.problem.shares import Share, is_sharded
from hessprobe.problem.swapping import common_dtype

DEFAULT_MEMORY = 2**29


class NoSecondDerivatives(UserError):
    """The model's backward pass cannot be differentiated."""


class ModelOperator(CurvatureOperator):
    """A curvature matrix of an objective at theta on the union of micro-batches, weighted by their tokens.

    Of several processes (`objective.processes`) each works on its share of the sequences, and every product is the sum.

    Args:
        objective: model and loss.
        batches: one batch or a list of micro-batches.
        partition: the blocks of the flat vector.
        parameters: theta as a (p,) vector; default: the model's own parameters, read at every product.
        memory: bytes that the vectors of one chunk and their activations may take; more rows are done in turn. Default:
            512 MiB, or a quarter of what a GPU has free.
        engine: one of the class's ENGINES; "exact", the first but "first-order" that the model takes; or "auto", which
            takes "first-order" too where the model has no second derivatives, and then warns. Parameters sharded over
            devices have no other.

    Raises:
        UserError: no target in any batch, an unknown engine, or theta of another size; "first-order" for weights in half
            precision; another engine, or theta, for sharded parameters.
    """

    ENGINES: tuple[str, ...] = ()
    # Positions (tokens) from which half a batch still fills the machine: a batch of twice as many is done in halves,
    # since a product keeps about twice what a gradient keeps for the way back, and more.
    FILLS_CPU, FILLS_GPU = 512, 8192

    def __init__(
        self,
        objective: Objective,
        batches: Batch | list[Batch],
        partition: Partition,
        *,
        parameters: Tensor | None = None,
        memory: int | None = None,
        engine: str = "auto",
    ) -> None:
        dtype, device = (
            _kind(objective, partition) if parameters is None else (parameters.dtype, parameters.device)
        )
        if parameters is not None and parameters.shape != (partition.size,):
            raise UserError(
                f"parameters: wanted one vector ({partition.size:,},), got {tuple(parameters.shape)}: "
                "partition.vector(model) makes one"
            )
        super().__init__(partition, dtype, device)
        self.objective = objective
        self.micro_batches = objective.micro_batches(batches)
        self.tokens = self.micro_batches.tokens
        self.weight = self.micro_batches.weight  # what the mean loss divides by
        self.memory = working_memory(device, DEFAULT_MEMORY) if memory is None else memory
        self._theta = None if parameters is None else partition.unflatten(parameters.detach())
        self._engines = engines_of(type(self), objective, self.dtype, engine)
        self._batched = True
        self._trusted = False
        self._fallen = self._said = False  # differences are taken for want of derivatives; that was said
        self._cuts: int | None = None
        self._pieces: MicroBatches | None = None

    @property
    def pieces(self) -> MicroBatches:
        """This process's share of the micro-batches as it is worked on: long ones in halves, finer where memory ran out."""
        if self._pieces is None:
            fills = self.FILLS_CPU if self.device.type == "cpu" else self.FILLS_GPU
            found, shares = [], self.micro_batches.parted([own.batch for own in self.shares])
            for batch, (count, positions) in zip(shares, shares.shapes, strict=True):
                cuts = self._cuts or (2 if count * positions >= 2 * fills else 1)
                cuts = 1 if self._passes_together else cuts
                found += self.objective.split(batch, cuts)
            self._pieces = shares.parted(found)
        return self._pieces

    @cached_property
    def _passes_together(self) -> bool:
        """Whether a pass needs all processes, which must then make equally many."""
        return self.objective.processes.count > 1 and is_sharded(self.objective.model)

    @cached_property
    def shares(self) -> list[Share]:
        """What of the micro-batches this process works on, in order; all of them where it is alone."""
        return self.objective.share(self.micro_batches)

    def _cut_finer(self) -> bool:
        """Halves the pieces; tells whether that was possible."""
        before = len(self.pieces)
        self._cuts = 2 * math.ceil(before / max(1, len(self.shares)))
        self._pieces = None
        self.__dict__.pop("bytes_per_row", None)
        return len(self.pieces) > before

    @property
    def engine(self) -> str:
        """The way products are differentiated now: the first of ENGINES that this model has not refused."""
        return self._engines[0]

    def leaves(self, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """Returns theta by name as fresh leaves; only `names` (default: all) want gradients."""
        return self.objective.leaves(self.partition, self._theta, names)

    def fixed(self) -> Self:
        """Returns the operator at the present theta for good; of sharded parameters, which nobody copies, at theta."""
        found = copy.copy(self)
        if found._theta is None and not is_sharded(self.objective.model):
            found._theta = {name: leaf.clone() for name, leaf in self.leaves(()).items()}
            found.__dict__.pop("first_order", None)
        found._engines = list(self._engines)
        return found

    def names_in(self, blocks: Blocks) -> tuple[str, ...]:
        """Returns the names of the blocks' parameters in the order of the flat vector."""
        return tuple(slot.name for slot in self.partition.slots if slot.block in blocks)

    def flatten_rows(self, tensors: dict[str, Tensor], k: int) -> Tensor:
        """Returns (k, p) from (k, *shape) tensors by name; what is missing is zero."""
        product = torch.zeros(k, self.size, dtype=self.dtype, device=self.device)
        with without_rules():
            for slot in self.partition.slots:
                if slot.name in tensors:
                    product[:, slot.start : slot.stop] = tensors[slot.name].reshape(k, -1)
        return product

    @cached_property
    def bytes_per_row(self) -> int:
        """What one vector costs in a batched product: itself, its product, and the activations' tangents."""
        seen: dict[int, int] = {}

        def note(t: Tensor) -> Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            # Not t: an output that its own graph holds is never freed. Nor nothing: a place freed is given out again.
            return t.detach()

        own = {p.untyped_storage().data_ptr() for p in self.objective.model.parameters()}
        largest, vector = 0, self.size * self.dtype.itemsize
        for batch in self.pieces:
            seen.clear()
            with measuring(self.objective.model), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                z = self.objective.outputs(batch, self.leaves())
                saved = sum(size for pointer, size in seen.items() if pointer not in own)
            largest = max(largest, cost.bytes_per_row(saved, z.nbytes, vector))
        return largest or cost.bytes_per_row(0, 0, vector)

    def rows_at_once(self, k: int) -> int:
        """Returns how many of k rows fit in the memory bound together."""
        return 1 if k == 1 else cost.rows_at_once(k, self.memory, self.bytes_per_row)

    def _apply(self, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        return self._total(lambda: self._own(v, columns, rows))

    def _apply_groups(self, v: Tensor, groups: Sequence[tuple[Blocks, Blocks]]) -> Tensor:
        return self._total(lambda: self._own_groups(v, groups))

    def _total(self, own: Callable[[], Tensor]) -> Tensor:
        """Returns the sum over processes. Nothing in own() may wait for another: retries are each one's own business."""
        return self.objective.processes.total(own())[0]

    def _own_groups(self, v: Tensor, groups: Sequence[tuple[Blocks, Blocks]]) -> Tensor:
        """Returns this process's share of the products restricted to groups (see CurvatureOperator)."""
        return over_groups(self._own, v, groups, self.partition)

    def _own(self, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        """Returns this process's share of the products."""
        while True:
            # Differences take one row after the other in any case.
            one_by_one = not self._batched or self.engine == FIRST_ORDER
            chunk = 1 if one_by_one else self.rows_at_once(v.shape[0])
            try:
                parts = [self._attempt(part, columns, rows) for part in v.split(chunk)]
            except RuntimeError as error:
                if not is_out_of_memory(error) or self._passes_together:
                    raise
                if chunk > 1:  # the bound was too hopeful: half the rows at once
                    self.memory = chunk // 2 * self.bytes_per_row
                elif not self._cut_finer():
                    raise
            else:
                return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attempt(self, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        if v.shape[0] > 1 and not self._batched:
            return torch.cat([self._attempt(row, columns, rows) for row in v.split(1)])
        try:
            if self.engine == FIRST_ORDER:
                return self._differences(v, columns, rows)
            if self.engine == self.ENGINES[0]:
                self._check_first_engine()
            elif not self._trusted:
                self._check_symmetry()
            return self._over_batches(self._product(self.engine, v.shape[0]), v, columns, rows)
        except (RuntimeError, NotImplementedError, NoSecondDerivatives) as refusal:
            if is_out_of_memory(refusal):
                raise
            if v.shape[0] > 1 and not isinstance(refusal, (NoForwardMode, NoSecondDerivatives)):
                # perhaps it is vmap that the model does not take
                self._batched = False
            elif len(self._engines) > 1:
                self._engines.pop(0)
                self._fallen = self.engine == FIRST_ORDER
                if self._fallen:
                    self._check_plain_pass()
            else:
                raise
            try:
                found = self._attempt(v, columns, rows)
            except (RuntimeError, NotImplementedError) as second:
                raise second from refusal
            except UserError as second:
                if not isinstance(refusal, NoSecondDerivatives):
                    raise
                raise UserError(f"{refusal} Differences of passes do not serve either: {second}") from second
            self._say()
            return found

    def _check_plain_pass(self) -> None:
        """Raises the model's own error where it is not derivatives that fail."""
        for batch in self.pieces[:1]:
            self.objective.outputs(batch, self._theta)

    def _check_first_engine(self) -> None:
        """Raises NoForwardMode where the first engine's products would not be of one symmetric matrix."""

    def _check_symmetry(self) -> None:
        """Raises where second derivatives are silently missing, once per operator. Cost: 2 products.

        A function whose backward pass cannot be differentiated (once_differentiable, a hand-written kernel) drops
        out of a reverse pass towards named inputs without an error, and the product is then not symmetric.
        """
        u, v = self._trial_rows(2)
        product = self._product(self.engine, 1)
        everything = self.partition.blocks
        au, av = (self._over_batches(product, x[None], everything, everything)[0] for x in (u, v))
        gap = (u @ av - v @ au).abs() / (u.norm() * av.norm()).clamp_min(torch.finfo(self.dtype).tiny)
        if gap > torch.finfo(self.dtype).eps ** 0.4:
            raise NoSecondDerivatives(
                f"{type(self).__name__}: this model has no second derivatives where it needs them (products are not "
                f"symmetric, gap {float(gap):.1e}): a custom function or kernel whose backward pass cannot be "
                "differentiated. Measure with the plain implementation of that layer."
            )
        self._trusted = True

    def _trial_rows(self, k: int) -> Tensor:
        """Returns (k, p) rows to check products with, the same every time."""
        return trial_vectors(self.device)(torch.empty(k, self.size, dtype=self.dtype, device=self.device))

    def _say(self) -> None:
        """Warns once where differences are taken for want of derivatives."""
        if not self._fallen or self._said:
            return
        self._said = True
        warn_of_differences(type(self).__name__, type(self.objective.model).__name__, self.step_errors)

    @property
    def step_errors(self) -> StepErrors | None:
        """What products of the engine "first-order" are worth; None before the first one, and for other engines."""
        return self.first_order.errors if self.engine == FIRST_ORDER else None

    @cached_property
    def first_order(self) -> FirstOrderProducts:
        """What makes the products of the engine "first-order"; `measure_steps` tells their errors along any direction."""
        check_precision(self.dtype)
        return FirstOrderProducts(
            type(self), self.micro_batches, self.partition, self._theta, compare=not self._fallen
        )

    def _differences(self, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        return self.first_order.apply(
            self._by_differences, self.pieces, v, self.names_in(columns), self.names_in(rows)
        )

    def _by_differences(self, batch: Batch, v: Named, e: float, wanted: Sequence[str]) -> Named:
        """Returns one micro-batch's share of A v by name, from passes at theta + e v and theta - e v."""
        raise NotImplementedError

    def _over_batches(
        self, product: Callable[..., Tensor], v: Tensor, columns: Blocks, rows: Blocks
    ) -> Tensor:
        total: Tensor | None = None
        with measuring(self.objective.model):
            for batch in self.pieces:
                part = product(batch, v, columns, rows)
                total = part if total is None else total.add_(part)
        return torch.zeros_like(v) if total is None else total

    def _product(self, engine: str, k: int) -> Callable[..., Tensor]:
        """Returns the method that computes one micro-batch's share of k products."""
        raise NotImplementedError


def _kind(objective: Objective, partition: Partition) -> tuple[torch.dtype, torch.device]:
    """Returns the type that a model's parameters have in common, and their device."""
    own = present(objective.model, partition.shapes)
    dtype = common_dtype(own.values())
    assert dtype is not None  # a partition has parameters
    return dtype, own[partition.names[0]].device
