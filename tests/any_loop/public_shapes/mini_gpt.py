"""A loop in the shape of minGPT: a Trainer with callbacks over a loader of (x, y), dropout in the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

import hessprobe as hp
from tests.any_loop.public_shapes.watching import Trained, Watch

DIGITS, LENGTH, WIDTH, HEADS, LAYERS = 3, 4, 4, 2, 2


class Sorting(Dataset):
    """Digits, then the same digits sorted; the digits themselves are no targets (-1)."""

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        digits = torch.randint(DIGITS, (LENGTH,), generator=torch.Generator().manual_seed(index))
        both = torch.cat([digits, digits.sort().values])
        y = both[1:].clone()
        y[: LENGTH - 1] = -1
        return both[:-1], y


class CausalSelfAttention(nn.Module):
    """Attention written out, its mask a buffer."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        positions = 2 * LENGTH - 1
        self.register_buffer("bias", torch.tril(torch.ones(positions, positions))[None, None])

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.c_attn(x).split(WIDTH, dim=2)
        )
        att = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf")).softmax(-1)
        y = self.attn_dropout(att) @ v
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class NewGELU(nn.Module):
    """The approximation by tanh, written out."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class Block(nn.Module):
    """The multilayer perceptron is a ModuleDict, and a function kept as an attribute runs it."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = CausalSelfAttention(dropout)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(WIDTH, 2 * WIDTH),
                "c_proj": nn.Linear(2 * WIDTH, WIDTH),
                "act": NewGELU(),
                "dropout": nn.Dropout(dropout),
            }
        )
        m = self.mlp
        self.mlpf = lambda x: m["dropout"](m["c_proj"](m["act"](m["c_fc"](x))))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlpf(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(DIGITS, WIDTH),
                "wpe": nn.Embedding(2 * LENGTH - 1, WIDTH),
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList([Block(dropout) for _ in range(LAYERS)]),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, DIGITS, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        positions = torch.arange(idx.shape[1])[None]
        x = self.transformer["wte"](idx) + self.transformer["wpe"](positions)
        x = self.transformer["drop"](x)
        for block in self.transformer["h"]:  # type: ignore[union-attr]
            x = block(x)
        logits = self.lm_head(self.transformer["ln_f"](x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class Trainer:
    """Trains for some iterations; callbacks run after each, before the count goes up."""

    def __init__(self, model: nn.Module, dataset: Dataset, max_iters: int) -> None:
        self.model, self.dataset, self.max_iters = model, dataset, max_iters
        self.callbacks: defaultdict[str, list[Callable[[Trainer], object]]] = defaultdict(list)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))

    def add_callback(self, onevent: str, callback: Callable[[Trainer], object]) -> None:
        self.callbacks[onevent].append(callback)

    def run(self, watch: Watch) -> None:
        sampler = RandomSampler(self.dataset, replacement=True, num_samples=10**6)  # type: ignore[arg-type]
        loader = DataLoader(self.dataset, sampler=sampler, batch_size=5)
        self.model.train()
        self.iter_num = 0
        data = iter(loader)
        while self.iter_num < self.max_iters:
            batch = [t.to("cpu") for t in next(data)]
            x, y = batch
            _logits, self.loss = self.model(x, y)
            self.batch = batch  # added
            watch(self.model, batch, self.loss)
            self.model.zero_grad(set_to_none=True)
            self.loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            for callback in self.callbacks["on_batch_end"]:
                callback(self)
            self.iter_num += 1


def train(folder: Path, watch: Watch, *, dropout: float = 0.0, **probes: Any) -> Trained:
    model = GPT(dropout).double()
    trainer = Trainer(model, Sorting(), max_iters=4)
    recorder = hp.Recorder(  # added
        folder, model, optimizer=trainer.optimizer, forward=lambda model, batch: model(batch[0])[0],
        targets=lambda batch: batch[1], ignore_index=-1, **probes,
    )  # fmt: skip
    trainer.add_callback("on_batch_end", lambda t: recorder(t.iter_num, t.batch, loss=t.loss))  # added
    trainer.run(watch)
    recorder.close()  # added
    return Trained(model, [trainer.optimizer])
