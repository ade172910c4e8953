"""Gram matrices of all sketches, added up block by block from pieces of their gradients; the pieces are freed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hessprobe.kernels import features
from hessprobe.kernels.features import FastPath, Piece, prefers_tokens, token_gram
from hessprobe.kernels.plan import Tap
from hessprobe.machine.devices import sent
from hessprobe.machine.processes import ALONE, Processes


@dataclass(kw_only=True)
class Held:
    """What one tap has gathered: inputs per micro-batch, output gradients per micro-batch and round."""

    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)


class Grams:
    """Kernels K_i (l, m, m) and alignments <w^m_i, v_i> (l, m) that grow by a piece of a parameter at a time.

    Args:
        group: into which kernel each parameter's share goes.
        sketches: m.
        along: for each vector, its part at each parameter.
        like: a tensor of the device and precision that pieces are made in.
        memory: bytes; a piece and what it is made of stay far below.
        processes, counts: who has sketches, and how many each: m together. Every one adds the same pieces in the same
            order, its own rows of them; a piece's columns are divided over them, and `total` adds up what they found.
    """

    def __init__(
        self,
        group: Mapping[str, int],
        sketches: int,
        along: Mapping[str, Mapping[str, Tensor]],
        like: Tensor,
        memory: int,
        processes: Processes = ALONE,
        counts: Sequence[int] = (),
    ) -> None:
        self.group, self.along = group, along
        self.processes, self.counts = processes, counts
        self.device, self.dtype = like.device, like.dtype
        layers = max(group.values()) + 1
        self.kernel = torch.zeros(layers, sketches, sketches, dtype=torch.float64, device=self.device)
        self.alignment = {
            name: torch.zeros(layers, sketches, dtype=torch.float64, device=self.device) for name in along
        }
        # Entries of a piece for one sketch. The piece, a copy and its parts together take an eighth of the memory.
        most = min(features.PIECE, memory // (8 * self.dtype.itemsize))
        self._width = max(1, most // max(counts, default=sketches))

    def add_tap(self, tap: Tap, held: Held) -> None:
        """Adds the share of a tap's parameters."""
        embedded = tap.path.name == "embedding"
        inputs, gradients = [], []
        for a, rounds in zip(held.inputs, held.gradients, strict=True):
            a = _positions(sent(a, self.device), tap.path, embedding=embedded)
            a = a if embedded else a.to(self.dtype)
            for g in rounds:
                inputs.append(a)
                gradients.append(_positions(sent(g, self.device).to(self.dtype), tap.path))
        shared = self._occurring(inputs) if embedded else None
        for own, name in tap.names.items():
            if own == "weight" and self._by_tokens(tap, inputs, gradients):
                self._add(name, token_gram(inputs, gradients))
                continue
            streams = [
                tap.path.parameters[own](tap.module, a, g, shared, self._width)
                for a, g in zip(inputs, gradients, strict=True)
            ]
            for pieces in zip(*streams, strict=True):
                self.add_pieces(name, pieces)

    def add_pieces(self, name: str, pieces: Sequence[Piece]) -> None:
        """Adds a piece of one parameter's gradients, given for all sketches in order."""
        rows = torch.cat([piece.rows for piece in pieces]) if len(pieces) > 1 else pieces[0].rows
        rows, columns = self.processes.exchanged(rows, self.counts)
        self._add(name, rows @ rows.mT)
        for key, vectors in self.along.items():
            v = pieces[0].pick(vectors[name])[columns].to(rows)
            self.alignment[key][self.group[name]] += rows @ v

    def total(self) -> None:
        """Adds up what the processes have found, each on its columns."""
        self.kernel, *alignments = self.processes.total(self.kernel, *self.alignment.values())
        self.alignment = dict(zip(self.alignment, alignments, strict=True))

    def _occurring(self, inputs: list[Tensor]) -> Tensor:
        """Returns the tokens that occur in any process's inputs, ascending: all line their columns up by them."""
        own = torch.unique(torch.cat([a.reshape(-1) for a in inputs]))
        if self.processes.count == 1:
            return own
        return torch.unique(torch.cat(self.processes.gathered(own.cpu()))).to(own.device)

    def _by_tokens(self, tap: Tap, inputs: list[Tensor], gradients: list[Tensor]) -> bool:
        if tap.path.name != "linear" or self.along or self.processes.count > 1:
            return False  # with other processes' sketches this form takes their inputs and output gradients whole
        a, g = inputs[0], gradients[0]
        same = all(x.shape[1] == a.shape[1] for x in inputs)
        return same and prefers_tokens(self.kernel.shape[1], a.shape[1], a.shape[-1], g.shape[-1])

    def _add(self, name: str, gram: Tensor) -> None:
        self.kernel[self.group[name]] += gram


def _positions(x: Tensor, path: FastPath, embedding: bool = False) -> Tensor:
    """Returns (b, s, d) from (b, ..., d); convolutions keep their shape; tokens get a last dimension of 1."""
    if not path.flat:
        return x
    if embedding:
        return x.reshape(x.shape[0], -1, 1)
    return x.reshape(x.shape[0], -1, x.shape[-1]) if x.dim() > 2 else x.reshape(x.shape[0], 1, -1)
