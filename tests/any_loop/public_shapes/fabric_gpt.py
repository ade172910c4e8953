"""A loop in the shape of litgpt's: Lightning Fabric, ids one longer than the input, cross-entropy in chunks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import hessprobe as hp
from tests.any_loop.public_shapes.watching import Trained, Watch

VOCABULARY, CONTEXT, WIDTH, HEADS, GROUPS, LAYERS = 7, 6, 4, 2, 1, 2


class RMSNorm(nn.Module):
    """In float32 at least, whatever comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        return (normed * self.weight).to(x.dtype)


class CausalSelfAttention(nn.Module):
    """Grouped queries from one fused matrix, rotated by cosines and sines that come as arguments."""

    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * GROUPS) * size, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        size = WIDTH // HEADS
        q, k, v = self.qkv(x).split([HEADS * size, GROUPS * size, GROUPS * size], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in (q, k, v))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.proj(y.transpose(1, 2).flatten(2))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


class LLaMAMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.fc_2 = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.proj = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.silu(self.fc_1(x)) * self.fc_2(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.attn = RMSNorm(WIDTH), CausalSelfAttention()
        self.norm_2, self.mlp = RMSNorm(WIDTH), LLaMAMLP()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x), cos, sin)
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """The head stands first among the modules; cosines and sines are buffers that are not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "h": nn.ModuleList([Block() for _ in range(LAYERS)]),
                "ln_f": RMSNorm(WIDTH),
            }
        )
        angles = torch.outer(torch.arange(CONTEXT), torch.ones(WIDTH // HEADS // 2)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, idx: Tensor) -> Tensor:
        t = idx.shape[1]
        x = self.transformer["wte"](idx)
        for block in self.transformer["h"]:  # type: ignore[union-attr]
            x = block(x, self.cos[:t], self.sin[:t])
        return self.lm_head(self.transformer["ln_f"](x))


def chunked_cross_entropy(logits: Tensor, targets: Tensor, chunk_size: int = 8) -> Tensor:
    """Returns the mean over targets, some positions at a time."""
    logits, targets = logits.flatten(0, 1), targets.flatten()
    losses = [
        F.cross_entropy(some, wanted, ignore_index=-100, reduction="none")
        for some, wanted in zip(logits.split(chunk_size), targets.split(chunk_size), strict=True)
    ]
    return torch.cat(losses).sum() / (targets != -100).sum().clamp(min=1)


def train(
    folder: Path, watch: Watch, *, precision: Any = "32-true", accumulation: int = 2, **probes: Any
) -> Trained:
    from lightning.fabric import Fabric

    warnings.filterwarnings("ignore", module="lightning")
    max_steps = 4
    fabric = Fabric(devices=1, accelerator="cpu", precision=precision)
    with fabric.init_module():
        model = GPT()
    model = model.double() if precision == "64-true" else model
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95)))
    data = torch.randint(VOCABULARY, (60, CONTEXT + 1))
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=4, shuffle=True))  # type: ignore[arg-type]
    recorder, micro, losses = (  # added
        hp.Recorder(
            folder, model, optimizer=optimizer, forward=lambda model, ids: model(ids[:, :-1]),
            targets=lambda ids: ids[:, 1:], **probes,
        ),
        [],
        [],
    )  # fmt: skip
    iter_num = step_count = 0
    for train_data in loader:
        if step_count >= max_steps:
            break
        iter_num += 1  # noqa: SIM113 (as those loops do)
        input_ids = train_data[:, 0:CONTEXT].contiguous().long()
        targets = train_data[:, 1 : CONTEXT + 1].contiguous().long()
        is_accumulating = iter_num % accumulation != 0
        with fabric.no_backward_sync(model, enabled=is_accumulating):
            logits = model(input_ids)
            loss = chunked_cross_entropy(logits, targets)
            watch(model.module, train_data, loss)
            fabric.backward(loss / accumulation)
        micro, losses = [*micro, train_data], [*losses, loss.detach()]  # added
        if not is_accumulating:
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            step_count += 1
            recorder(step_count - 1, micro[-accumulation:], loss=losses[-accumulation:])  # added
    recorder.close()  # added
    return Trained(model.module, [optimizer])
