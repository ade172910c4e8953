"""One backward pass, every block's per-sequence gradients: formed at a module, turned into Gram matrices, freed.

For block i and sketches m = (sequence, round), K_i[m, m'] = <w^m_i, w^m'_i> needs no P x M storage: a module's inputs
and its outputs' gradients give its share. Parameters whose modules offer no such path (used twice, tied, bare, custom)
are differentiated one sequence at a time. Which way each took is known, and each way is checked once per plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.kernels.features import FastPath, Piece, fast_path_of, prefers_tokens, token_gram
from hessprobe.problem.objective import Batch, Objective, measuring, with_parameters
from hessprobe.problem.partition import Partition

DEFAULT_MEMORY = 2**31
ONE_SEQUENCE, MASKED = "one sequence at a time", "whole batch, one sequence's loss at a time"
# (micro-batch's number, outputs (n, c), targets) -> cotangents (n, c), each token's scaled to its sequence.
Cotangents = Callable[[int, Tensor, Tensor], Tensor]
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Tap:
    """A module whose parameters' per-sequence gradients come from its inputs and its outputs' gradients."""

    module: nn.Module
    path: FastPath
    names: Mapping[str, str]  # the parameter's name in the module -> in the model


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which parameters are measured which way.

    Attributes:
        taps: fast paths.
        fallback: parameters differentiated sequence by sequence.
        how: ONE_SEQUENCE or MASKED, the fallback's way.
    """

    taps: tuple[Tap, ...]
    fallback: tuple[str, ...]
    how: str = ONE_SEQUENCE

    @property
    def routes(self) -> dict[str, str]:
        """The way of each parameter, by name."""
        fast = {name: tap.path.name for tap in self.taps for name in tap.names.values()}
        return {**fast, **{name: self.how for name in self.fallback}}


@dataclass(kw_only=True)
class Held:
    """What one tap has gathered: inputs per micro-batch, output gradients per micro-batch and round."""

    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)


def first_plan(objective: Objective, partition: Partition) -> Plan:
    """Returns the plan by types alone: every module with a fast path whose parameters are its own."""
    model = objective.model
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    names = {id(p): name for name, p in model.named_parameters()}
    taps, covered = [], set()
    for module in model.modules():
        own = {n: p for n, p in module.named_parameters(recurse=False) if names.get(id(p)) in partition.names}
        path = fast_path_of(module)
        if own and path is not None and all(users[id(p)] == 1 for p in own.values()):
            found = {n: names[id(p)] for n, p in own.items()}
            taps.append(Tap(module=module, path=path, names=found))
            covered.update(found.values())
    rest = tuple(name for name in partition.names if name not in covered)
    return Plan(taps=tuple(taps), fallback=rest)


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

        with _watched(self.objective.model):
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
                self.plan = _without(self.plan, {id(refused.tap)})
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
            z = _outputs(self.objective, batch, self.autocast)
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


class NotOneCall(UserError):
    """A tap's module was not called once, with the sequences first: its parameters need the fallback."""

    def __init__(self, tap: Tap) -> None:
        super().__init__(
            f"the {type(tap.module).__name__} of {', '.join(tap.names.values())} was not called exactly once with the "
            "batch's sequences first, as when the plan was made; make the plan on this batch: "
            "verified_plan(objective, batch, partition)"
        )
        self.tap = tap


@contextmanager
def _watched(model: nn.Module) -> Iterator[None]:
    """Measures, and eagerly: a compiled block would not see the hooks."""
    with measuring(model, forward_mode=False), torch.compiler.set_stance("force_eager"):
        yield


def _outputs(objective: Objective, batch: Batch, autocast: torch.dtype | None) -> Tensor:
    device = next(objective.model.parameters()).device.type
    with torch.autocast(device, autocast, enabled=autocast is not None):
        return objective.outputs(batch)


def sequence_gradients(
    objective: Objective,
    batch: Batch,
    partition: Partition,
    theta: Mapping[str, Tensor] | None,
    names: Sequence[str],
    cotangents: Sequence[Tensor],
    how: str,
    autocast: torch.dtype | None = None,
) -> list[list[Tensor]]:
    """Returns each sketch's gradients of the named parameters, rounds first, then sequences.

    Cost: about a gradient a round one sequence at a time; a gradient a sketch where the whole batch must run.
    """
    count, _ = objective.sequence_shape(batch)
    leaves = objective.leaves(partition, theta, names)
    inputs = [leaves[name] for name in names]
    found: list[list[list[Tensor]]] = [[] for _ in cotangents]

    def pulled(z: Tensor, cotangent: Tensor, keep: bool) -> list[Tensor]:
        if not z.requires_grad:
            return [torch.zeros_like(x) for x in inputs]
        grads = torch.autograd.grad(z, inputs, cotangent, retain_graph=keep, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]

    def passes() -> None:
        whole = _outputs(objective, batch, autocast) if how == MASKED else None
        for b in range(count):
            part = _outputs(objective, _slice(batch, b, count), autocast) if whole is None else whole
            for r, cotangent in enumerate(cotangents):
                own = cotangent.view(count, -1, cotangent.shape[-1])
                if whole is None:
                    found[r].append(pulled(part, own[b], r < len(cotangents) - 1))
                else:
                    masked = torch.zeros_like(own)
                    masked[b] = own[b]
                    found[r].append(pulled(part, masked.view_as(cotangent), True))

    with_parameters(objective.model, leaves, passes)
    return [sketch for rounds in found for sketch in rounds]


