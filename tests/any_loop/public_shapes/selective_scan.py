"""A loop in the shape of mamba-minimal's: a selective scan step by step, bare parameters, a depthwise convolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hessprobe as hp
from tests.any_loop.public_shapes.watching import Trained, Watch

VOCABULARY, LENGTH, WIDTH, INNER, STATES, RANK, LAYERS = 7, 6, 4, 6, 3, 1, 2


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class MambaBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(WIDTH, 2 * INNER, bias=False)
        self.conv1d = nn.Conv1d(INNER, INNER, 3, groups=INNER, padding=2)
        self.x_proj = nn.Linear(INNER, RANK + 2 * STATES, bias=False)
        self.dt_proj = nn.Linear(RANK, INNER)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, STATES + 1).repeat(INNER, 1)))
        self.D = nn.Parameter(torch.ones(INNER))
        self.out_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, res = self.in_proj(x).split([INNER, INNER], dim=-1)
        x = self.conv1d(x.transpose(1, 2))[:, :, : x.shape[1]].transpose(1, 2)
        x = F.silu(x)
        return self.out_proj(self.ssm(x) * F.silu(res))

    def ssm(self, x: Tensor) -> Tensor:
        delta, B, C = self.x_proj(x).split([RANK, STATES, STATES], dim=-1)
        delta = F.softplus(self.dt_proj(delta))
        decay = torch.exp(torch.einsum("btd,dn->btdn", delta, -torch.exp(self.A_log)))
        given = torch.einsum("btd,btn,btd->btdn", delta, B, x)
        state = torch.zeros_like(given[:, 0])
        ys = []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + given[:, t]
            ys.append(torch.einsum("bdn,bn->bd", state, C[:, t]))
        return torch.stack(ys, dim=1) + x * self.D


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = MambaBlock()
        self.norm = RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(self.norm(x)) + x


class Mamba(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([ResidualBlock() for _ in range(LAYERS)])
        self.norm_f = RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm_f(x))


def train(folder: Path, watch: Watch, **probes: Any) -> Trained:
    model = Mamba().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recorder = hp.Recorder(folder, model, optimizer=optimizer, **probes)  # added
    for step in range(4):
        ids = torch.randint(VOCABULARY, (4, LENGTH + 1))
        inputs, targets = ids[:, :-1], ids[:, 1:]
        logits = model(inputs)
        loss = F.cross_entropy(logits.reshape(-1, VOCABULARY), targets.reshape(-1))
        watch(model, (inputs, targets), loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recorder(step, (inputs, targets), loss=loss)  # added
    recorder.close()  # added
    return Trained(model, [optimizer])
