"""A loop in the shape of x-transformers': a wrapper that takes ids alone, shifts them inside and returns the loss."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hessprobe as hp
from tests.any_loop.public_shapes.watching import Trained, Watch

VOCABULARY, LENGTH, WIDTH, HEADS, DEPTH = 7, 6, 4, 2, 2


class ScaleNorm(nn.Module):
    """One scale for all of a vector, a bare parameter without dimensions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.tensor(width**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-5) * self.g * x.shape[-1]


class RotaryEmbedding(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 100 ** (torch.arange(0, size, 2) / size))

    def forward(self, length: int) -> Tensor:
        angles = torch.outer(torch.arange(length).to(self.inv_freq), self.inv_freq)
        return torch.stack((angles, angles), dim=-1).flatten(-2)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    return x * angles.cos() + turned * angles.sin()


class Attention(nn.Module):
    """Every query also sees a learned key and value that belong to no position."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.mem_k, self.mem_v = (nn.Parameter(torch.randn(HEADS, 1, WIDTH // HEADS)) for _ in range(2))
        self.to_out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        q, k = rotate(q, angles), rotate(k, angles)
        k, v = (torch.cat((m.expand(b, -1, -1, -1), s), dim=2) for m, s in ((self.mem_k, k), (self.mem_v, v)))
        later = torch.ones(t, t, dtype=torch.bool).triu(1)
        dots = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
        dots = dots.masked_fill(F.pad(later, (1, 0), value=False), -torch.finfo(dots.dtype).max)
        return self.to_out((dots.softmax(-1) @ v).transpose(1, 2).flatten(2))


class GLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class ShiftTokens(nn.Module):
    """Half of the features come from the position before."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        here, before = x.chunk(2, dim=-1)
        return self.fn(torch.cat((here, F.pad(before, (0, 0, 1, -1))), dim=-1))


class AttentionLayers(nn.Module):
    """One flat list: norm and attention, norm and feedforward, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary_pos_emb = RotaryEmbedding(WIDTH // HEADS)
        self.layers = nn.ModuleList([])
        for _ in range(DEPTH):
            feedforward = nn.Sequential(GLU(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
            self.layers.append(nn.ModuleList([ScaleNorm(WIDTH), Attention()]))
            self.layers.append(nn.ModuleList([ScaleNorm(WIDTH), ShiftTokens(feedforward)]))
        self.final_norm = ScaleNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        angles = self.rotary_pos_emb(x.shape[1])
        for i, (norm, layer) in enumerate(self.layers):  # type: ignore[misc]
            x = x + (layer(norm(x), angles) if i % 2 == 0 else layer(norm(x)))
        return self.final_norm(x)


class TransformerWrapper(nn.Module):
    """Learned memory tokens stand before the sequence and leave before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(VOCABULARY, WIDTH)
        self.memory_tokens = nn.Parameter(torch.randn(1, WIDTH))
        self.attn_layers = AttentionLayers()
        self.to_logits = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_emb(x)
        x = torch.cat((self.memory_tokens.expand(x.shape[0], -1, -1), x), dim=1)
        return self.to_logits(self.attn_layers(x)[:, 1:])


class AutoregressiveWrapper(nn.Module):
    def __init__(self, net: nn.Module, ignore_index: int = -100) -> None:
        super().__init__()
        self.net = net
        self.ignore_index = ignore_index

    def forward(self, x: Tensor) -> Tensor:
        inp, target = x[:, :-1], x[:, 1:]
        target = target.masked_fill(target == self.ignore_index, self.ignore_index)
        return F.cross_entropy(self.net(inp).transpose(1, 2), target, ignore_index=self.ignore_index)


def cycle(sequences: Tensor, size: int) -> Iterator[Tensor]:
    """Yields batches of ids, one bare tensor each, for ever."""
    while True:
        for ids in sequences[torch.randperm(len(sequences))].split(size):
            yield ids.long()


def train(folder: Path, watch: Watch, **probes: Any) -> Trained:
    model = AutoregressiveWrapper(TransformerWrapper()).double()
    train_loader = cycle(torch.randint(VOCABULARY, (40, LENGTH + 1)), 4)
    optim = torch.optim.Adam(model.parameters(), lr=1e-2)
    recorder = hp.Recorder(  # added
        folder, model, optimizer=optim, forward=lambda model, ids: model.net(ids[:, :-1]),
        targets=lambda ids: ids[:, 1:], **probes,
    )  # fmt: skip
    for i in range(4):
        model.train()
        ids = next(train_loader)
        loss = model(ids)
        watch(model, ids, loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optim.step()
        optim.zero_grad()
        recorder(i, ids, loss=loss)  # added
    recorder.close()  # added
    return Trained(model, [optim])
