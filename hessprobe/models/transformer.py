"""The decoder of the reference study (Abreu et al. 2025, arXiv 2510.09378), every piece differentiable twice.

Pre-RMSNorm, LayerNorm on queries and keys over the full width before the heads are split, RoPE, a two-matrix
GELU MLP, untied embedding and head, no biases, float32. Forward mode, double backward, `torch.func` and
float64 all run; fused attention alone is in their way (see `DecoderConfig.attention`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessprobe.errors import UserError, unknown_name

NORM_EPSILON = 1e-6  # of every norm, the query and key norms included, as in the study
ROPE_THETA = 1e4
_NAMES = {"mlp": ("gelu", "swiglu"), "norm": ("rmsnorm", "layernorm"), "attention": ("sdpa", "math")}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder, checked when it is made.

    Args:
        layers, width, feedforward, heads, vocabulary: sizes; width / heads whole and even.
        context: the longest sequence, in tokens.
        mlp: "gelu" (up, down) or "swiglu" (up, gate, down). GELU is the tanh approximation: the study's code
            calls flax's `gelu`, whose default that is.
        norm: the norm before attention, MLP and head: "rmsnorm" (scale) or "layernorm" (scale and bias).
        tied: whether head and embedding are one parameter.
        query_key_norm: LayerNorm (scale and bias) on queries and keys over the full width.
        attention: "sdpa" (torch picks a kernel; the fused ones have neither forward mode nor second
            derivatives, so curvature products need `sdpa_kernel(SDPBackend.MATH)` around them) or "math"
            (written out: needs nothing around it, keeps the (b, h, t, t) weights). Equal up to rounding.

    Raises:
        UserError: a size below 1, a width the heads do not divide into even parts, an unknown name.
    """

    layers: int
    width: int
    feedforward: int
    heads: int
    vocabulary: int
    context: int
    mlp: str = "gelu"
    norm: str = "rmsnorm"
    tied: bool = False
    query_key_norm: bool = True
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        for name in ("layers", "width", "feedforward", "heads", "vocabulary", "context"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise UserError(f"decoder: {name} must be a whole number of at least 1, got {size!r}")
        if self.width % (2 * self.heads):
            valid = ", ".join(str(h) for h in range(1, self.width) if self.width % (2 * h) == 0)
            raise UserError(
                f"decoder: heads must split width {self.width} into parts of equal, even size (RoPE turns "
                f"pairs), got heads {self.heads}. {f'Valid: {valid}' if valid else 'Choose an even width.'}"
            )
        for kind, names in _NAMES.items():
            if getattr(self, kind) not in names:
                raise unknown_name(kind, str(getattr(self, kind)), names)


# The study's sizes: 45,363,712 and 134,142,720 parameters, T5-base's vocabulary. "nano" reads bytes.
_45M = DecoderConfig(layers=4, width=512, feedforward=2048, heads=8, vocabulary=32_000, context=1024)
SIZES = {
    "nano": DecoderConfig(layers=4, width=64, feedforward=256, heads=4, vocabulary=256, context=64),
    "45M": _45M,
    "150M": replace(_45M, layers=12, width=768, feedforward=3072, heads=16),
}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), scaled (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        # Written out, not F.rms_norm: that one dispatches to a fused kernel on some devices, and then which
        # derivatives exist would depend on the device.
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPSILON) * self.weight


class Attention(nn.Module):
    """Causal self-attention: project, norm queries and keys over the full width, split, rotate, attend."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.path = config.attention
        self.q = _linear(config.width, config.width)
        self.k = _linear(config.width, config.width)
        self.v = _linear(config.width, config.width)
        self.out = _linear(config.width, config.width)
        if config.query_key_norm:
            self.q_norm = _norm("layernorm", config.width)
            self.k_norm = _norm("layernorm", config.width)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Returns (b, t, d) from (b, t, d); `rotation` is what `rotation_tables` gives."""
        q, k = self.q_norm(self.q(x)), self.k_norm(self.k(x))
        # (b, t, d) -> (b, h, t, d / h)
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for z in (q, k, self.v(x)))
        q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = (
            causal_attention(q, k, v)
            if self.path == "math"
            else F.scaled_dot_product_attention(q, k, v, is_causal=True)
        )
        return self.out(mixed.transpose(-3, -2).flatten(-2))


