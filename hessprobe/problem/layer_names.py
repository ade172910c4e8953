"""Which layer a parameter's name means: embedding, block.N or head, by exact name components.

`h.1` does not catch `h.10`. Names are those of nanoGPT, GPT-2, Llama, Qwen, torchtitan, BERT-likes and ours; what is
not recognised is said, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Names that training codes give to the three parts of a language model: nanoGPT and GPT-2 (wte, wpe, h, ln_f,
# lm_head), Llama and Qwen (embed_tokens, layers, norm, lm_head), torchtitan (tok_embeddings, layers, norm,
# output), BERT-likes and ours.
_REPEATED = {"h", "blocks", "block", "layers", "layer"}
_EMBEDDING = {"wte", "wpe", "embed_tokens", "embed_positions", "tok_embeddings", "pos_embeddings", "embedding",
              "embeddings", "token_embedding", "position_embedding"}  # fmt: skip
_HEAD = {"lm_head", "head", "output", "score", "classifier", "cls"}
_FINAL_NORM = {"ln_f", "norm", "final_norm", "final_layernorm", "final_layer_norm"}
_WRAPPERS = {"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_TOWERS = ("encoder", "decoder")


def _components(name: str) -> list[str]:
    """Splits a parameter name, leaving out what compile, DDP and checkpoint wrappers add."""
    return [part for part in name.split(".") if part not in _WRAPPERS]


def _repeated_position(parts: list[str]) -> int | None:
    """Returns where the number of a repeated layer stands: the first `h.3`, `layers.3`, ... in the name."""
    for i in range(len(parts) - 1):
        if parts[i] in _REPEATED and parts[i + 1].isdigit():
            return i + 1
    return None


def layer_of(name: str, towers: bool = False) -> str | None:
    """Returns `embedding`, `block.N`, `head`, `final_norm`, or None where the name is not recognised.

    Args:
        name: a parameter's full name.
        towers: whether encoder and decoder are told apart: `encoder.block.0`, `decoder.block.0`.
    """
    parts = _components(name)
    number = _repeated_position(parts)
    if number is not None:
        tower = next((f"{part}." for part in parts[:number] if part in _TOWERS), "") if towers else ""
        return f"{tower}block.{int(parts[number])}"
    modules = parts[:-1]
    for kind, names in (("embedding", _EMBEDDING), ("head", _HEAD), ("final_norm", _FINAL_NORM)):
        if any(part in names for part in modules):
            return kind
    return None


def fine_name(name: str, keep_parameter: bool) -> str:
    """Returns `block.3.attention.q` for `blocks.3.attention.q.weight` (the parameter's own name where asked)."""
    parts = _components(name)
    number = _repeated_position(parts)
    if number is not None:
        parts = ["block", *parts[number:]]
    if not keep_parameter and len(parts) > 1:
        parts = parts[:-1]
    return ".".join(parts)


def layer_blocks(names: list[str], aliases: Mapping[str, list[str]]) -> tuple[dict[str, str], list[str]]:
    """Assigns each parameter its layer, and lists in words what was not recognised."""
    towers = all(any(tower in _components(name) for name in names) for tower in _TOWERS)
    found = {name: layer_of(name, towers) for name in names}
    notes: list[str] = []
    numbered = [kind for kind in found.values() if kind and re.fullmatch(r"(\w+\.)?block\.\d+", kind)]
    last = max(numbered, key=lambda kind: int(kind.rsplit(".", 1)[1])) if numbered else None
    # The final norm belongs to the last block (the reference study's partition); with no blocks, to the head.
    found = {name: (last or "head") if kind == "final_norm" else kind for name, kind in found.items()}
    tied = any({layer_of(alias) for alias in aliases[name]} >= {"embedding", "head"} for name in names)
    if tied:
        found = {n: "embedding+head" if kind in ("embedding", "head") else kind for n, kind in found.items()}
    strangers = [name for name, kind in found.items() if kind is None]
    if strangers:
        blocks = sorted({fine_name(name, keep_parameter=False) for name in strangers})
        notes.append(
            f"layer partition: {len(strangers)} parameters have names that are not recognised as embedding, "
            f"block or head; each takes its module as a block ({', '.join(blocks[:6])}"
            f"{', ...' if len(blocks) > 6 else ''}). Pass a function name -> block to decide yourself."
        )
    return {
        n: fine_name(n, keep_parameter=False) if kind is None else kind for n, kind in found.items()
    }, notes


def reading_order(blocks: list[str]) -> list[str]:
    """Orders layer blocks as the model runs: embedding, block.0 ... block.11, the rest as met, head last."""

    def key(item: tuple[int, str]) -> tuple[int, int]:
        position, name = item
        if name.startswith("embedding"):
            return (0, position)
        numbered = re.fullmatch(r"(\w+\.)?block\.(\d+)", name)
        if numbered:
            return (1, int(numbered[2]) + (10**6 if numbered[1] == "decoder." else 0))
        return (3, position) if name == "head" else (1, -1) if position == 0 else (2, position)

    return [name for _, name in sorted(enumerate(blocks), key=key)]