def _slice(batch: Batch, b: int, count: int) -> Batch:
    """Returns sequence b of a batch: of every tensor in it whose first dimension counts the sequences."""

    def cut(x: object) -> object:
        return x[b : b + 1] if isinstance(x, Tensor) and x.dim() and x.shape[0] == count else x

    if isinstance(batch, Mapping):
        return {key: cut(value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(cut(x) for x in batch)
    raise UserError(f"cannot take single sequences from a batch of type {type(batch).__name__}")


def _positions(x: Tensor, path: FastPath, embedding: bool = False) -> Tensor:
    """Returns (b, s, d) from (b, ..., d); convolutions keep their shape; tokens get a last dimension of 1."""
    if not path.flat:
        return x
    if embedding:
        return x.reshape(x.shape[0], -1, 1)
    return x.reshape(x.shape[0], -1, x.shape[-1]) if x.dim() > 2 else x.reshape(x.shape[0], 1, -1)


def verified_plan(
    objective: Objective, batch: Batch, partition: Partition, parameters: Tensor | None = None
) -> Plan:
    """Returns a plan in which every fast path has shown one sequence's true gradient, and no other sequence's.

    The loss of a single sequence is pulled back through the taps and by autograd: each tap's diagonal entry of K must
    be its parameters' squared gradient norm, and zero for every other sequence. What fails falls back. Cost: about 2
    gradients, once; hand the plan to later calls on the same model.
    """
    plan = first_plan(objective, partition)
    theta = _shaken(objective, partition, parameters)
    count, positions = objective.sequence_shape(batch)
    valid = objective.loss_function.valid(objective.targets(batch)).view(count, positions)
    chosen = int(valid.sum(1).argmax())
    generator = torch.Generator().manual_seed(0)

    def one_sequence(number: int, z: Tensor, targets: Tensor) -> Tensor:
        noise = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)
        only = torch.zeros_like(noise).view(count, positions, -1)
        only[chosen] = noise.view(count, positions, -1)[chosen] * valid[chosen, :, None]
        return only.view_as(noise)

    state = generator.get_state()
    numbers = {name: i for i, name in enumerate(partition.names)}
    while True:
        taps_alone = Plan(taps=plan.taps, fallback=())
        stream = Stream(objective, partition, taps_alone, theta=theta, groups=numbers)
        try:
            stream.run([batch], 1, one_sequence)
            break
        except NotOneCall as refused:
            plan = _without(plan, {id(refused.tap)})
            generator.set_state(state)
    generator.set_state(state)
    with _watched(objective.model):
        truth, cotangent = _true_gradients(objective, batch, partition, theta, one_sequence)
        norms = {n: 0.0 if g is None else float(g.double().square().sum()) for n, g in truth.items()}
        wrong = set()
        assert stream.kernel is not None
        for tap in plan.taps:
            diagonal = sum(stream.kernel[numbers[name]].diagonal() for name in tap.names.values())
            assert isinstance(diagonal, Tensor)
            expected = sum(norms[name] for name in tap.names.values())
            others = float(diagonal.sum() - diagonal[chosen])
            # Rounding may be all there is of a gradient that is zero (a key's bias, say).
            tolerance = 1e-3 * expected + 1e-12 * sum(norms.values())
            if abs(float(diagonal[chosen]) - expected) > tolerance or others > tolerance:
                wrong.add(id(tap))
        plan = _without(plan, wrong)
        if not plan.fallback:
            # For what a later batch may add: slower, but it needs no proof.
            return Plan(taps=plan.taps, fallback=(), how=MASKED)
        try:
            own = sequence_gradients(
                objective, batch, partition, theta, plan.fallback, [cotangent], ONE_SEQUENCE
            )[chosen]
            agree = True
            for mine, name in zip(own, plan.fallback, strict=True):
                g = truth[name]
                gap = mine if g is None else mine - g
                agree &= float(gap.double().square().sum()) <= 1e-6 * norms[name] + 1e-12 * sum(
                    norms.values()
                )
        except (RuntimeError, UserError, ValueError, IndexError):
            agree = False
    return Plan(taps=plan.taps, fallback=plan.fallback, how=ONE_SEQUENCE if agree else MASKED)


def _shaken(objective: Objective, partition: Partition, parameters: Tensor | None) -> dict[str, Tensor]:
    """Returns parameters near the given ones where no gradient vanishes (a zero initialisation proves nothing)."""
    theta = partition.vector(objective.model) if parameters is None else parameters.detach()
    generator = torch.Generator(theta.device).manual_seed(0)
    noise = torch.randn(theta.shape, generator=generator, dtype=theta.dtype, device=theta.device)
    return partition.unflatten(torch.add(theta, noise, alpha=0.01))


def _true_gradients(
    objective: Objective,
    batch: Batch,
    partition: Partition,
    theta: Mapping[str, Tensor],
    cotangents: Cotangents,
) -> tuple[dict[str, Tensor | None], Tensor]:
    """Returns J^T c by parameter, straight from autograd (None where the outputs do not depend on it), and c."""
    leaves = objective.leaves(partition, theta)

    def once() -> tuple[dict[str, Tensor | None], Tensor]:
        z = objective.outputs(batch)
        if not z.requires_grad:
            raise UserError(
                f"{type(objective.model).__name__}: its outputs do not depend on any of its {len(leaves)} trainable "
                "parameters through autograd; look for detach(), no_grad() or an argmax on the way to them"
            )
        cotangent = cotangents(0, z.detach(), objective.targets(batch))
        grads = torch.autograd.grad(z, list(leaves.values()), cotangent, allow_unused=True)
        return dict(zip(leaves, grads, strict=True)), cotangent

    return with_parameters(objective.model, leaves, once)


def _without(plan: Plan, refused: set[int]) -> Plan:
    dropped = [name for tap in plan.taps if id(tap) in refused for name in tap.names.values()]
    kept = tuple(tap for tap in plan.taps if id(tap) not in refused)
    return Plan(taps=kept, fallback=(*plan.fallback, *dropped), how=plan.how)
