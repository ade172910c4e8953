"""Models nobody tuned for: their kernels equal plain autograd's, and every parameter's way is the one expected."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.kernels.layer_kernels import layer_kernels
from hessprobe.kernels.plan import MASKED, ONE_SEQUENCE
from hessprobe.kernels.verification import verified_plan
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests.kernels.foreign_models import (
    EXPERTS,
    VOCABULARY,
    Foreign,
    Mixture,
    called,
    mixture_with_capacity,
    pairs,
    scattered,
)
from tests.kernels.plain import Given, blocks_of, kernel_of, relative, rows_of, streamed
from tests.models import IGNORED, labels, real, seeded


def _dicts(*shapes: tuple[int, int]) -> list[dict[str, Tensor]]:
    """Returns Hugging Face batches, padded on the right: labels are the inputs, ignored where padded."""
    generator, found = seeded(5), []
    for b, t in shapes:
        tokens = torch.randint(VOCABULARY, (b, t), generator=generator)
        lengths = torch.randint(2, t + 1, (b, 1), generator=generator)
        mask = (torch.arange(t) < lengths).long()
        found.append(
            {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, IGNORED)}
        )
    return found


def _causal(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits[:, :-1]


# -- transformers ------------------------------------------------------------------------------------------


def gpt2() -> Foreign:
    """Conv1D layers fast; the tied embedding and the positions (one row for all sequences) fall back."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=VOCABULARY, n_positions=8)
    model = scattered(GPT2LMHeadModel(config))
    return Foreign(
        model, _dicts((3, 6), (2, 5)), _causal, {"transformer.wte.weight", "transformer.wpe.weight"}
    )


def _llama(tied: bool) -> Foreign:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    # Its norms and rotations compute in float32, whatever the model's precision.
    model = scattered(LlamaForCausalLM(config))
    return Foreign(
        model,
        _dicts((3, 6), (2, 5)),
        _causal,
        {"model.embed_tokens.weight"} if tied else set(),
        tolerance=1e-5,
    )


def llama() -> Foreign:
    """Grouped queries, every parameter fast."""
    return _llama(tied=False)


def llama_tied() -> Foreign:
    """The shared embedding alone falls back."""
    return _llama(tied=True)


def qwen3() -> Foreign:
    """Query and key norms over heads, (b, t, h, d)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    return Foreign(scattered(Qwen3ForCausalLM(config)), _dicts((3, 6), (2, 5)), _causal, tolerance=1e-5)


# -- plain torch -------------------------------------------------------------------------------------------


class Vision(nn.Module):
    """Patches by a convolution, a class token and positions as bare parameters, attention in torch's fused form."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position = nn.Parameter(torch.zeros(1, 5, 8))
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.position
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return self.head(x[:, 0])


def vision() -> Foreign:
    generator = seeded(7)
    batches = [(real(generator, n, 3, 4, 4), labels(generator, 5, n)) for n in (4, 3)]
    return Foreign(scattered(Vision()), batches, called, {"cls_token", "position"})


class Classifier(nn.Module):
    """torch's own encoder under a mean over positions."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(VOCABULARY, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.3, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x.mean(1))


ATTENTION = {
    f"encoder.layers.{i}.self_attn.{name}"
    for i in range(2)
    for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
}
ENCODER = ATTENTION | {
    f"encoder.layers.{i}.{module}.{name}"
    for i in range(2)
    for module in ("linear1", "linear2", "norm1", "norm2")
    for name in ("weight", "bias")
}


def _encoder(batch_first: bool, fallback: set[str]) -> Foreign:
    generator = seeded(8)
    batches = [
        (torch.randint(VOCABULARY, (n, 5), generator=generator), labels(generator, 4, n)) for n in (4, 3)
    ]
    return Foreign(scattered(Classifier(batch_first)), batches, called, fallback)


def encoder() -> Foreign:
    """nn.MultiheadAttention never calls a module for its projections."""
    return _encoder(True, ATTENTION)


def encoder_positions_first() -> Foreign:
    """Positions first inside: no module of the encoder sees sequences."""
    return _encoder(False, ENCODER)


class Recurrent(nn.Module):
    """An LSTM language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(5, VOCABULARY)
        self.lstm = nn.LSTM(6, 5, num_layers=2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


def recurrent() -> Foreign:
    names = {
        f"lstm.{kind}_l{i}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") for i in range(2)
    }
    return Foreign(scattered(Recurrent()), pairs((3, 5), (2, 4)), called, names)


