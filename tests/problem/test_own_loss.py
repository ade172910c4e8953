"""What is measured of a mapping with labels is the model's own loss, whatever its class is called; or both are said."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests.models import IGNORED, real, redraw, seeded

VOCABULARY = 13


class Toy(nn.Module):
    """A language model with a loss of its own, which `rule` makes of its outputs and labels."""

    def __init__(self, rule: Callable[[Tensor, Tensor], Tensor], auxiliary: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)
        self.rule, self.auxiliary, self.calls = rule, auxiliary, 0

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        self.calls += 1
        z = self.head(torch.tanh(self.embedding(input_ids)))
        found = SimpleNamespace(logits=z)
        if labels is not None:
            found.loss = self.rule(z, labels) + self.auxiliary
            if self.auxiliary:
                found.aux_loss = torch.tensor(self.auxiliary)
        return found


def aligned(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def shifted(z: Tensor, y: Tensor) -> Tensor:
    return aligned(z[:, :-1], y[:, 1:])


def smoothed(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), label_smoothing=0.1)


def toy(rule: Callable[[Tensor, Tensor], Tensor], **options: Any) -> tuple[Toy, dict[str, Tensor]]:
    model = Toy(rule, **options)
    redraw(model, seeded(0))
    ids = torch.randint(VOCABULARY, (3, 5), generator=seeded(1))
    y = ids.clone()
    y[0, 3:] = IGNORED
    return model, {"input_ids": ids, "labels": y}


@pytest.mark.parametrize("rule", [aligned, shifted])
def test_labels_are_read_as_the_model_reads_them(rule):
    model, batch = toy(rule)
    objective = Objective(model)
    torch.testing.assert_close(objective.loss(batch), model(**batch).loss)
    torch.testing.assert_close(objective.own_loss(batch), model(**batch).loss.detach())
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    objective.loss(batch)
    assert len(calls) == 1  # found out once


@pytest.mark.parametrize("rule", [aligned, shifted])
def test_outputs_that_are_uniform_leave_nothing_to_chance(rule):
    """Both readings give log(classes): the labels of the first position alone tell."""
    model, batch = toy(rule)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    objective = Objective(model)
    objective.loss(batch)
    nn.init.normal_(model.head.weight, generator=seeded(2))
    torch.testing.assert_close(objective.loss(batch), model(**batch).loss)


def test_a_loss_of_ones_own_is_measured_on_labels_as_the_model_shifts_them():
    model, batch = toy(shifted)
    objective = Objective(model, loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    torch.testing.assert_close(
        objective.loss(batch), smoothed(model(**batch).logits[:, :-1], batch["labels"][:, 1:])
    )
    assert objective.own_loss(batch) is None


def test_a_loss_that_is_not_known_is_refused_with_both_values():
    model, batch = toy(smoothed)
    own, plain = (
        float(model(**batch).loss.detach()),
        float(aligned(model(**batch).logits.detach(), batch["labels"])),
    )
    with pytest.raises(
        UserError, match=rf"own loss on this batch is {own:.6g}, .*{plain:.6g} \(labels as they stand\)"
    ) as e:
        Objective(model).loss(batch)
    assert all(
        word in str(e.value) for word in ("auxiliary=", "label_smoothing=", "ignore_index=", "targets=")
    )
    torch.testing.assert_close(
        Objective(model, loss=nn.CrossEntropyLoss(label_smoothing=0.1)).loss(batch), model(**batch).loss
    )


class TestAuxiliary:
    """A router's loss beside the main one: named, and the main one measured only where somebody has said so."""

    def test_it_is_named(self):
        model, batch = toy(shifted, auxiliary=0.25)
        with pytest.raises(
            UserError, match=r"returns aux_loss 0\.25.*auxiliary='ignore'.*a function \(model, batch\)"
        ):
            Objective(model).loss(batch)

    @pytest.mark.parametrize("auxiliary", ["ignore", lambda model, batch: model(**batch).aux_loss])
    def test_the_main_loss_is_measured_where_it_is_acknowledged(self, auxiliary):
        model, batch = toy(shifted, auxiliary=0.25)
        objective, main = Objective(model, auxiliary=auxiliary), model(**batch).loss - 0.25
        torch.testing.assert_close(objective.loss(batch), main)
        own = objective.own_loss(batch)
        assert own is None if auxiliary == "ignore" else torch.allclose(own, main)

    def test_a_function_that_does_not_explain_the_difference_is_told(self):
        model, batch = toy(shifted, auxiliary=0.25)
        with pytest.raises(UserError, match="own loss less auxiliary= on this batch"):
            Objective(model, auxiliary=lambda model, batch: torch.tensor(0.1)).loss(batch)

    def test_another_word_is_refused(self):
        with pytest.raises(UserError, match="auxiliary='ignored': wanted 'ignore', or a function"):
            Objective(nn.Linear(2, 2), auxiliary="ignored")


def test_a_pair_asks_nothing():
    model, batch = toy(smoothed)
    z = model(batch["input_ids"]).logits
    torch.testing.assert_close(
        Objective(model).loss((batch["input_ids"], batch["labels"])), aligned(z, batch["labels"])
    )


