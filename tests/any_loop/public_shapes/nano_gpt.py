"""A loop in the shape of nanoGPT: model(X, Y) -> (logits, loss), random blocks of a text, gradient accumulation."""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hessprobe as hp
from tests.any_loop.public_shapes.watching import Trained, Watch

VOCABULARY, CONTEXT, WIDTH, HEADS, LAYERS = 7, 6, 4, 2, 2


class LayerNorm(nn.Module):
    """torch's, with a scale and no shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.c_attn(x).split(WIDTH, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(WIDTH)
        self.attn = CausalSelfAttention()
        self.ln_2 = LayerNorm(WIDTH)
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Embedding and head are one tensor; without targets the head sees the last position alone, and the loss is None."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "wpe": nn.Embedding(CONTEXT, WIDTH),
                "h": nn.ModuleList([Block() for _ in range(LAYERS)]),
                "ln_f": LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.transformer["wte"](idx) + self.transformer["wpe"](torch.arange(idx.shape[1]))
        for block in self.transformer["h"]:  # type: ignore[union-attr]
            x = block(x)
        x = self.transformer["ln_f"](x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def configure_optimizers(self, weight_decay: float, learning_rate: float) -> torch.optim.AdamW:
        """Returns a fused AdamW that decays matrices alone."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def train(
    folder: Path, watch: Watch, *, gradient_accumulation_steps: int = 3, compiled: bool = False, **probes: Any
) -> Trained:
    batch_size, max_iters = 4, 4
    ctx = nullcontext()
    data = torch.randint(VOCABULARY, (200,))

    def get_batch() -> tuple[Tensor, Tensor]:
        ix = torch.randint(len(data) - CONTEXT, (batch_size,))
        x = torch.stack([data[i : i + CONTEXT] for i in ix])
        y = torch.stack([data[i + 1 : i + 1 + CONTEXT] for i in ix])
        y[:, 0] = -1
        return x, y

    model = GPT().double()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = model.configure_optimizers(0.1, 1e-2)
    raw_model = model
    if compiled:
        model = torch.compile(model, backend="eager")
    recorder, micro = (  # added
        hp.Recorder(
            folder, model, optimizer=optimizer, forward=lambda model, batch: model(*batch)[0],
            targets=lambda batch: batch[1], ignore_index=-1, **probes,
        ),
        deque(maxlen=gradient_accumulation_steps),
    )  # fmt: skip
    X, Y = get_batch()
    for iter_num in range(max_iters):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (iter_num + 1) / max_iters
        for _micro_step in range(gradient_accumulation_steps):
            with ctx:
                _logits, loss = model(X, Y)
                loss = loss / gradient_accumulation_steps
            watch(raw_model, (X, Y), loss * gradient_accumulation_steps)
            micro.append((X, Y))  # added
            X, Y = get_batch()  # the next one is fetched while the device is busy
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        recorder(iter_num, list(micro), loss=loss if len(micro) == 1 else None)  # added
    recorder.close()  # added
    return Trained(raw_model, [optimizer])
