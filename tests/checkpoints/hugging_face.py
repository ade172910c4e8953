"""Models of transformers, small and random, saved with a tokenizer as their users save them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch

from tests.training.runs import WORDS, text_file

VOCABULARY = 280
LABELS = 3
_SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
_BERT = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8,
    "vocab_size": VOCABULARY, "max_position_embeddings": 16,
}  # fmt: skip
# Name -> model class, configuration class, its numbers, the tokenizer's special tokens.
KINDS: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config", {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, **_SIZES},
        ["<|endoftext|>"],
    ),
    "llama": (
        "LlamaForCausalLM", "LlamaConfig",
        {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 16, **_SIZES},
        ["</s>"],
    ),
    "bert": ("BertForMaskedLM", "BertConfig", _BERT, ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]),
    "classifier": (
        "BertForSequenceClassification", "BertConfig", {**_BERT, "num_labels": LABELS},
        ["[PAD]", "[CLS]", "[SEP]", "[MASK]"],
    ),
    "headless": ("BertModel", "BertConfig", _BERT, ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]),
}  # fmt: skip


def save_model(folder: Path, kind: str, *, seed: int = 0, **numbers: Any) -> Path:
    """Saves a random model into a folder, and returns it."""
    import transformers

    maker, config, given, _ = KINDS[kind]
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = getattr(transformers, maker)(getattr(transformers, config)(**{**given, **numbers}))
        for p in model.parameters():  # far from a start's near-zero curvature
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, specials: Sequence[str], size: int = VOCABULARY) -> Path:
    """Saves a byte-pair tokenizer with those special tokens, and returns its file."""
    rules = tokenizers.Tokenizer(tokenizers.models.BPE())
    rules.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    rules.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    rules.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def saved(folder: Path, kind: str, **numbers: Any) -> Path:
    """Saves a random model and its tokenizer into a folder, and returns it."""
    save_tokenizer(save_model(folder, kind, **numbers), KINDS[kind][3])
    return folder


def labelled_file(folder: Path, count: int = 24) -> Path:
    """Returns a file of texts of several lengths with a label each."""
    draw, path = random.Random(0), folder / "labelled.jsonl"
    rows = [
        {"text": " ".join(draw.choices(WORDS, k=draw.randint(1, 9))), "label": i % LABELS}
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def hub_folder(folder: Path) -> Path:
    """Returns a folder that `datasets` reads as a data set with the splits train and validation."""
    folder.mkdir(parents=True, exist_ok=True)
    words = text_file(folder.parent).read_text().split()
    for split, first in (("train", 0), ("validation", 900)):
        texts = [" ".join(words[i : i + 20]) for i in range(first, first + 600, 20)]
        rows = "\n".join(json.dumps({"text": text, "label": i % LABELS}) for i, text in enumerate(texts))
        (folder / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    return folder