class Real(nn.Module):
    """A model of real labels, as Hugging Face's classifiers are."""

    def __init__(self, outputs: int, rule: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.rule = nn.Linear(3, outputs), rule

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        z = self.head(x)
        return {"logits": z} if labels is None else {"loss": self.rule(z, labels), "logits": z}


@pytest.mark.parametrize(
    ("outputs", "rule"),
    [
        (1, lambda z, y: F.mse_loss(z.squeeze(-1), y)),
        (4, F.mse_loss),
        (4, F.binary_cross_entropy_with_logits),
        (4, F.cross_entropy),
    ],
)
def test_real_labels_are_measured_by_the_models_own_loss(outputs, rule):
    model = Real(outputs, rule)
    redraw(model, seeded(0))
    y = real(seeded(2), 6, outputs).softmax(-1) if outputs > 1 else real(seeded(2), 6)
    batch = {"x": real(seeded(1), 6, 3), "labels": y}
    objective, partition = Objective(model), Partition.of(model, "parameter")
    loss = model(**batch)["loss"]
    torch.testing.assert_close(objective.loss(batch), loss)
    wanted = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, [model.get_parameter(n) for n in partition.names])]
    )
    torch.testing.assert_close(objective.gradient(batch, partition)[1], wanted)


# Families whose names mislead, and encoder-decoders that make their decoder inputs of the labels.
FAMILIES = [
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "BartForCausalLM",
    "MarianForCausalLM",
    "TrOCRForCausalLM",
    "XLNetLMHeadModel",
    "XLMWithLMHeadModel",
    "BertGenerationDecoder",
    "BertForMaskedLM",
    "GPT2ForSequenceClassification",
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "BlenderbotForConditionalGeneration",
    "M2M100ForConditionalGeneration",
]
SIZES = {
    "vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 8, "max_position_embeddings": 16, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "decoder_start_token_id": 2, "n_embd": 8, "n_layer": 1, "n_head": 2,
    "n_positions": 16, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2, "emb_dim": 8, "n_heads": 2, "n_layers": 1,
    "d_inner": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_hugging_faces_models_are_measured_by_their_own_loss(name):
    transformers = pytest.importorskip("transformers")
    family = getattr(transformers, name)
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if name != "XLNetLMHeadModel" or k != "max_position_embeddings"}
    model = redraw(family(family.config_class(**sizes)).eval(), seeded(0))
    ids = torch.randint(3, 40, (3, 6), generator=seeded(1))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[1, 4:], mask[1, 4:] = IGNORED, 0
    if "Classification" in name:
        labels = torch.tensor([0, 1, 1])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    objective, partition = Objective(model), Partition.of(model, "parameter")
    own = model(**batch).loss
    loss, gradient = objective.gradient(batch, partition)
    # The families upcast their outputs to float32, also where everything else is float64.
    torch.testing.assert_close(loss.double(), own.detach().double(), rtol=1e-6, atol=0)
    slopes = torch.autograd.grad(own, [model.get_parameter(n) for n in partition.names], allow_unused=True)
    own_parameters = [model.get_parameter(n) for n in partition.names]
    wanted = [torch.zeros_like(p) if g is None else g for p, g in zip(own_parameters, slopes, strict=True)]
    torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in wanted]), rtol=1e-4, atol=1e-6)


class WritesIntoLabels(nn.Module):
    """Puts a word in place of ignored labels, in place, as some encoder-decoders do when they make decoder inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        return labels.masked_fill_(labels == -100, 0)

    def forward(self, input_ids, decoder_input_ids=None, labels=None):
        if decoder_input_ids is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels.clone())
        z = self.head(self.table(input_ids) + self.table(decoder_input_ids))
        loss = None if labels is None else nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten())
        if labels is not None:
            self.prepare_decoder_input_ids_from_labels(labels)
        return {"loss": loss, "logits": z}


def test_a_callers_labels_stay_as_they_are_where_the_model_writes_into_them():
    torch.manual_seed(0)
    model = WritesIntoLabels()
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 3, 2]]), "labels": labels}
    wanted = float(model(batch["input_ids"], labels=labels.clone())["loss"].detach())
    objective = Objective(model)
    assert abs(float(objective.loss(batch).detach()) - wanted) < 1e-6
    assert objective.tokens(batch) == 3
    assert labels.tolist() == [[1, 2, -100], [3, -100, -100]]


class KeepsBetweenPasses(Toy):
    """Keeps something made of its parameters for later passes in evaluation, as LeViT does its attention biases."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        if not hasattr(self, "kept"):
            self.kept: dict[str, Tensor] = {}
        if self.training or "table" not in self.kept:
            table = self.embedding.weight.exp()
            if not self.training:
                self.kept["table"] = table
        else:
            table = self.kept["table"]
        z = self.head(torch.tanh(table[input_ids]))
        return SimpleNamespace(logits=z, loss=None if labels is None else self.rule(z, labels))


def test_what_a_model_keeps_in_its_pass_with_labels_is_not_there_in_the_passes_measured():
    model = KeepsBetweenPasses(aligned)
    redraw(model, seeded(0))
    batch = toy(aligned)[1]
    objective = Objective(model)
    found = torch.autograd.grad(objective.loss(batch), model.embedding.weight, allow_unused=True)[0]
    assert not getattr(model, "kept", None)
    wanted = torch.autograd.grad(model(**batch).loss, model.embedding.weight)[0]
    assert found is not None
    torch.testing.assert_close(found, wanted)
