"""The zoo: tiny float64 problems, each chosen for one way of going wrong; generator -> Problem.

p < 1,500 throughout, so the dense truth of tests/oracles.py costs seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from tests.oracles import Loss

IGNORED = -100


class Problem(NamedTuple):
    """A model, its (inputs, targets) micro-batches and the name of its loss (or the loss itself)."""

    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    loss: Loss


def seeded(seed: int) -> Generator:
    """Returns a fresh CPU generator."""
    return torch.Generator().manual_seed(seed)


def redraw(model: nn.Module, generator: Generator) -> nn.Module:
    """Redraws all parameters in float64: matrices by fan-in, vectors around 1 (scales) or 0 (biases)."""
    model = model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim >= 2:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
    return model


def real(generator: Generator, *shape: int) -> Tensor:
    """Returns standard normal float64 numbers."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def labels(generator: Generator, classes: int, *shape: int, ignore: float = 0.0) -> Tensor:
    """Returns uniform class labels, a share of them ignored (never all: the first stays)."""
    drawn = torch.randint(classes, shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < ignore
    ignored.view(-1)[0] = False
    return drawn.masked_fill(ignored, IGNORED)


# -- multilayer perceptrons --------------------------------------------------------------------------------


def mlp_regression(generator: Generator) -> Problem:
    """Squared error; two micro-batches of different size, so an average over batches is not one over rows."""
    model = redraw(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)), generator)
    return Problem(model, [(real(generator, n, 3), real(generator, n, 2)) for n in (5, 2)], "squared_error")


def mlp_classifier(generator: Generator) -> Problem:
    """Cross-entropy with ignored targets."""
    model = redraw(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 5)), generator)
    return Problem(model, [(real(generator, 9, 4), labels(generator, 5, 9, ignore=0.3))], "cross_entropy")


def layernorm(generator: Generator) -> Problem:
    """An affine LayerNorm whose input depends on parameters: torch.func.hessian is wrong here."""
    model = redraw(nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4)), generator)
    return Problem(model, [(real(generator, 7, 3), labels(generator, 4, 7))], "cross_entropy")


class Repeated(nn.Module):
    """One module used twice in a forward pass, and a bare parameter beside modules."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.empty(5))
        self.body = nn.Linear(5, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(silu(self.body(x + self.shift)))))


def repeated_module(generator: Generator) -> Problem:
    """A module used twice: per-module bookkeeping that assumes one use counts half of it."""
    return Problem(
        redraw(Repeated(), generator), [(real(generator, 6, 5), labels(generator, 4, 6))], "cross_entropy"
    )


def frozen_layer(generator: Generator) -> Problem:
    """The first layer does not train: it is no part of theta."""
    model = redraw(
        nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), generator
    )
    model[0].requires_grad_(False)  # type: ignore[index]
    return Problem(model, [(real(generator, 6, 3), labels(generator, 3, 6))], "cross_entropy")


def logcosh(outputs: Tensor, targets: Tensor) -> Tensor:
    """A convex loss hessprobe has no closed form for, (n, c) -> (n,), with a coupling between classes."""
    difference = outputs - targets
    return torch.log(torch.cosh(difference)).sum(-1) + 0.1 * difference.sum(-1).square()


def custom_loss(generator: Generator) -> Problem:
    """A callable loss, by autodiff."""
    model = redraw(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)), generator)
    return Problem(model, [(real(generator, n, 3), real(generator, n, 3)) for n in (4, 3)], logcosh)


# -- linear in their parameters: G = H ---------------------------------------------------------------------


def linear_regression(generator: Generator) -> Problem:
    """Squared error of W x: G = H = I (x) X^T X / n."""
    model = redraw(nn.Linear(4, 3, bias=False), generator)
    return Problem(model, [(real(generator, 8, 4), real(generator, 8, 3))], "squared_error")


def softmax_regression(generator: Generator) -> Problem:
    """Cross-entropy of W x: G = H, in closed form."""
    model = redraw(nn.Linear(5, 4, bias=False), generator)
    return Problem(model, [(real(generator, 9, 5), labels(generator, 4, 9))], "cross_entropy")


# -- transformers ------------------------------------------------------------------------------------------


def _decoder(generator: Generator, vocabulary: int = 7, layers: int = 1, **switches: Any) -> nn.Module:
    from hessprobe.models.transformer import Decoder, DecoderConfig

    config = DecoderConfig(
        layers=layers, width=8, feedforward=12, heads=2, vocabulary=vocabulary, context=8, **switches
    )
    return redraw(Decoder(config, generator=generator), generator)


def _text(
    generator: Generator, vocabulary: int, *shapes: tuple[int, int], ignore: float = 0.0
) -> list[tuple[Tensor, Tensor]]:
    return [
        (
            torch.randint(vocabulary, shape, generator=generator),
            labels(generator, vocabulary, *shape, ignore=ignore),
        )
        for shape in shapes
    ]


def decoder(generator: Generator) -> Problem:
    """The study's decoder: two layers, GELU, RMSNorm, query and key norms, untied head."""
    return Problem(_decoder(generator, layers=2), _text(generator, 7, (2, 5)), "cross_entropy")


def decoder_swiglu_layernorm(generator: Generator) -> Problem:
    """SwiGLU (silu has no second forward derivative in torch) and affine LayerNorm."""
    model = _decoder(generator, 9, mlp="swiglu", norm="layernorm", query_key_norm=False)
    return Problem(model, _text(generator, 9, (2, 4)), "cross_entropy")


def decoder_tied(generator: Generator) -> Problem:
    """Embedding and head are one tensor, hence one parameter."""
    return Problem(_decoder(generator, 11, tied=True), _text(generator, 11, (2, 4)), "cross_entropy")


def decoder_ragged(generator: Generator) -> Problem:
    """Micro-batches of different lengths, numbers and shares of ignored targets."""
    batches = _text(generator, 7, (2, 6), (1, 3), (3, 2), ignore=0.5)
    return Problem(_decoder(generator), batches, "cross_entropy")


class FusedAttention(nn.Module):
    """Attention through torch's own scaled_dot_product_attention, whichever kernel it picks."""

    def __init__(self, vocabulary: int = 7, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(8, width))
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.head(x + scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def fused_attention(generator: Generator) -> Problem:
    """The default attention kernel has neither a forward mode nor a second derivative."""
    return Problem(redraw(FusedAttention(), generator), _text(generator, 7, (2, 4), (1, 6)), "cross_entropy")


ZOO: dict[str, Callable[[Generator], Problem]] = {
    build.__name__: build
    for build in (
        mlp_regression,
        mlp_classifier,
        layernorm,
        repeated_module,
        frozen_layer,
        custom_loss,
        linear_regression,
        softmax_regression,
        decoder,
        decoder_swiglu_layernorm,
        decoder_tied,
        decoder_ragged,
        fused_attention,
    )
}
LINEAR = ("linear_regression", "softmax_regression")
