"""Small transformers models and their training with the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)  # fmt: skip

VOCABULARY, LENGTH = 13, 6
SMALL = {"cross_layer": {"sequences": 4}}


BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "max_position_embeddings": 8,
}  # fmt: skip


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=8,
            n_embd=8,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=8, attention_dropout=0.1, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "llama": llama,
    "masked": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "classifier": lambda: BertForSequenceClassification(BertConfig(**BERT, num_labels=3)),
}


class Texts(Dataset):
    """Token sequences of several lengths; `kind` says what their labels are."""

    def __init__(self, kind: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.kind = kind
        self.tokens = [
            torch.randint(1, VOCABULARY, (LENGTH - i % 3,), generator=generator).tolist() for i in range(24)
        ]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[i], "number": i % 3}


def collate(examples: list[dict[str, Any]], kind: str) -> dict[str, torch.Tensor]:
    """Pads to the longest; the padding's labels are -100. Masks are drawn from the global generator."""
    longest = max(len(x["input_ids"]) for x in examples)
    rows = torch.tensor([x["input_ids"] + [0] * (longest - len(x["input_ids"])) for x in examples])
    attention = (rows > 0).long()
    labels = rows.masked_fill(attention == 0, -100)
    if kind == "masked":
        labels = labels.masked_fill(torch.rand(rows.shape) > 0.4, -100)
        labels[:, 0] = rows[:, 0]
    if kind == "classifier":
        labels = torch.tensor([x["number"] for x in examples])
    return {"input_ids": rows, "attention_mask": attention, "labels": labels}


def train(
    kind: str, folder: Path, *callbacks: TrainerCallback, resume: str | None = None, **more: Any
) -> Trainer:
    """Returns a Trainer after its training."""
    set_seed(3)
    model = MODELS[kind]()
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 3, "learning_rate": 1e-2, "report_to": [], "save_strategy": "no",
        "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "seed": 7, "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    } | more  # fmt: skip
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=training_set(kind),
        data_collator=partial(collate, kind=kind),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def training_set(kind: str) -> Dataset:
    return Texts(kind)


def same_weights(one: Trainer, other: Trainer) -> bool:
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)  # type: ignore[union-attr]
    return all(torch.equal(a, b) for a, b in pairs)
