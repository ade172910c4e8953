"""One backward pass, every block's per-sequence gradients: formed at a module, turned into Gram matrices, freed.

For block i and sketches m = (sequence, round), K_i[m, m'] = <w^m_i, w^m'_i> needs no P x M storage: a module's inputs
and its outputs' gradients give its share. Parameters whose modules offer no such path (used twice, tied, bare, custom)
are differentiated one sequence at a time. A pair needs both its sketches at once: what does not fit in the memory
together is left to another sweep over the same passes, so that no pair is ever dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hessprobe.curvature import cost
from hessprobe.kernels.features import Piece
from hessprobe.kernels.grams import Grams, Held
from hessprobe.kernels.passes import Seen, forward_and_backward
from hessprobe.kernels.plan import MASKED, Plan, Tap
from hessprobe.kernels.sequence_gradients import Stretch, outputs_of, sequence_gradients, watched, within
from hessprobe.machine.devices import put_by
from hessprobe.problem.leaves import Leaves
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.problem.shares import is_sharded

DEFAULT_MEMORY = 2**31
# Bytes of main memory that a process's passes on a GPU may fill beside; torch, which rounds pinned sizes up to powers of
# two, may take twice as many.
HOST_MEMORY = 2**33
# (micro-batch's number, round, outputs (n, c), targets) -> cotangents (n, c), each token's scaled to its sequence; the
# same whenever it is asked for the same.
Cotangents = Callable[[int, int, Tensor, Tensor], Tensor]


class Stream:
    """Gathers Gram matrices of one theta over micro-batches and rounds.

    Of several processes (`objective.processes`) each runs micro-batches of its own, and all take the same taps in the same
    sweeps, since a piece of a gradient is handed around as soon as it is there.

    Args:
        objective, partition: what is differentiated.
        plan: the way of each parameter.
        groups: into which kernel each parameter's share goes; one a block unless said otherwise.
        along: vectors (p,) by name, whose inner products with every sketch are wanted.
        memory: bytes of inputs, output gradients and the fallback's gradients held at once (one module's, or as many
            as one sequence's gradient of one parameter, in any case).
        host_memory: bytes of inputs and output gradients that may lie in main memory beside these, before the rest is left
            to another sweep.
        autocast: run the model under torch.autocast of this type; Gram matrices stay in float32.

    After `run`, `gradients` is what it cost, in gradients of all micro-batches.
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
        host_memory: int = 0,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.objective, self.partition, self.plan, self.theta = objective, partition, plan, theta
        self.memory, self.host_memory, self.autocast = memory, host_memory, autocast
        self.along = {name: partition.unflatten(vector) for name, vector in (along or {}).items()}
        order = {block: i for i, block in enumerate(partition.blocks)}
        self.group = groups or {slot.name: order[slot.block] for slot in partition.slots}
        first = next(objective.model.parameters())
        dtype = first.dtype if first.dtype in (torch.float32, torch.float64) else torch.float32
        self.like = torch.empty(0, dtype=dtype, device=first.device)
        self.sharded = is_sharded(objective.model)
        self.gradients = 0.0

    def run(self, batches: MicroBatches, rounds: int, cotangents: Cotangents) -> Grams:
        """Returns kernels and alignments for sketches m = (micro-batch, round, sequence), in that order.

        Args:
            batches: this process's; one sequence at least. The sketches are those of all processes, one after another.

        Raises:
            NotOneCall: a tap that some batch calls otherwise than once.
        """
        self.batches, self.rounds, self.cotangents = batches, rounds, cotangents
        self.sequences = batches.counts
        self.places = [count * positions for count, positions in batches.shapes]
        processes = self.objective.processes
        everyone = processes.gathered(self.sequences)
        self.several = max(len(sequences) for sequences in everyone) > 1
        rows = [sum(sequences) * rounds for sequences in everyone]
        # With sharded parameters a pass needs all processes: those with fewer sequences repeat one.
        self.passes = [max(at) for at in zip(*everyone, strict=True)] if self.sharded else self.sequences
        self.sketches = max(rows)  # that any process holds
        self.grams = Grams(self.group, sum(rows), self.along, self.like, self.memory, processes, rows)
        sizes = {slot.name: slot.stop - slot.start for slot in self.partition.slots}
        # Whatever the bound, as much as one gradient of the largest: that exists in any case.
        self.least = -(-max([sizes[name] for name in self.plan.fallback], default=0) // self.sketches)
        taps = list(self.plan.taps)
        rest = [Stretch(name=name, start=0, stop=sizes[name]) for name in self.plan.fallback]
        with watched(self.objective.model, self.autocast):
            while taps or rest:
                taps, rest = self._sweep(taps, rest)
        self.grams.total()
        return self.grams

    def leaves(self) -> Leaves:
        """Returns the parameters for one micro-batch's passes."""
        tapped = {name for tap in self.plan.taps for name in tap.names.values()}
        bare = [name for name in self.partition.names if name not in tapped]
        return Leaves(self.objective, self.partition, self.theta, bare if self.sharded else ())

    def anchors(self, leaves: Leaves) -> list[Tensor]:
        """Returns the parameters without a tap where they ask for gradients: graphs begin at them too."""
        return [leaves[name] for name in leaves.wanted]

    def share(self, number: int) -> float:
        """Returns which part of all sequences is in this micro-batch."""
        return self.sequences[number] / sum(self.sequences)

    def _sweep(self, taps: list[Tap], rest: list[Stretch]) -> tuple[list[Tap], list[Stretch]]:
        """Runs every micro-batch once, for as many of the taps and stretches as fit; returns those left over."""
        sweep = _Sweep(self, taps)
        taken: list[Stretch] = []
        rows, start = self.like, 0
        for number in range(len(self.batches)):
            drawn = sweep.run(number)
            if number == 0:
                left = self.memory - min(sweep.bytes, self.memory)
                entries = left // (self.sketches * self.like.itemsize)
                taken, rest = within(entries, rest, least=0 if sweep.taps else self.least)
                own = sum(self.sequences) * self.rounds
                rows = self.like.new_empty(own, sum(stretch.size for stretch in taken))
            if taken:
                self._fall_back(number, drawn, taken, rows[start:])
            start += self.sequences[number] * self.rounds
        if taken:
            for stretch, part in zip(taken, rows.split([s.size for s in taken], 1), strict=True):
                self.grams.add_pieces(stretch.name, [Piece(rows=part, pick=stretch.of)])
        return sweep.left, rest

    def _fall_back(self, number: int, drawn: list[Tensor], taken: list[Stretch], rows: Tensor) -> None:
        """Fills (m, q) rows with these stretches' gradients, sequence by sequence: exact for any model, and slower."""
        count = self.sequences[number]

        def found(r: int, b: int, gradients: Mapping[str, Tensor]) -> None:
            start = 0
            for stretch in taken:
                rows[r * count + b, start : start + stretch.size] = stretch.of(gradients[stretch.name])
                start += stretch.size

        sequence_gradients(
            self.objective,
            self.batches[number],
            self.partition,
            self.theta,
            tuple(stretch.name for stretch in taken),
            drawn,
            self.plan.how,
            self.autocast,
            found=found,
            among=[*[0] * (self.passes[number] - count), *range(count)],  # what is repeated is overwritten
        )
        backward = self.rounds * (count if self.plan.how == MASKED else 1)
        self.gradients += self.share(number) * cost.passes(1, 2 * backward)


class _Sweep:
    """One way through all micro-batches, for those taps whose inputs and gradients fit in the memory together.

    Attributes:
        taps, left: those taken and the others, known after the first micro-batch's forward pass.
        bytes: what the taps taken will hold.
    """

    def __init__(self, stream: Stream, taps: list[Tap]) -> None:
        self.stream, self.taps = stream, taps
        self.left: list[Tap] = []
        self.held = {id(tap): Held() for tap in taps}
        self.bytes = 0
        self._on_device = 0

    def run(self, number: int) -> list[Tensor]:
        """Runs one micro-batch and returns the cotangents (n, c) of each round."""
        stream, taps = self.stream, list(self.taps)
        if taps and stream.sharded:
            # Their parameters ask for gradients, so a graph must begin at any of them.
            taps = list(stream.plan.taps)
        batch, last = stream.batches[number], number == len(stream.batches) - 1
        draws = [lambda z, y, r=r: stream.cotangents(number, r, z, y) for r in range(stream.rounds)]
        leaves = stream.leaves()

        def forwarded(seen: Mapping[int, Seen]) -> None:
            if number == 0:
                self._choose(seen)
            for tap in self.taps:
                self.held[id(tap)].inputs.append(seen[id(tap)].inputs)
                self.held[id(tap)].gradients.append([])

        def arrived(tap: Tap, gradient: Tensor) -> None:
            mine = self.held.get(id(tap))
            if mine is None:  # left to another sweep
                return
            mine.gradients[number].append(gradient)
            if last and len(mine.gradients[number]) == stream.rounds:
                stream.grams.add_tap(tap, mine)
                del self.held[id(tap)]
            else:
                mine.gradients[number][-1] = self._kept(gradient)

        def passes() -> list[Tensor]:
            if taps:
                return forward_and_backward(
                    stream.objective,
                    batch,
                    number,
                    taps,
                    draws,
                    dtype=stream.like.dtype,
                    forwarded=forwarded,
                    arrived=arrived,
                    autocast=stream.autocast,
                    anchors=lambda: stream.anchors(leaves),
                )
            with torch.no_grad():  # the fallback's cotangents depend on the outputs
                z = outputs_of(stream.objective, batch, stream.autocast)
            fixed, targets = z.to(stream.like.dtype), stream.objective.targets(batch)
            return [draw(fixed, targets).to(z.dtype) for draw in draws]

        drawn = leaves.run(passes)
        if not last:
            kept: dict[tuple[object, ...], Tensor] = {}  # several modules may have read one tensor
            for mine in self.held.values():
                a = mine.inputs[-1]
                key = (a.data_ptr(), a.shape, a.stride(), a.dtype)
                if key not in kept:
                    kept[key] = self._kept(a)
                mine.inputs[-1] = kept[key]
        here = len(self.taps) / max(1, len(stream.plan.taps))
        backward = stream.rounds * ((1 + here) if taps else 0)  # activations' whole, weights' for these taps
        stream.gradients += stream.share(number) * cost.passes(1, backward)
        return drawn

    def _choose(self, seen: Mapping[int, Seen]) -> None:
        """Settles which taps this sweep takes: in order, those that still fit, and one at least."""
        stream = self.stream
        if not stream.several and stream.rounds == 1:
            return  # each gradient is used as it arrives
        scale = sum(stream.places) / stream.places[0]
        mine = [seen[id(tap)] for tap in self.taps]
        needs = [
            [one.output_bytes * stream.rounds * scale, one.inputs.nbytes * scale * stream.several]
            for one in mine
        ]
        # The same choice in every process: by what it takes where it takes most.
        needs = stream.objective.processes.most(torch.tensor(needs, dtype=torch.float64)).tolist()
        taken, known = [], set()
        for tap, one, (outputs, inputs) in zip(self.taps, mine, needs, strict=True):
            need = outputs + (inputs if one.inputs.data_ptr() not in known else 0)
            if taken and self.bytes + need > stream.memory + stream.host_memory:
                self.left.append(tap)
                del self.held[id(tap)]
                continue
            taken.append(tap)
            known.add(one.inputs.data_ptr())
            self.bytes += int(need)
        self.taps = taken

    def _kept(self, tensor: Tensor) -> Tensor:
        """Returns the tensor, in main memory where the device's share is spent."""
        if not self.stream.host_memory or self._on_device + tensor.nbytes <= self.stream.memory:
            self._on_device += tensor.nbytes
            return tensor
        return put_by(tensor)