class MLP(nn.Module):
    """down(gelu(up x)), or down(silu(gate x) * up x) for SwiGLU (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.up = _linear(config.width, config.feedforward)
        self.gate = _linear(config.width, config.feedforward) if config.mlp == "swiglu" else None
        self.down = _linear(config.feedforward, config.width)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        gate = self.gate(x)
        # silu written out: torch 2.13 has no forward mode for F.silu's own backward pass.
        return self.down(gate * gate.sigmoid() * self.up(x))


class Block(nn.Module):
    """One residual layer: x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = _norm(config.norm, config.width)
        self.attention = Attention(config)
        self.mlp_norm = _norm(config.norm, config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """A causal language model: tokens (b, t) to logits (b, t, v).

    Args:
        config: its shape; `SIZES` holds the study's.
        generator: draws the initial weights and decides their device; nothing else does. None leaves the
            parameters on the meta device: shapes and counts without memory, to be loaded or counted.

    Initial weights as in the study: normal, embedding std 1, dense std 1/sqrt(fan_in), norms the identity.
    A tied matrix is drawn as a head, std 1/sqrt(width): std 1 would start with logits of std sqrt(width).
    """

    def __init__(self, config: DecoderConfig, *, generator: torch.Generator | None) -> None:
        super().__init__()
        self.config = config
        # Everything is laid out on the meta device first: torch's own initialisers would draw from the global
        # generator, and so disturb whoever else uses it.
        self.embedding = nn.Embedding(config.vocabulary, config.width, device="meta", dtype=torch.float32)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = _norm(config.norm, config.width)
        self.head = _linear(config.width, config.vocabulary)
        if generator is not None:
            self.to_empty(device=generator.device)
        if config.tied:  # after to_empty, which makes new parameters
            self.head.weight = self.embedding.weight
        if generator is not None:
            self._initialise(generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits (b, t, v) for tokens (b, t); position i sees tokens 0..i.

        Raises:
            UserError: more tokens than the context.
        """
        length = tokens.shape[-1]
        if length > self.config.context:
            raise UserError(
                f"sequences of {length:,} tokens; this decoder's context is {self.config.context:,}. "
                "Cut the sequences, or make the decoder with a longer context."
            )
        x = self.embedding(tokens)
        rotation = rotation_tables(length, self.config.width // self.config.heads, like=x)
        for block in self.blocks:
            x = block(x, rotation)
        return self.head(self.final_norm(x))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        # In the order of registration, so that the draws are a function of config and generator.
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 1.0, generator=generator)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(0.0, 1 / math.sqrt(module.in_features), generator=generator)
            elif isinstance(module, (RMSNorm, nn.LayerNorm)):
                module.weight.fill_(1.0)
                if isinstance(module, nn.LayerNorm):
                    module.bias.zero_()


def rotation_tables(length: int, size: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos and sin, (t, size / 2) each, of position i times theta^(-2j / size) (Su et al. 2021).

    They take the dtype and device of `like`. Made anew in each forward pass: a buffer would have been rounded
    to float32 before a model is turned into float64.
    """
    frequencies = ROPE_THETA ** (-torch.arange(0, size, 2, device=like.device, dtype=torch.float64) / size)
    angles = torch.outer(torch.arange(length, device=like.device, dtype=torch.float64), frequencies)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Returns x (..., t, size) with its pairs of entries (j, j + size / 2) turned by their position's angle.

    The study turns neighbours (2j, 2j + 1): the same model but for the order of q's and k's rows, and a third slower.
    """
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns softmax(q k^T / sqrt(size), causal) v, (..., t, size), written out: every derivative exists."""
    length = q.shape[-2]
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, device="meta", dtype=torch.float32)


def _norm(kind: str, width: int) -> nn.Module:
    if kind == "layernorm":
        return nn.LayerNorm(width, eps=NORM_EPSILON, device="meta", dtype=torch.float32)
    return RMSNorm(width, device="meta")
