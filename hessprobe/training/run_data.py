"""Which batches a run reads: minibatches, a probe's own, the held-out ones; and how far it has read."""

from __future__ import annotations

import math

import torch

from hessprobe.instruments.snapshot import Probe
from hessprobe.problem.objective import Batch
from hessprobe.recipe import Recipe
from hessprobe.text.corpus import Corpus
from hessprobe.text.hub_corpus import HubCorpus
from hessprobe.training.checkpoint import DataPosition


class RunData:
    """The batches of one run on its device, each a function of the recipe and a step alone.

    Every process reads all of them, from a Hub's stream too: each knows whole batches, and runs its share.

    Attributes:
        first: the minibatch that each stream begins with.
        held_out: batches for evaluation.
    """

    def __init__(self, recipe: Recipe, corpus: Corpus | HubCorpus, device: torch.device) -> None:
        self.recipe, self.corpus, self.device = recipe, corpus, device
        self.first = {"train": 0, "line_search": 0}
        per_batch, count = held_out_layout(recipe, corpus.context)
        self.held_out = [self._placed(batch) for batch in corpus.held_out_batches(per_batch, count)]

    def place(self, position: DataPosition, *, resumed: bool) -> None:
        """Goes on reading where this run was cut off, or behind what the run before it had read."""
        if resumed:
            self.first |= position.first
        elif position.seed == self.recipe.seed:
            each = self.recipe.optimizer.sequences
            self.first |= {stream: math.ceil(read / each) for stream, read in position.read.items()}
        self.corpus.restore(position.bookmarks)

    def position(self, step: int) -> DataPosition:
        """Returns how far the run has read after so many steps."""
        recipe = self.recipe.optimizer
        counts = {"train": recipe.minibatches, "line_search": recipe.searched}
        read = {
            stream: (self.first[stream] + step * counts[stream]) * recipe.sequences for stream in self.first
        }
        return DataPosition(
            seed=self.recipe.seed, first=self.first, read=read, bookmarks=self.corpus.bookmarks()
        )

    def minibatches(self, stream: str, step: int, count: int) -> list[Batch]:
        """Returns the minibatches of an outer step that takes `count` of them from a stream."""
        first = self.first[stream] + step * count
        return [self._read(stream, first + i, self.recipe.optimizer.sequences) for i in range(count)]

    def of_probe(self, probe: Probe, step: int) -> list[Batch]:
        """Returns what a probe measures on at a step."""
        return [self._read(f"probe/{probe.name}", step, probe.sequences)]

    def _read(self, stream: str, step: int, sequences: int) -> Batch:
        return self._placed(
            self.corpus.batch(seed=self.recipe.seed, step=step, sequences=sequences, stream=stream)
        )

    def _placed(self, batch: tuple[torch.Tensor, torch.Tensor]) -> Batch:
        return batch[0].to(self.device), batch[1].to(self.device)


def held_out_layout(recipe: Recipe, context: int) -> tuple[int, int]:
    """Returns sequences a batch and batches for evaluation: at least data.held_out_sequences in whole batches.

    A batch holds about as many tokens as a minibatch of 64-token windows: without gradients it is small in memory
    even with a large vocabulary.
    """
    wanted = recipe.data.held_out_sequences
    per_batch = max(1, min(recipe.optimizer.sequences * 64 // context + 1, wanted))
    return per_batch, math.ceil(wanted / per_batch)
