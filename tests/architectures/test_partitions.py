"""Which layers models of different build have: found by structure, towers apart, every norm beside its own stack."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from hessprobe.problem.partition import Partition, inner_parameters
from tests.architectures.building import architectures, built

ENDS = ("embedding", "head")


def layers(prefix: str = "", count: int = 2) -> list[str]:
    return [f"{prefix}block.{i}" for i in range(count)]


# Class -> its blocks, and for some parameters the block they must lie in.
EXPECTED: dict[str, tuple[list[str], dict[str, str]]] = {
    "LlamaForCausalLM": (["embedding", *layers(), "head"], {"model.norm.weight": "block.1"}),
    "GPT2LMHeadModel": (["embedding+head", *layers()], {"transformer.ln_f.bias": "block.1"}),
    "OPTForCausalLM": (["embedding+head", *layers()], {"model.decoder.final_layer_norm.weight": "block.1"}),
    "BertForMaskedLM": (
        ["embedding+head", *layers()],
        {"bert.embeddings.LayerNorm.weight": "embedding+head", "cls.predictions.transform.dense.weight": "embedding+head"},
    ),
    "BertForSequenceClassification": (["embedding", *layers(), "head"], {"bert.pooler.dense.weight": "head"}),
    "AlbertForMaskedLM": (
        ["embedding+head", *layers(count=1)],
        {"albert.encoder.embedding_hidden_mapping_in.weight": "embedding+head"},
    ),
    "XLMWithLMHeadModel": (
        ["embedding+head", *layers()],
        {"transformer.layer_norm1.0.weight": "block.0", "transformer.attentions.0.q_lin.weight": "block.0",
         "transformer.ffns.1.lin1.weight": "block.1", "transformer.layer_norm_emb.weight": "embedding+head"},
    ),
    "T5ForConditionalGeneration": (
        ["embedding+head", *layers("encoder."), *layers("decoder.")],
        {"encoder.final_layer_norm.weight": "encoder.block.1", "decoder.final_layer_norm.weight": "decoder.block.1"},
    ),
    "BartForConditionalGeneration": (
        ["embedding+head", *layers("encoder."), *layers("decoder.")],
        {"model.decoder.layernorm_embedding.weight": "embedding+head"},
    ),
    "WhisperForConditionalGeneration": (
        ["embedding+head", *layers("encoder."), *layers("decoder.")],
        {"model.encoder.conv1.weight": "embedding+head", "model.encoder.layer_norm.weight": "encoder.block.1"},
    ),
    "ViTForImageClassification": (
        ["embedding", *layers(), "head"], {"vit.embeddings.cls_token": "embedding", "vit.layernorm.weight": "block.1"},
    ),
    "Wav2Vec2ForSequenceClassification": (
        ["embedding", *layers(), "head"],
        {"wav2vec2.feature_extractor.conv_layers.0.conv.weight": "embedding",
         "wav2vec2.feature_projection.projection.weight": "embedding"},
    ),
    "CLIPModel": (
        ["embedding", *layers("text."), *layers("vision."), "head"],
        {"vision_model.post_layernorm.weight": "vision.block.1", "text_model.final_layer_norm.weight": "text.block.1",
         "vision_model.embeddings.patch_embedding.weight": "embedding"},
    ),
    "MixtralForCausalLM": (["embedding", *layers(), "head"], {}),
    "MambaForCausalLM": (["embedding+head", *layers()], {"backbone.norm_f.weight": "block.1"}),
    "Gemma3ForConditionalGeneration": (
        ["embedding+head", *layers("vision."), *layers("language.")],
        {"model.language_model.norm.weight": "language.block.1",
         "model.multi_modal_projector.mm_input_projection_weight": "vision.block.1"},
    ),
    "torch.Transformer": (
        ["embedding", *layers("encoder."), *layers("decoder."), "head"],
        {"transformer.encoder.norm.weight": "encoder.block.1", "transformer.decoder.norm.weight": "decoder.block.1"},
    ),
    "torch.TransformerEncoder": (
        ["embedding", *layers(), "head"], {"positions": "embedding", "encoder.norm.weight": "block.1"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_layers_are_recognised_by_structure(name):
    architecture = next(one for one in architectures() if one.name == name)
    model, _ = built(architecture, torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="layer partition")
        partition = Partition.of(model)
    blocks, places = EXPECTED[name]
    assert partition.blocks == tuple(blocks)
    found = {slot.name: slot.block for slot in partition.slots}
    assert {parameter: found[parameter] for parameter in places} == places
    assert set(inner_parameters(model)) == {n for n, block in found.items() if "block." in block}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x))


class OutOfOrder(nn.Module):
    """Registered head first; two stacks of one class and one length, run one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.readout = nn.Linear(4, 7)
        self.last_norm = nn.LayerNorm(4)
        self.between = nn.Linear(4, 4)
        self.upper = nn.ModuleList(Block() for _ in range(2))
        self.lower = nn.ModuleList(Block() for _ in range(2))
        self.symbols = nn.Embedding(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.symbols(x)
        for layer in self.lower:
            x = layer(x)
        x = self.between(x)
        for layer in self.upper:
            x = layer(x)
        return self.readout(self.last_norm(x))


def test_the_forward_pass_decides_what_stands_beside_what_not_the_order_of_registration():
    partition = Partition.of(OutOfOrder())
    assert set(partition.blocks) == {"embedding", *layers("lower."), *layers("upper."), "head"}
    found = {slot.name: slot.block for slot in partition.slots}
    assert found["between.weight"] == "lower.block.1"
    assert found["last_norm.weight"] == "upper.block.1"
    assert found["readout.weight"] == "head" and found["symbols.weight"] == "embedding"


@pytest.mark.parametrize("by", ["layer", "module", "parameter"])
def test_no_partition_joins_layers_of_two_stacks(by):
    blocks = Partition.of(OutOfOrder(), by)
    stack_of = {
        slot.name: slot.name.split(".")[0] for slot in blocks.slots if slot.name[:5] in ("lower", "upper")
    }
    for block in blocks.blocks:
        assert len({stack_of[name] for name in blocks.parameters_of(block) if name in stack_of}) <= 1


def test_a_sequential_model_s_blocks_are_numbered_among_themselves():
    model = nn.Sequential(nn.Embedding(7, 4), Block(), Block(), nn.LayerNorm(4), nn.Linear(4, 7))
    partition = Partition.of(model)
    assert partition.blocks == ("embedding", "block.0", "block.1", "head")
    assert "3.weight" in partition.parameters_of("block.1")


def test_a_layer_used_several_times_is_one_block():
    block = Block()
    model = nn.ModuleDict(
        {"table": nn.Embedding(7, 4), "layers": nn.ModuleList([block] * 3), "out": nn.Linear(4, 7)}
    )
    assert Partition.of(model).blocks == ("embedding", "block.0", "head")


def test_a_model_without_layers_falls_back_on_its_modules_and_says_so_on_the_caller_s_line():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        partition = Partition.of(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    assert partition.blocks == ("0", "2")
    assert [warning.filename for warning in caught] == [__file__]
