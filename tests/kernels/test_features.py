"""Every fast path, whole or in pieces, and the fallback give the per-sequence gradients of plain autograd."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessprobe.kernels import features, grams
from hessprobe.kernels.features import fast_path_of, prefers_tokens, token_gram
from hessprobe.kernels.plan import MASKED, ONE_SEQUENCE, first_plan
from hessprobe.models.transformer import RMSNorm
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests.kernels.plain import Given, blocks_of, kernel_of, relative, rows_of, streamed
from tests.models import seeded

ROUNDS = 2


class Around(nn.Module):
    """The module under test between others, its outputs (b, t, c)."""

    def __init__(self, module: nn.Module, before: nn.Module | None, width: int) -> None:
        super().__init__()
        self.before, self.module, self.after = before, module, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.before is None else torch.tanh(self.before(x))
        x = self.module(x)
        if isinstance(self.module, (nn.Conv1d, nn.Conv2d)):
            x = x.flatten(2).mT
        return self.after(torch.tanh(x))


def _conv1d_of_transformers() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(6, 5)


# name -> (the module, its outputs' width, its inputs' shapes in two micro-batches)
TEXT = ((3, 4, 5), (2, 6, 5))
MODULES: dict[str, Any] = {
    "linear": (lambda: nn.Linear(5, 6), 6, TEXT),
    "linear without bias": (lambda: nn.Linear(5, 6, bias=False), 6, TEXT),
    "linear on (b, d)": (lambda: nn.Linear(5, 6), 6, ((3, 5), (2, 5))),
    "linear on (b, h, t, d)": (lambda: nn.Linear(5, 6), 6, ((3, 2, 4, 5), (2, 2, 3, 5))),
    "transformers Conv1D": (_conv1d_of_transformers, 6, TEXT),
    "embedding": (lambda: nn.Embedding(7, 5), 5, ((3, 4), (2, 6))),
    "embedding with padding": (lambda: nn.Embedding(7, 5, padding_idx=2), 5, ((3, 4), (2, 6))),
    "layer norm": (lambda: nn.LayerNorm(5), 5, TEXT),
    "layer norm without bias": (lambda: nn.LayerNorm(5, bias=False), 5, TEXT),
    "rms norm": (lambda: nn.RMSNorm(5), 5, TEXT),
    "rms norm with eps": (lambda: nn.RMSNorm(5, eps=1e-2), 5, TEXT),
    "own rms norm": (lambda: RMSNorm(5), 5, TEXT),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), 6, ((3, 4, 9), (2, 4, 9))),
    "conv1d with settings": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
        6,
        ((3, 4, 9), (2, 4, 9)),
    ),
    "conv2d": (lambda: nn.Conv2d(2, 6, (3, 2)), 6, ((3, 2, 5, 4), (2, 2, 5, 4))),
    "conv2d with settings": (
        lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, bias=False),
        6,
        ((3, 4, 6, 5), (2, 4, 7, 5)),
    ),
    "patches": (lambda: nn.Conv2d(2, 6, 2, stride=2), 6, ((3, 2, 5, 4), (2, 2, 5, 4))),
}


def _redrawn(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    generator = seeded(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator) + 0.1)
    return model.to(dtype)


class Bench:
    """A model around one module, batches, and the sketches plain autograd gives."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64, after_another: bool = False) -> None:
        make, width, shapes = MODULES[name]
        module = make()
        before = None
        if after_another and not isinstance(module, nn.Embedding):
            before = nn.Linear(shapes[0][-1], shapes[0][-1])
        self.model = _redrawn(Around(module, before, width), dtype)
        generator = seeded(11)
        self.batches: list[tuple[Tensor, Tensor]] = []
        for shape in shapes:
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            if isinstance(module, nn.Embedding):
                x = torch.randint(module.num_embeddings, shape, generator=generator)
                x[0, 0] = 2  # the padding, where there is one
            with torch.no_grad():
                self.batches.append((x, torch.zeros_like(self.model(x))))
        self.objective = Objective(self.model, loss="squared_error")
        self.partition = Partition.of(self.model, "parameter")
        self.cotangents = Given([y.shape for _, y in self.batches], ROUNDS)
        self.rows = blocks_of(
            rows_of(self.model, self.batches, self.cotangents.drawn, self.partition.names), self.partition
        )
        self.truth = kernel_of(self.rows.double(), self.partition)

    def kernel(self, plan: str = "fast", **options: Any) -> Tensor:
        found = streamed(self.objective, self.batches, self.partition, self.cotangents, plan, **options)
        return found.kernel


@pytest.mark.parametrize("after_another", [False, True], ids=["first", "after another"])
@pytest.mark.parametrize("name", MODULES)
def test_fast_path_equals_plain_autograd(name, after_another):
    bench = Bench(name, after_another=after_another)
    assert not first_plan(bench.objective, bench.partition).fallback
    assert relative(bench.kernel(), bench.truth) < 1e-11


@pytest.mark.parametrize("how", [ONE_SEQUENCE, MASKED])
@pytest.mark.parametrize("name", MODULES)
def test_fallback_equals_plain_autograd(name, how):
    bench = Bench(name)
    assert relative(bench.kernel(how), bench.truth) < 1e-11