def mixture() -> Foreign:
    """The router sees tokens, not sequences, and the experts a changing number of them."""
    return Foreign(scattered(Mixture()), pairs((3, 5), (2, 4)), called, EXPERTS | {"router.weight"})


MODELS = {
    build.__name__: build
    for build in (
        gpt2,
        llama,
        llama_tied,
        qwen3,
        vision,
        encoder,
        encoder_positions_first,
        recurrent,
        mixture,
        mixture_with_capacity,
    )
}


def _partition(model: nn.Module) -> Partition:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Partition.of(model, "layer")


@pytest.mark.parametrize("name", MODELS)
def test_kernels_equal_plain_autograd(name):
    found = MODELS[name]()
    objective, partition = Objective(found.model), _partition(found.model)
    plan = verified_plan(objective, found.batches[0], partition)
    assert set(plan.fallback) == found.fallback
    assert plan.how == found.how or not plan.fallback
    with torch.no_grad():
        shapes = [found.outputs(found.model, batch).shape for batch in found.batches]
    cotangents = Given(shapes, 2)
    rows = rows_of(found.model, found.batches, cotangents.drawn, partition.names, found.outputs)
    truth = kernel_of(blocks_of(rows, partition), partition)
    stream = streamed(objective, found.batches, partition, cotangents, plan)
    assert relative(stream.kernel, truth) < found.tolerance


@pytest.mark.parametrize("name", MODELS)
def test_estimates_come_out_in_float32_and_training_mode(name):
    found = MODELS[name]()
    model = found.model.float().train()
    for i, batch in enumerate(found.batches):
        if not isinstance(batch, dict):
            x, y = batch
            found.batches[i] = (x.float() if x.is_floating_point() else x, y)
    objective, partition = Objective(model), _partition(model)
    kernels = layer_kernels(objective, found.batches, partition, rounds=2, generator=seeded(1))
    assert set(kernels.routes) == set(partition.names)
    assert {n for n, way in kernels.routes.items() if way in (ONE_SEQUENCE, MASKED)} == found.fallback
    for estimate in (kernels.block_norms(), kernels.coupling("batch"), kernels.trace()):
        assert estimate.mean.isfinite().all() and estimate.stderr.isfinite().all()
    assert (kernels.trace().mean > 0).all()
    assert model.training
    shown = partition.summary(kernels.routes)
    assert "not measured" not in shown and all(way in shown for way in set(kernels.routes.values()))


def test_a_sequence_that_cannot_be_taken_alone_is_measured_in_the_whole_batch():
    """A batch in a form of its own: only forward= knows how to take it apart."""
    model = scattered(Recurrent())
    (x, y), *_ = pairs((3, 5))

    class Opaque:
        tokens, targets = x, y

    objective = Objective(model, forward=lambda m, b: m(b.tokens), targets=lambda b: b.targets)
    partition = _partition(model)
    plan = verified_plan(objective, Opaque(), partition)
    assert plan.how == MASKED
    cotangents = Given([(3, 5, VOCABULARY)], 2)
    rows = rows_of(model, [(x, y)], cotangents.drawn, partition.names)
    stream = streamed(objective, [Opaque()], partition, cotangents, plan)
    assert relative(stream.kernel, kernel_of(blocks_of(rows, partition), partition)) < 1e-10


def test_outputs_in_another_form_are_refused_with_the_way_out():
    class Tuples(nn.Linear):
        def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(input), input

    model = Tuples(3, 4)
    batch = (torch.randn(3, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(UserError, match="Tuples returned tuple.*pass forward="):
        layer_kernels(
            Objective(model),
            batch,
            Partition.of(model, "parameter"),
            generator=torch.Generator().manual_seed(0),
        )
