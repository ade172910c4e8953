"""A loop in the shape of word_language_model's Transformer: sequence-first, a mask kept as an attribute, plain SGD."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hessprobe as hp
from tests.any_loop.public_shapes.recurrent import BATCH, BPTT, TOKENS, WIDTH, batchify, get_batch
from tests.any_loop.public_shapes.watching import Trained, Watch


class PositionalEncoding(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        position = torch.arange(BPTT)[:, None]
        rate = torch.exp(torch.arange(0, WIDTH, 2) * (-math.log(100.0) / WIDTH))
        pe = torch.stack((torch.sin(position * rate), torch.cos(position * rate)), dim=-1)
        self.register_buffer("pe", pe.flatten(1)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x + self.pe[: x.shape[0]])


class TransformerModel(nn.Module):
    """The causal mask is made for the length that comes, and kept in a plain attribute until another length comes."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.src_mask: Tensor | None = None
        self.pos_encoder = PositionalEncoding(dropout)
        self.input_emb = nn.Embedding(TOKENS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.Linear(WIDTH, TOKENS)

    def forward(self, src: Tensor) -> Tensor:
        if self.src_mask is None or self.src_mask.size(0) != len(src):
            self.src_mask = torch.log(torch.tril(torch.ones(len(src), len(src), dtype=torch.float64)))
        x = self.pos_encoder(self.input_emb(src) * math.sqrt(WIDTH))
        return F.log_softmax(self.decoder(self.encoder(x, mask=self.src_mask)), dim=-1)


def train(folder: Path, watch: Watch, *, dropout: float = 0.0, **probes: Any) -> Trained:
    lr, clip = 0.5, 0.25
    model = TransformerModel(dropout).double()
    criterion = nn.NLLLoss()
    train_data = batchify(torch.randint(TOKENS, (BATCH * (4 * BPTT - 1),)), BATCH)
    recorder = hp.Recorder(  # added
        folder, model, targets=lambda batch: batch[1].view_as(batch[0]), batch_first=False, **probes
    )
    model.train()
    for batch, i in enumerate(range(0, train_data.size(0) - 1, BPTT)):
        data, targets = get_batch(train_data, i)
        model.zero_grad()
        output = model(data).view(-1, TOKENS)
        loss = criterion(output, targets)
        watch(model, (data, targets), loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for p in model.parameters():
            p.data.add_(p.grad, alpha=-lr)  # type: ignore[arg-type]
        recorder(batch, (data, targets), loss=loss)  # added
    recorder.close()  # added
    return Trained(model, [])
