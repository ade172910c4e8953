"""Which block a parameter belongs to, by names of every common training code, and the flat vector's order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hessprobe.errors import UserError
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.problem.partition import Partition
from tests.models import ZOO, seeded


def named(*names: str, shared: Mapping[str, str] | None = None) -> nn.Module:
    """Returns a module tree with one small parameter under each dotted name; `shared` maps alias -> name."""
    root = nn.Module()

    def place(name: str) -> tuple[nn.Module, str]:
        *path, leaf = name.split(".")
        at = root
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        return at, leaf

    for i, name in enumerate(names):
        at, leaf = place(name)
        at.register_parameter(leaf, nn.Parameter(torch.full((i + 1,), float(i))))
    for alias, name in (shared or {}).items():
        at, leaf = place(alias)
        at.register_parameter(leaf, root.get_parameter(name))
    return root


def members(model: nn.Module, by: str | Callable[[str], str] = "layer") -> dict[str, set[str]]:
    """Returns block -> names of its parameters."""
    partition = Partition.of(model, by)
    return {block: set(partition.parameters_of(block)) for block in partition.blocks}


def two_layers(*inside: str) -> list[str]:
    return [name.format(i) for i in range(2) for name in inside]


CODES = {
    "nanoGPT": (
        ["transformer.wte.weight", "transformer.wpe.weight"],
        two_layers("transformer.h.{}.ln_1.weight", "transformer.h.{}.attn.c_attn.weight",
                   "transformer.h.{}.mlp.c_proj.bias"),
        ["transformer.ln_f.weight"], ["lm_head.weight"],
    ),
    "GPT-2": (
        ["wte.weight", "wpe.weight"], two_layers("h.{}.attn.c_attn.weight", "h.{}.ln_2.bias"),
        ["ln_f.weight", "ln_f.bias"], ["lm_head.weight"],
    ),
    "Llama, Qwen": (
        ["model.embed_tokens.weight"],
        two_layers("model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.self_attn.q_norm.weight",
                   "model.layers.{}.input_layernorm.weight", "model.layers.{}.mlp.gate_proj.weight"),
        ["model.norm.weight"], ["lm_head.weight"],
    ),
    "torchtitan": (
        ["tok_embeddings.weight"],
        two_layers("layers.{}.attention.wq.weight", "layers.{}.feed_forward.w1.weight",
                   "layers.{}.ffn_norm.weight"),
        ["norm.weight"], ["output.weight"],
    ),
    "ours": (
        ["embedding.weight"], two_layers("blocks.{}.attention.q.weight", "blocks.{}.mlp_norm.weight"),
        ["final_norm.weight"], ["head.weight"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("code", CODES)
def test_layers_are_recognised_and_the_final_norm_belongs_to_the_last_block(code):
    embedding, inside, norm, head = CODES[code]
    found = members(named(*embedding, *inside, *norm, *head))
    per_block = len(inside) // 2
    assert found == {
        "embedding": set(embedding),
        "block.0": set(inside[:per_block]),
        "block.1": {*inside[per_block:], *norm},
        "head": set(head),
    }
    assert list(found) == ["embedding", "block.0", "block.1", "head"]


@pytest.mark.parametrize("code", CODES)
def test_a_wrapped_models_names_are_the_models(code):
    embedding, inside, norm, head = CODES[code]
    names = [*embedding, *inside, *norm, *head]
    plain = {block: len(found) for block, found in members(named(*names)).items()}
    for wrapper in ("module.{}", "_orig_mod.{}", "module._orig_mod.{}"):
        wrapped = members(named(*(wrapper.format(name) for name in names)))
        assert {block: len(found) for block, found in wrapped.items()} == plain


def test_block_1_does_not_catch_block_10():
    found = members(named("wte.weight", *(f"h.{i}.mlp.weight" for i in range(12)), "lm_head.weight"))
    assert list(found) == ["embedding", *(f"block.{i}" for i in range(12)), "head"]
    assert all(found[f"block.{i}"] == {f"h.{i}.mlp.weight"} for i in range(12))


def test_blocks_stand_in_the_order_the_model_runs_whatever_the_order_of_registration():
    model = named("lm_head.weight", "h.1.mlp.weight", "h.0.mlp.weight", "ln_f.weight", "wte.weight")
    partition = Partition.of(model)
    assert partition.blocks == ("embedding", "block.0", "block.1", "head")
    assert partition.names == (
        "wte.weight",
        "h.0.mlp.weight",
        "h.1.mlp.weight",
        "ln_f.weight",
        "lm_head.weight",
    )


def test_a_tied_embedding_and_head_are_one_block_with_one_tensor():
    model = named("wte.weight", "wpe.weight", "h.0.mlp.weight", shared={"lm_head.weight": "wte.weight"})
    assert members(model) == {
        "embedding+head": {"wte.weight", "wpe.weight"},
        "block.0": {"h.0.mlp.weight"},
    }


def test_our_tied_decoder_counts_its_matrix_once():
    model = ZOO["decoder_tied"](seeded(0)).model
    partition = Partition.of(model)
    assert partition.blocks == ("embedding+head", "block.0")
    assert partition.size == sum(p.numel() for p in model.parameters())


def test_twelve_layers_of_ours_are_fourteen_blocks():
    config = DecoderConfig(layers=12, width=4, feedforward=4, heads=1, vocabulary=5, context=4)
    partition = Partition.of(Decoder(config, generator=seeded(0)))
    assert len(partition) == 14
    assert len({partition.sizes[f"block.{i}"] for i in range(11)}) == 1
    assert partition.sizes["block.11"] == partition.sizes["block.10"] + 4


def test_unknown_names_fall_back_to_the_module_tree_and_say_so():
    model = named("encoder.weight", "encoder.bias", "h.0.mlp.weight", "decoder.weight")
    with pytest.warns(UserWarning, match=r"3 parameters .* not recognised .*\(decoder, encoder\)"):
        partition = Partition.of(model)
    assert set(partition.blocks) == {"encoder", "block.0", "decoder"}
    assert set(partition.parameters_of("encoder")) == {"encoder.weight", "encoder.bias"}
    assert len(partition.notes) == 1 and partition.notes[0] in partition.summary()


def test_the_summary_counts_parameters_by_the_way_they_were_measured():
    model = named("wte.weight", "h.1.attn.weight", "h.1.attn.bias", "lm_head.weight")
    partition = Partition.of(model)
    routes = {
        "wte.weight": "embedding",
        "h.1.attn.weight": "linear",
        "h.1.attn.bias": "one sequence at a time",
    }
    plain, lines = partition.summary().splitlines(), partition.summary(routes).splitlines()
    sizes = {slot.name: slot.stop - slot.start for slot in partition.slots}
    ways = [f"{way} {sizes[name]}" for name, way in routes.items()] + [
        f"not measured {sizes['lm_head.weight']}"
    ]
    shown = [ways[0], ", ".join(ways[1:3]), ways[3], ", ".join(ways)]
    assert lines == [f"{a}  {b}" for a, b in zip(plain, shown, strict=True)]


def test_known_names_say_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Partition.of(named(*chain.from_iterable(CODES["GPT-2"]))).notes == ()


def test_module_and_parameter_partitions_follow_the_module_tree():
    model = named("wte.weight", "h.1.attn.weight", "h.1.attn.bias", "lm_head.weight")
    assert members(model, "module") == {
        "wte": {"wte.weight"},
        "block.1.attn": {"h.1.attn.weight", "h.1.attn.bias"},
        "lm_head": {"lm_head.weight"},
    }
    assert members(model, "parameter") == {
        "wte": {"wte.weight"},
        "block.1.attn.weight": {"h.1.attn.weight"},
        "block.1.attn.bias": {"h.1.attn.bias"},
        "lm_head": {"lm_head.weight"},
    }


def test_a_function_decides_by_the_name():
    found = members(named("a.weight", "b.weight", "a.bias"), lambda name: name.rsplit(".")[-1])
    assert found == {"weight": {"a.weight", "b.weight"}, "bias": {"a.bias"}}


def test_frozen_parameters_are_left_out():
    model = named("wte.weight", "h.0.mlp.weight", "lm_head.weight")
    model.get_parameter("wte.weight").requires_grad_(False)
    partition = Partition.of(model)
    assert partition.blocks == ("block.0", "head")
    assert partition.size == 5
    model.requires_grad_(False)
    with pytest.raises(UserError, match="Module has no trainable parameters.*requires_grad"):
        Partition.of(model)


def test_compiled_and_distributed_wrappers_share_the_models_tensors(tmp_path):
    model = ZOO["decoder"](seeded(0)).model
    wanted = Partition.of(model)
    wrapped: list[nn.Module] = [torch.compile(model)]  # type: ignore[list-item]
    store = f"file://{tmp_path}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped.append(nn.parallel.DistributedDataParallel(model))
        wrapped.append(torch.compile(nn.parallel.DistributedDataParallel(model)))  # type: ignore[arg-type]
        for outer in wrapped:
            partition = Partition.of(outer)
            assert partition == wanted
            moved = partition.vector(outer) + 1
            partition.assign(outer, moved)
            assert torch.equal(wanted.vector(model), moved)
    finally:
        torch.distributed.destroy_process_group()


SHAPES = st.lists(st.integers(1, 3), min_size=1, max_size=3)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), SHAPES), min_size=1, max_size=6),
    st.lists(st.integers(1, 3), max_size=2),
)
def test_flatten_and_unflatten_are_inverse_and_blocks_are_slices(tensors, lead):
    model = nn.Module()
    for i, (block, shape) in enumerate(tensors):
        model.register_parameter(f"{block}{i}", nn.Parameter(torch.zeros(shape)))
    partition = Partition.of(model, lambda name: name[0])
    vector = torch.arange(float(torch.Size([*lead, partition.size]).numel())).reshape(*lead, partition.size)
    parts = partition.unflatten(vector)
    assert torch.equal(partition.flatten(parts), vector)
    assert all(parts[n].shape == (*lead, *p.shape) for n, p in model.named_parameters())
    for block, where in partition.slices.items():
        own = [parts[name].reshape(*lead, -1) for name in partition.parameters_of(block)]
        assert torch.equal(torch.cat(own, -1), vector[..., where])
    assert sum(partition.sizes.values()) == partition.size
    assert [s.start for s in partition.slices.values()][1:] == [s.stop for s in partition.slices.values()][
        :-1
    ]


def test_a_scalar_parameter_has_its_place():
    model = nn.Module()
    model.register_parameter("temperature", nn.Parameter(torch.tensor(2.0)))
    partition = Partition.of(model, "parameter")
    assert partition.unflatten(partition.vector(model))["temperature"].shape == ()


def test_vector_and_assign_copy():
    model = named("a.weight", "b.weight")
    partition = Partition.of(model, "module")
    kept = partition.vector(model)
    partition.assign(model, torch.arange(3.0))
    assert torch.equal(kept, torch.tensor([0.0, 1.0, 1.0]))
    assert torch.equal(partition.vector(model), torch.arange(3.0))
    assert not kept.requires_grad


def test_what_does_not_exist_is_refused():
    model = named("wte.weight", "h.0.mlp.weight")
    with pytest.raises(
        UserError, match="no partition named 'layers'. Did you mean 'layer'.*module, parameter"
    ):
        Partition.of(model, "layers")
    with pytest.raises(UserError, match="no block named 'block.7'.*embedding, block.0"):
        Partition.of(model).parameters_of("block.7")
