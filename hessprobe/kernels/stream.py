"""One backward pass, every block's per-sequence gradients: formed at a module, turned into Gram matrices, freed.

For block i and sketches m = (sequence, round), K_i[m, m'] = <w^m_i, w^m'_i> needs no P x M storage: a module's inputs
and its outputs' gradients give its share. Parameters whose modules offer no such path (used twice, tied, bare, custom)
are differentiated one sequence at a time. Which way each took is known, and each way is checked once per plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.kernels.features import FastPath, Piece, prefers_tokens, token_gram
from hessprobe.kernels.plan import NotOneCall, Plan, Tap, without
from hessprobe.kernels.sequence_gradients import outputs_of, sequence_gradients, watched
from hessprobe.problem.objective import Batch, Objective, with_parameters
from hessprobe.problem.partition import Partition

DEFAULT_MEMORY = 2**31
# (micro-batch's number, outputs (n, c), targets) -> cotangents (n, c), each token's scaled to its sequence.
Cotangents = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(kw_only=True)
class Held:
    """What one tap has gathered: inputs per micro-batch, output gradients per micro-batch and round."""

    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)


class Stream:
    """Gathers Gram matrices of one theta over micro-batches and rounds.

    Args:
        objective, partition: what is differentiated.
        plan: the way of each parameter.
        groups: into which kernel each parameter's share goes; one a block unless said otherwise.
        along: vectors (p,) by name, whose inner products with every sketch are wanted.
        memory: bytes of output gradients that may be held on the device; beyond, they go to the host.
        autocast: run the model under torch.autocast of this type; Gram matrices stay in float32.
    """

    def __init__(
        self,
        objective: Objective,
        partition: Partition,
        plan: Plan,
        *,
        theta: Mapping[str, Tensor] | None,
        groups: Mapping[str, int] | None = None,
        along: Mapping[str, Tensor] | None = None,
        memory: int = DEFAULT_MEMORY,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.objective, self.partition, self.plan, self.theta = objective, partition, plan, theta
        self.autocast = autocast
        self.along = {name: partition.unflatten(vector) for name, vector in (along or {}).items()}
        self.memory = memory
        order = {block: i for i, block in enumerate(partition.blocks)}
        self.group = groups or {slot.name: order[slot.block] for slot in partition.slots}
        self.kernel: Tensor | None = None
        self.alignment: dict[str, Tensor] = {}
        self.held_bytes = 0

    def run(self, batches: Sequence[Batch], rounds: int, cotangents: Cotangents) -> None:
        """Fills `kernel` (l, m, m) and `alignment` (l, m) for m = (micro-batch, round, sequence) in that order."""
        sequences = [int(self.objective.sequence_shape(batch)[0]) for batch in batches]
        m, layers = sum(sequences) * rounds, max(self.group.values()) + 1
        device = next(self.objective.model.parameters()).device
        self.kernel = torch.zeros(layers, m, m, dtype=torch.float64, device=device)
        self.alignment = {
            name: torch.zeros(layers, m, dtype=torch.float64, device=device) for name in self.along
        }
        drawn: list[list[Tensor]] = []

        def passes() -> None:
            held = {id(tap): Held() for tap in self.plan.taps}
            for number, batch in enumerate(batches):
                found = self._pass(batch, number, rounds, cotangents, held, sequences)
                if self.plan.fallback:
                    drawn.append(found)

        with watched(self.objective.model):
            leaves = self.objective.leaves(self.partition, self.theta, ())
            with_parameters(self.objective.model, leaves, passes)
            if self.plan.fallback:
                self._fall_back(batches, drawn)

    def run_until_it_fits(
        self, batches: Sequence[Batch], rounds: int, cotangents: Cotangents, generator: torch.Generator
    ) -> None:
        """Runs; a tap that some batch calls otherwise than once leaves `plan`, and the draws start again."""
        state = generator.get_state()
        while True:
            try:
                return self.run(batches, rounds, cotangents)
            except NotOneCall as refused:
                self.plan = without(self.plan, {id(refused.tap)})
                generator.set_state(state)

    def _pass(
        self,
        batch: Batch,
        number: int,
        rounds: int,
        cotangents: Cotangents,
        held: dict[int, Held],
        sequences: list[int],
    ) -> list[Tensor]:
        """Runs one micro-batch forward once and backward for each round, and returns the cotangents."""
        sketches, final = sum(sequences) * rounds, number == len(sequences) - 1
        roots: list[tuple[Tap, Tensor]] = []
        calls = {id(tap): 0 for tap in self.plan.taps}
        arrivals = {id(tap): 0 for tap in self.plan.taps}
        recomputing = False

        def arrived(tap: Tap, gradient: Tensor) -> None:
            mine = held[id(tap)]
            if len(mine.gradients) <= number:
                mine.gradients.append([])
            mine.gradients[number].append(gradient.detach())
            arrivals[id(tap)] += 1
            if final and arrivals[id(tap)] == rounds:
                self._add(tap, mine, sketches)
                mine.inputs.clear()
                mine.gradients.clear()
            else:
                self._make_room(mine)

        def tapped(tap: Tap) -> Callable[..., Tensor | None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
                if recomputing:  # a checkpointed part, in backward: the same graph again, and nothing to note
                    return None if output.requires_grad else output.detach().requires_grad_().clone()
                calls[id(tap)] += 1
                firsts = [x.shape[:1] for x in (*inputs, output)]
                if calls[id(tap)] > 1 or firsts != 2 * [(sequences[number],)]:
                    raise NotOneCall(tap)
                held[id(tap)].inputs.append(inputs[0].detach())
                if output.requires_grad:
                    output.register_hook(lambda g: arrived(tap, g))
                    return None
                # Parameters do not ask for gradients, so a graph must start where nothing came before.
                root = output.detach().requires_grad_()
                roots.append((tap, root))
                return root.clone()  # a leaf would refuse to be changed in place by what comes after

            return hook

        handles = [tap.module.register_forward_hook(tapped(tap)) for tap in self.plan.taps]
        try:
            z = outputs_of(self.objective, batch, self.autocast)
            for tap in self.plan.taps:
                if calls[id(tap)] == 0:
                    raise NotOneCall(tap)
            recomputing = True
            fixed, targets = z.detach().to(self._device_and_dtype()[1]), self.objective.targets(batch)
            if fixed.isnan().any():
                raise UserError(
                    f"{type(self.objective.model).__name__} returned NaN for micro-batch {number}: there is no "
                    "curvature to measure; look at the parameters and at the batch"
                )
            drawn = []
            for r in range(rounds):
                drawn.append(cotangents(number, fixed, targets).to(z.dtype))
                if roots:
                    tensors, keep = [root for _, root in roots], r < rounds - 1
                    grads = torch.autograd.grad(z, tensors, drawn[r], retain_graph=keep, allow_unused=True)
                    for (tap, root), g in zip(roots, grads, strict=True):
                        arrived(tap, torch.zeros_like(root) if g is None else g)
        finally:
            for handle in handles:
                handle.remove()
        for tap in self.plan.taps:
            if arrivals[id(tap)] != rounds:  # what it computes does not reach the outputs
                raise NotOneCall(tap)
        return drawn

    def _make_room(self, mine: Held) -> None:
        """Moves what is held to the host where the device's share of the memory is spent."""
        last = mine.gradients[-1]
        self.held_bytes += last[-1].numel() * last[-1].element_size()
        if self.held_bytes > self.memory and last[-1].is_cuda:
            last[-1] = last[-1].cpu()

    def _add(self, tap: Tap, mine: Held, sketches: int) -> None:
        """Adds one tap's share to the kernels and alignments."""
        device, dtype = self._device_and_dtype()
        inputs, gradients = [], []
        for a, rounds in zip(mine.inputs, mine.gradients, strict=True):
            for g in rounds:
                inputs.append(_positions(a.to(device), tap.path, embedding=tap.path.name == "embedding"))
                gradients.append(_positions(g.to(device, dtype), tap.path))
        embedded = tap.path.name == "embedding"
        inputs = inputs if embedded else [a.to(dtype) for a in inputs]
        shared = torch.unique(torch.cat([a.reshape(-1) for a in inputs])) if embedded else None
        for own, name in tap.names.items():
            if own == "weight" and self._by_tokens(tap, inputs, gradients, sketches):
                self._gram(self.group[name], token_gram(inputs, gradients))
                continue
            streams = [
                tap.path.parameters[own](tap.module, a, g, shared, sketches)
                for a, g in zip(inputs, gradients, strict=True)
            ]
            for pieces in zip(*streams, strict=True):
                self._add_piece(name, pieces)

    def _by_tokens(self, tap: Tap, inputs: list[Tensor], gradients: list[Tensor], sketches: int) -> bool:
        if tap.path.name != "linear" or self.along:
            return False
        a, g = inputs[0], gradients[0]
        same = all(x.shape[1] == a.shape[1] for x in inputs)
        return same and prefers_tokens(sketches, a.shape[1], a.shape[-1], g.shape[-1])

    def _add_piece(self, name: str, pieces: Sequence[Piece]) -> None:
        rows = torch.cat([piece.rows for piece in pieces]) if len(pieces) > 1 else pieces[0].rows
        self._gram(self.group[name], rows @ rows.mT)
        for key, vectors in self.along.items():
            self.alignment[key][self.group[name]] += rows @ pieces[0].pick(vectors[name]).to(rows)

    def _gram(self, block: int, gram: Tensor) -> None:
        assert self.kernel is not None
        self.kernel[block] += gram

    def _device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        first = next(self.objective.model.parameters())
        dtype = first.dtype if first.dtype in (torch.float32, torch.float64) else torch.float32
        return first.device, dtype

    def _fall_back(self, batches: Sequence[Batch], drawn: list[list[Tensor]]) -> None:
        """Differentiates the plan's other parameters sequence by sequence: exact for any model, and slower."""
        names = self.plan.fallback
        found: list[list[Tensor]] = []
        for batch, cotangents in zip(batches, drawn, strict=True):
            found += sequence_gradients(
                self.objective,
                batch,
                self.partition,
                self.theta,
                names,
                cotangents,
                self.plan.how,
                self.autocast,
            )
        rows = {name: torch.stack([sketch[i] for sketch in found]) for i, name in enumerate(names)}
        for name, gradients in rows.items():
            flat = gradients.flatten(1)
            self._add_piece(name, [Piece(rows=flat, pick=lambda t: t.reshape(-1))])


def _positions(x: Tensor, path: FastPath, embedding: bool = False) -> Tensor:
    """Returns (b, s, d) from (b, ..., d); convolutions keep their shape; tokens get a last dimension of 1."""
    if not path.flat:
        return x
    if embedding:
        return x.reshape(x.shape[0], -1, 1)
    return x.reshape(x.shape[0], -1, x.shape[-1]) if x.dim() > 2 else x.reshape(x.shape[0], 1, -1)
