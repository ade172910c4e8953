"""The layers' names: embedding, block.N and head, what a parameter's own name says of them, and their order.

Where a model has lists of layers, its structure decides (stacks, layer_roles); names decide where it has none, and are
read by exact components: `h.1` does not catch `h.10`. What is not recognised is said, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hessprobe.problem.stacks import Stacks, components

# Names that training codes give to the parts of a language model: nanoGPT and GPT-2 (wte, wpe, h, ln_f, lm_head), Llama
# and Qwen (embed_tokens, layers, norm, lm_head), torchtitan (tok_embeddings, layers, norm, output), BERT-likes and ours.
_EMBEDDING = {"wte", "wpe", "embed_tokens", "embed_positions", "tok_embeddings", "pos_embeddings", "embedding",
              "embeddings", "token_embedding", "position_embedding"}  # fmt: skip
_HEAD = {"lm_head", "head", "output", "score", "classifier", "cls"}
_FINAL_NORM = {"ln_f", "norm", "final_norm", "final_layernorm", "final_layer_norm"}


def kind_by_name(name: str) -> str | None:
    """Returns `embedding`, `head` or `final_norm` where a parameter's name says so, else None."""
    modules = components(name)[:-1]
    for kind, names in (("embedding", _EMBEDDING), ("head", _HEAD), ("final_norm", _FINAL_NORM)):
        if any(part in names for part in modules):
            return kind
    return None


def fine_name(name: str, stacks: Stacks, *, keep_parameter: bool) -> str:
    """Returns `block.3.attention.q` for `blocks.3.attention.q.weight` (the parameter's own name where asked)."""
    placed = stacks.layer(name)
    parts = components(name if placed is None else f"{placed[0].block(placed[1])}.{placed[2]}")
    if not keep_parameter and len(parts) > 1:
        parts = parts[:-1]
    return ".".join(parts)


def reading_order(blocks: Sequence[str], stacks: Stacks) -> list[str]:
    """Orders layer blocks as the model runs: embedding, block.0 ... block.11, the rest as met, head last."""
    # An encoder runs first, whichever of the two a model registers first.
    prefixes = sorted((stack.prefix for stack in stacks.stacks), key=lambda prefix: prefix == "decoder.")

    def key(item: tuple[int, str]) -> tuple[int, int, int]:
        position, name = item
        if name.startswith("embedding"):
            return (0, 0, position)
        numbered = re.fullmatch(r"(.+\.)?block\.(\d+)", name)
        if numbered and (numbered[1] or "") in prefixes:
            return (1, prefixes.index(numbered[1] or ""), int(numbered[2]))
        if name == "head":
            return (3, 0, position)
        return (1, -1, 0) if position == 0 else (2, 0, position)

    return [name for _, name in sorted(enumerate(blocks), key=key)]
