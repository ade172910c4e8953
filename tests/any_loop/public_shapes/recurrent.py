"""A loop in the shape of word_language_model: a sequence-first LSTM whose state is carried on, and no optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hessprobe as hp
from tests.any_loop.public_shapes.watching import Trained, Watch

TOKENS, WIDTH, LAYERS, BATCH, BPTT = 6, 4, 2, 4, 5
Hidden = tuple[Tensor, Tensor]


class RNNModel(nn.Module):
    """Outputs are logarithms of probabilities, positions and sequences flattened into one dimension."""

    def __init__(self, dropout: float, tied: bool) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(TOKENS, WIDTH)
        self.rnn = nn.LSTM(WIDTH, WIDTH, LAYERS, dropout=dropout)
        self.decoder = nn.Linear(WIDTH, TOKENS)
        if tied:
            self.decoder.weight = self.encoder.weight

    def forward(self, input: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        output, hidden = self.rnn(self.drop(self.encoder(input)), hidden)
        decoded = self.decoder(self.drop(output)).view(-1, TOKENS)
        return F.log_softmax(decoded, dim=1), hidden

    def init_hidden(self, size: int) -> Hidden:
        weight = next(self.parameters())
        return weight.new_zeros(LAYERS, size, WIDTH), weight.new_zeros(LAYERS, size, WIDTH)


def batchify(data: Tensor, size: int) -> Tensor:
    """Returns the text in so many columns, (t, b)."""
    length = len(data) // size
    return data[: length * size].view(size, -1).t().contiguous()


def get_batch(source: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """Returns (t, b) ids and their (t b,) targets; the last of an epoch is shorter."""
    length = min(BPTT, len(source) - 1 - i)
    return source[i : i + length], source[i + 1 : i + 1 + length].reshape(-1)


def repackage_hidden(hidden: Hidden) -> Hidden:
    return hidden[0].detach(), hidden[1].detach()


def train(
    folder: Path,
    watch: Watch,
    *,
    dropout: float = 0.0,
    tied: bool = True,
    dtype: torch.dtype = torch.float64,
    **probes: Any,
) -> Trained:
    lr, clip = 0.5, 0.25
    model = RNNModel(dropout, tied).to(dtype)
    criterion = nn.NLLLoss()
    train_data = batchify(torch.randint(TOKENS, (BATCH * (4 * BPTT - 1),)), BATCH)
    recorder = hp.Recorder(  # added
        folder, model, forward=lambda model, batch: model(batch[0], batch[2])[0].view(*batch[0].shape, TOKENS),
        targets=lambda batch: batch[1].view_as(batch[0]), batch_first=False, **probes,
    )  # fmt: skip
    model.train()
    hidden = model.init_hidden(BATCH)
    for batch, i in enumerate(range(0, train_data.size(0) - 1, BPTT)):
        data, targets = get_batch(train_data, i)
        model.zero_grad()
        hidden = repackage_hidden(hidden)
        before = hidden  # added
        carried = hidden
        output, hidden = model(data, hidden)
        loss = criterion(output, targets)
        watch(model, (data, targets, carried), loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for p in model.parameters():
            p.data.add_(p.grad, alpha=-lr)  # type: ignore[arg-type]
        recorder(batch, (data, targets, before), loss=loss)  # added
    recorder.close()  # added
    return Trained(model, [])
