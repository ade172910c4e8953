"""The models and batches that stages measure: the reference study's decoders, or shrunken copies, and odd small ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.recipe import build_recipe, read_recipe
from hessprobe.text.corpus import Corpus
from hessprobe.training.builds import decoder_config
from hessprobe.validation.modes import autocast

SIZES = {"45M": "paper_45m", "150M": "paper_150m"}  # by recipe
_SHRUNKEN = {
    "45M": DecoderConfig(layers=2, width=32, feedforward=128, heads=4, vocabulary=256, context=64),
    "150M": DecoderConfig(layers=3, width=48, feedforward=192, heads=4, vocabulary=256, context=64),
}
POSITIONS = {False: 8192, True: 128}  # tokens of a batch, by whether sizes are shrunken
LENGTHS = {False: (1024, 4096), True: (64,)}  # shrunken: that all runs, not how costs grow


def named(size: str, small: bool) -> str:
    """Returns how figures call a size."""
    return f"{size} shrunken" if small else size


def study_config(size: str, small: bool, length: int | None = None) -> DecoderConfig:
    """Returns the decoder of a recipe, or a shrunken copy of it, for sequences of `length` tokens."""
    config = _SHRUNKEN[size] if small else decoder_config(build_recipe(read_recipe(SIZES[size])))
    return config if length is None else replace(config, context=length)


def random_batch(config: DecoderConfig, sequences: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns (inputs, targets) of random tokens, the same for every device."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.vocabulary, (sequences, config.context + 1), generator=generator)
    return tokens[:, :-1].contiguous().to(device), tokens[:, 1:].contiguous().to(device)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A decoder on a device, a batch, and its training gradient as the unit of cost."""

    config: DecoderConfig
    model: nn.Module
    batch: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, config: DecoderConfig, sequences: int, device: torch.device) -> Problem:
        """Returns the decoder at its initial weights with a batch of random tokens."""
        # Drawn where they are needed: 134 million numbers take a CPU seconds.
        model = Decoder(config, generator=torch.Generator(device).manual_seed(0))
        return cls(config=config, model=model, batch=random_batch(config, sequences, device))

    @property
    def objective(self) -> Objective:
        """Model and cross-entropy."""
        return Objective(self.model)

    @property
    def partition(self) -> Partition:
        """By layer."""
        return Partition.of(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.batch[0].device

    def gradient(self, precision: str, batch: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
        """Returns an ordinary training gradient, under autocast in bfloat16."""
        inputs, targets = batch or self.batch
        with autocast(self.device, precision):
            loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        return torch.autograd.grad(loss, list(self.model.parameters()))


def text(config: DecoderConfig) -> Corpus:
    """Returns Python's own sources, byte by byte, as a corpus for a decoder: real text on every machine."""
    return Corpus.open("stdlib", context=config.context, vocabulary=config.vocabulary)


class GroupedQueryBlock(nn.Module):
    """Causal attention whose queries share keys and values in groups (Ainslie et al. 2023)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, width)  # half as many heads, keys and values
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (b, t, d) with what attention adds to it."""
        y = self.norm(x)
        q = self.q(y).unflatten(-1, (4, -1)).transpose(1, 2)
        k, v = (z.unflatten(-1, (2, -1)).transpose(1, 2) for z in self.kv(y).chunk(2, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class GroupedQuery(nn.Module):
    """A small causal model of two such blocks."""

    def __init__(self, width: int = 16, vocabulary: int = 13) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([GroupedQueryBlock(width) for _ in range(2)])
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits (b, t, v)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


Batches = list[tuple[Tensor, Tensor]]


def _drawn(model: nn.Module) -> nn.Module:
    """Draws every parameter anew, so that none is at a special place."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + (1.0 if p.dim() == 1 else 0.0))
    return model


def _tokens(vocabulary: int, sequences: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(
        0, vocabulary, (sequences, length + 1), generator=torch.Generator().manual_seed(seed)
    )
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def odd_problems() -> dict[str, Callable[[], tuple[nn.Module, Batches]]]:
    """Returns makers of small float32 models on the CPU and their micro-batches, by what is special about them."""
    config = DecoderConfig(layers=2, width=16, feedforward=24, heads=2, vocabulary=13, context=10)

    def decoder(**changes: object) -> nn.Module:
        return _drawn(Decoder(replace(config, **changes), generator=torch.Generator().manual_seed(0)))  # type: ignore[arg-type]

    def plain() -> Batches:
        return [_tokens(13, 4, 10, 0)]

    def ragged() -> Batches:
        first, second = _tokens(13, 3, 10, 0), _tokens(13, 2, 6, 1)
        first[1][0, 4:], first[1][2, :2] = -100, -100
        return [first, second]

    return {
        "decoder": lambda: (decoder(), plain()),
        "ragged batches": lambda: (decoder(), ragged()),
        "tied embeddings": lambda: (decoder(tied=True), plain()),
        "SwiGLU and LayerNorm": lambda: (decoder(mlp="swiglu", norm="layernorm"), plain()),
        "grouped-query attention": lambda: (_drawn(GroupedQuery()), plain()),
    }