@pytest.mark.parametrize("name", MODULES)
def test_float32_agrees_to_its_precision(name):
    bench = Bench(name, torch.float32)
    assert relative(bench.kernel(), bench.truth) < 1e-5
    assert relative(bench.kernel(ONE_SEQUENCE), bench.truth) < 1e-5


@pytest.mark.parametrize("tokens", [False, True], ids=["direct", "token Gram"])
@pytest.mark.parametrize("name", ["linear", "linear on (b, d)", "transformers Conv1D"])
def test_both_forms_of_a_linear_layer(name, tokens, monkeypatch):
    bench = Bench(name)
    # The token form needs the same length in every micro-batch.
    bench.batches = [(x[:, :4].contiguous(), y[:, :4]) if x.dim() == 3 else (x, y) for x, y in bench.batches]
    bench.cotangents = Given([y.shape for _, y in bench.batches], ROUNDS)
    rows = rows_of(bench.model, bench.batches, bench.cotangents.drawn, bench.partition.names)
    asked = []
    monkeypatch.setattr(grams, "prefers_tokens", lambda *sizes: asked.append(sizes) or tokens)
    truth = kernel_of(blocks_of(rows, bench.partition), bench.partition)
    assert relative(bench.kernel(), truth) < 1e-11
    assert asked and asked[0][0] == 5 * ROUNDS


def test_the_token_form_takes_micro_batches_of_different_lengths():
    g = seeded(1)
    a = [torch.randn(2, 3, 4, generator=g).double(), torch.randn(1, 5, 4, generator=g).double()]
    d = [torch.randn(2, 3, 6, generator=g).double(), torch.randn(1, 5, 6, generator=g).double()]
    rows = torch.cat([torch.einsum("bso,bsi->boi", y, x).flatten(1) for x, y in zip(a, d, strict=True)])
    assert torch.allclose(token_gram(a, d), rows @ rows.mT, rtol=1e-12)


@pytest.mark.parametrize(("sizes", "wanted"), [((8, 16, 512, 512), True), ((64, 64, 16, 16), False)])
def test_the_cheaper_form_is_chosen(sizes, wanted):
    """Sketches, positions, inputs, outputs: tokens pay where the matrix is large and the tokens are few."""
    assert prefers_tokens(*sizes) is wanted


@pytest.mark.parametrize("piece", [1, 7, 60])
@pytest.mark.parametrize("name", ["linear", "transformers Conv1D", "embedding with padding"])
def test_pieces_smaller_than_a_parameter_give_the_same_kernel(name, piece, monkeypatch):
    bench = Bench(name)
    monkeypatch.setattr(features, "PIECE", piece)
    along = torch.randn(bench.partition.size, generator=seeded(2), dtype=torch.float64)
    monkeypatch.setattr(grams, "prefers_tokens", lambda *sizes: False)
    assert relative(bench.kernel(), bench.truth) < 1e-11
    assert relative(*_alignments(bench, "fast", along)) < 1e-11


def _alignments(bench: Bench, plan: str, along: Tensor) -> tuple[Tensor, Tensor]:
    found = streamed(
        bench.objective, bench.batches, bench.partition, bench.cotangents, plan, along={"v": along}
    )
    slices = bench.partition.slices.values()
    return found.alignment["v"], torch.stack([bench.rows[:, i] @ along[i] for i in slices])


@pytest.mark.parametrize("plan", ["fast", ONE_SEQUENCE, MASKED])
@pytest.mark.parametrize("name", MODULES)
def test_alignment_is_the_inner_product_with_every_sketch(name, plan):
    bench = Bench(name)
    along = torch.randn(bench.partition.size, generator=seeded(2), dtype=torch.float64)
    assert relative(*_alignments(bench, plan, along)) < 1e-11


@pytest.mark.parametrize("trained", ["weight", "bias"])
@pytest.mark.parametrize("tokens", [False, True], ids=["direct", "token Gram"])
def test_only_what_trains_is_measured(trained, tokens, monkeypatch):
    bench = Bench("linear on (b, d)")
    for name, parameter in bench.model.named_parameters():
        parameter.requires_grad_(name == f"module.{trained}")
    monkeypatch.setattr(grams, "prefers_tokens", lambda *sizes: tokens)
    partition = Partition.of(bench.model, "parameter")
    rows = rows_of(bench.model, bench.batches, bench.cotangents.drawn, partition.names)
    found = streamed(bench.objective, bench.batches, partition, bench.cotangents, "fast")
    assert relative(found.kernel, kernel_of(blocks_of(rows, partition), partition)) < 1e-11


class Subclass(nn.Linear):
    """May compute anything."""


def _weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(3, 3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Subclass(3, 3),
        _weight_norm,
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        lambda: nn.Embedding(4, 3, max_norm=1.0),
        lambda: nn.Embedding(4, 3, scale_grad_by_freq=True),
        lambda: nn.LayerNorm((4, 3)),
        lambda: nn.Conv1d(2, 2, 3, padding="same"),
        lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        lambda: nn.BatchNorm1d(3),
        lambda: nn.MultiheadAttention(4, 2).out_proj,
    ],
)
def test_settings_a_path_does_not_cover_have_none(make):
    assert fast_path_of(make()) is None
