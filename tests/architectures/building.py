"""Small models of every architecture: transformers' auto mappings with shrunk configurations, and torch's own modules.

A configuration is shrunk by the names of its fields, the same everywhere; what an architecture wants besides stands in
WANTED. Models come in float64 with a batch that has padding inside its sequences and labels for the model's own loss.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VOCABULARY, CLASSES, LENGTH, PAD = 50, 3, 7, 0

# Mapping of transformers -> the kind of batch its models take.
MAPPINGS = {
    "CAUSAL_LM": "causal",
    "MASKED_LM": "tokens",
    "SEQ_TO_SEQ_CAUSAL_LM": "sequences",
    "SEQUENCE_CLASSIFICATION": "classes",
    "TOKEN_CLASSIFICATION": "token classes",
    "IMAGE_CLASSIFICATION": "images",
    "AUDIO_CLASSIFICATION": "sound",
    "SPEECH_SEQ_2_SEQ": "speech",
    "IMAGE_TEXT_TO_TEXT": "causal",
    "ZERO_SHOT_IMAGE_CLASSIFICATION": "two towers",
}

SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ["hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "emb_dim", "word_embed_proj_dim",
         "attention_hidden_size", "output_hidden_size", "out_hidden_size", "projection_dim", "hidden_dim", "lru_width",
         "classifier_proj_size", "dim_model", "text_hidden_size", "image_text_hidden_size", "pooler_hidden_size",
         "conv_dim_out", "backbone_hidden_size", "mamba_d_ssm"], 16),
    **dict.fromkeys(
        ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
         "num_decoder_layers", "num_encoder_layers", "depth"], 2),
    **dict.fromkeys(
        ["num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
         "num_kv_heads", "num_key_value_heads", "swa_num_attention_heads", "swa_num_key_value_heads", "index_n_heads",
         "linear_num_key_heads", "linear_num_value_heads", "linear_num_heads", "mamba_n_heads", "mamba_num_heads"], 2),
    **dict.fromkeys(
        ["head_dim", "d_kv", "d_head", "v_head_dim", "swa_head_dim", "qk_nope_head_dim", "index_head_dim", "dim_head",
         "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "attention_head_size", "attention_head_dim",
         "mamba_d_head", "mamba_head_dim", "kv_channels", "global_head_dim"], 8),
    **dict.fromkeys(
        ["intermediate_size", "ffn_dim", "d_ff", "dim_ff", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner", "n_inner",
         "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size", "dff", "shared_intermediate_size",
         "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size", "alignment_intermediate_size",
         "projector_hidden_size", "linear_ffn_size", "intermediate_multiple_size"], 24),
    **dict.fromkeys(["vocab_size", "n_vocab", "src_vocab_size", "tgt_vocab_size", "unpadded_vocab_size",
                     "vocab_size_per_layer_input", "t2u_vocab_size"], VOCABULARY),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_blocks"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "cross_attn_k"], 2),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts",
                     "mamba_n_groups", "n_groups", "first_k_dense_replace", "num_dense_layers", "moe_layer_interval",
                     "moe_num_shared_experts", "moe_layer_start_index"], 1),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "o_lora_rank", "hidden_size_per_layer_input", "state_size",
                     "mamba_d_state", "ssm_state_size", "gated_norm_rank", "laurel_rank"], 8),
    **dict.fromkeys(["rotary_dim", "time_step_rank", "mamba_dt_rank", "conv_kernel_size"], 4),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_source_positions",
                     "max_target_positions", "sliding_window", "max_2d_position_embeddings"], 64),
    "qk_head_dim": 16, "qk_rope_head_dim": 8, "type_vocab_size": 2, "pad_token_id": PAD, "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1, "image_size": 16, "patch_size": 4, "num_labels": CLASSES, "chunk_size": 4,
    "mamba_chunk_size": 4, "index_topk": 4, "n_groups_attn": 1, "num_nextn_predict_layers": 0, "attention_window": 4,
    "num_mel_bins": 8, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_codevectors_per_group": 4,
    "codevector_dim": 4, "proj_codevector_dim": 4, "apply_spec_augment": False, "num_hash_buckets": 64,
    "axial_pos_embds": False,
    "num_query_tokens": 4, "hc_mult": 2, "max_bucket": 4, "rel_pos_bins": 8, "query_pre_attn_scalar": 8,
    "image_token_id": VOCABULARY - 1, "image_token_index": VOCABULARY - 1, "video_token_id": VOCABULARY - 2,
    "video_token_index": VOCABULARY - 2, "audio_token_id": VOCABULARY - 3, "audio_token_index": VOCABULARY - 3,
    "window_size": 2, "embedding_dim": 16, "torch_dtype": "float32", "block_size": 4,
}  # fmt: skip

# What some architectures want besides, by model type.
WANTED: dict[str, dict[str, Any]] = {
    "mamba": {"intermediate_size": 32, "expand": 2}, "falcon_mamba": {"intermediate_size": 32, "expand": 2},
    "mamba2": {"num_heads": 4, "head_dim": 8, "expand": 2, "n_groups": 1},
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1], "num_decoder_layers": 1},
    "funnel_base": {"block_sizes": [1, 1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "xlnet": {"d_inner": 24}, "bigbird_pegasus": {"attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"}, "mobilebert": {"intra_bottleneck_size": 8, "true_hidden_size": 8,
        "embedding_size": 8, "num_feedforward_networks": 2},
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]},
    "swinv2": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]},
    "donut-swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "convnextv2": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8},
    "poolformer": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
    "segformer": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 8}, "pvt": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "image_size": 32,
        "num_attention_heads": [1, 1, 2, 2]},
    **{name: {"conv_dim": [8, 8], "conv_kernel": [5, 3], "conv_stride": [3, 2], "num_feat_extract_layers": 2,
              "num_adapter_layers": 1} for name in ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat",
              "data2vec-audio", "wav2vec2-conformer", "sew", "sew-d")},
    "audio-spectrogram-transformer": {"max_length": 16, "frequency_stride": 4, "time_stride": 4},
    **{name: {"mamba_n_heads": 4, "mamba_d_head": 8} for name in ("bamba",)},
    "bit": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_groups": 4},
    "convbert": {"conv_kernel_size": 3},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}},
    "efficientnet": {"image_size": 64, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
    **{name: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
       for name in ("glm4v_text", "glm46v_text", "glm_ocr_text", "paddleocr_vl_text", "qwen2_vl_text", "qwen2_5_vl_text")},
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    "pvt_v2": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
        "mlp_ratios": [2, 2, 2, 2], "image_size": 32},
    **{name: {"image_size": 128, "patch_size": 2} for name in ("mobilevit", "mobilevitv2")},
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_embeddings": 16},
    "perceiver": {"num_latents": 4, "d_latents": 16, "num_self_attends_per_block": 1, "num_blocks": 1,
        "num_self_attention_heads": 2, "num_cross_attention_heads": 2, "qk_channels": 16, "v_channels": 16},
    "nystromformer": {"num_landmarks": 4, "segment_means_seq_len": 4},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16}, "mluke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "bros": {"hidden_size": 64}, "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 8,
        "layer_types": ["mamba", "attention"]},
    "ernie4_5_vl_moe_text": {"moe_num_experts": 4},
    "florence_vision": {"embed_dim": [8, 16], "depths": [1, 1], "num_heads": [2, 2], "num_groups": [2, 2],
        "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": None},
    "gemma4_unified_assistant": {"hidden_size_per_layer_input": 0},
    "glm5_next_text": {"index_topk": 16}, "glm5_next": {"index_topk": 16},
    "kosmos_2_text_model": {"attention_heads": 2, "layers": 2},
    "layoutlmv3": {"coordinate_size": 2, "shape_size": 4},
    "levit": {"hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "image_size": 64,
        "key_dim": [8, 8, 8], "mlp_ratio": [1, 1, 1], "attention_ratio": [1, 1, 1], "patch_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 24}, "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zaya": {"num_experts_per_tok": 1}, "wav2vec2-bert": {"feature_projection_input_dim": 8},
    "whisper": {"max_source_positions": 8}, "speech_to_text": {"conv_channels": 16, "input_feat_per_channel": 8},
}  # fmt: skip


class Architecture(NamedTuple):
    """One class of transformers, the type of its configuration and the batch it takes; or a builder of ours."""

    name: str
    model_type: str
    kind: str


def architectures() -> list[Architecture]:
    """Returns every architecture of the mappings, each class once, and torch's own."""
    modeling = importlib.import_module("transformers.models.auto.modeling_auto")
    found: dict[str, Architecture] = {}
    for mapping, kind in MAPPINGS.items():
        for model_type, classes in getattr(modeling, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            for name in (classes,) if isinstance(classes, str) else classes:
                found.setdefault(name, Architecture(name, model_type, kind))
    own = [Architecture(name, "torch", "torch") for name in TORCH]
    return [*sorted(found.values()), *own]


def one_of_each() -> list[str]:
    """Returns one class of each model type, in the order of the mappings, and torch's own."""
    order, found = list(MAPPINGS.values()), dict[str, Architecture]()
    for one in architectures():
        if one.kind in order[:-1]:
            known = found.setdefault(one.model_type, one)
            if order.index(one.kind) < order.index(known.kind):
                found[one.model_type] = one
    return [*sorted(one.name for one in found.values()), *TORCH]


def shrunk(kind: type[Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a small configuration of a class, nested ones included."""
    default = kind()
    arguments: dict[str, Any] = {}
    parts = getattr(kind, "sub_configs", {})
    for name in {*default.to_dict(), *inspect.signature(kind.__init__).parameters}:
        try:
            value = getattr(default, name, None)
        except Exception:  # sizes that differ from layer to layer are not for reading
            value = None
        if isinstance(value, dict) and "mrope_section" in value:
            arguments[name] = {**value, "mrope_section": [2, 1, 1]}
        elif name in parts:
            if value is None:
                continue
            part = type(value)
            arguments[name] = {**shrunk(part, WANTED.get(part.model_type, {})), "model_type": part.model_type}
        elif name in SMALL and (value is None or not isinstance(value, (list, tuple, dict))):
            arguments[name] = SMALL[name]
        elif name in ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types") and value:
            kinds = list(dict.fromkeys(value))
            arguments[name] = (kinds * 2)[:2]
        elif name.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
            arguments[name] = VOCABULARY - 4
    arguments.pop("num_labels", None)
    return {**arguments, **wanted}


def built(architecture: Architecture, generator: torch.Generator) -> tuple[nn.Module, Any]:
    """Returns a small model in float64, in evaluation mode, and a batch with padding inside its sequences."""
    if architecture.kind == "torch":
        model, batch = TORCH[architecture.name](generator)
        return model.double().eval(), batch
    transformers = importlib.import_module("transformers")
    made = getattr(transformers, architecture.name)
    kind = made.config_class or transformers.CONFIG_MAPPING[architecture.model_type]
    config = kind(**shrunk(kind, WANTED.get(kind.model_type, {})))
    config.num_labels = CLASSES
    for part in [config, *(getattr(config, name, None) for name in getattr(kind, "sub_configs", {}))]:
        if part is not None:
            part.pad_token_id = PAD
            part._experts_implementation = "eager"  # grouped matrix products take no float64
            if getattr(part, "decoder_start_token_id", None) is None:
                part.decoder_start_token_id = 1
    model = made(config).requires_grad_(True)
    if architecture.kind == "two towers":
        return model.double().eval(), None
    return model.double().eval(), batch_for(architecture.kind, generator, model)


def batch_for(kind: str, generator: torch.Generator, model: nn.Module) -> dict[str, Tensor]:
    """Returns a batch of two sequences with the labels of the model's own loss."""

    def drawn(most: int, *shape: int) -> Tensor:
        return torch.randint(3, most, shape, generator=generator)

    tokens = drawn(VOCABULARY - 5, 2, LENGTH)
    tokens[0, 2], tokens[1, -2:] = PAD, PAD  # one inside a sequence, two at an end
    mask = torch.ones_like(tokens)
    mask[1, -2:] = 0
    takes = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    size = _image_size(config)
    images = torch.randn((2, 3, size, size), generator=generator, dtype=torch.float64)
    text = {"input_ids": tokens, "attention_mask": mask}
    if config is not None and config.model_type in ("bros", "lilt", "udop"):
        corner = drawn(20, 2, LENGTH, 2)
        boxes = torch.cat([corner, corner + 5], -1)  # left, top, right, bottom
        text["bbox"] = boxes / 64 if config.model_type == "bros" else boxes
    if "pixel_values" in takes and (
        takes["pixel_values"].default is inspect.Parameter.empty or config.model_type == "git"
    ):
        text["pixel_values"] = images
    if "qformer_input_ids" in takes:
        text["qformer_input_ids"] = tokens
    if kind in ("speech", "sequences") and "input_ids" in takes and "decoder_input_ids" not in takes:
        kind = "causal"  # a language model that hears, given text alone
    if kind in ("causal", "tokens"):
        return {**text, "labels": tokens.masked_fill(mask == 0, -100)}
    if kind == "sequences":
        labels = drawn(VOCABULARY - 5, 2, LENGTH - 2 if config.model_type != "fsmt" else LENGTH)
        labels[0, -1] = -100
        return {**text, "labels": labels}
    if kind == "classes":
        return {**text, "labels": torch.tensor([2, 0])}
    if kind == "token classes":
        return {**text, "labels": (tokens % CLASSES).masked_fill(mask == 0, -100)}
    if kind == "images":
        if "pixel_values" not in takes:
            return {"input_ids": tokens, "labels": torch.tensor([2, 0])}  # ImageGPT's clusters of colours
        return {"pixel_values": images, "labels": torch.tensor([2, 0])}
    if kind == "sound":
        key = getattr(model, "main_input_name", "input_values")
        length = (2, 120) if key == "input_values" else (2, 8, 16)
        if config.model_type == "audio-spectrogram-transformer":
            length = (2, 16, 8)
        return {
            key: torch.randn(length, generator=generator, dtype=torch.float64),
            "labels": torch.tensor([2, 0]),
        }
    labels = drawn(VOCABULARY - 5, 2, LENGTH - 2)
    key = getattr(model, "main_input_name", "input_features")
    shape = {
        "whisper": (2, 8, 16),
        "canary": (2, 64, 8),
        "cohere_asr": (2, 64, 8),
        "speech_to_text": (2, 16, 8),
    }.get(model.config.model_type, (2, 120))  # type: ignore[union-attr]
    return {key: torch.randn(shape, generator=generator, dtype=torch.float64), "labels": labels}


def _image_size(config: Any) -> int:
    """Returns the height of the images that a model takes."""
    for part in (config, getattr(config, "vision_config", None)):
        size = getattr(part, "image_size", None)
        if size is not None:
            return size if isinstance(size, int) else size[0]
    return 32


class Recurrent(nn.Module):
    """A recurrent language model as torch's example writes it."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.encoder = nn.Embedding(VOCABULARY, 8)
        self.rnn = kind(8, 8, 2, batch_first=True)
        self.decoder = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.rnn(self.encoder(tokens))[0])


class EncoderDecoder(nn.Module):
    """nn.Transformer between a shared table and a head; the batch's tokens are source and target."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 8)
        self.transformer = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
        self.generator = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.generator(self.transformer(x, x))


class Encoder(nn.Module):
    """nn.TransformerEncoder with a table, positions and a final norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 8)
        self.positions = nn.Parameter(torch.randn(16, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
        self.classify = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classify(self.encoder(self.table(tokens) + self.positions[: tokens.shape[1]]))


def _pair(model: nn.Module, generator: torch.Generator) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    drawn = torch.randint(VOCABULARY, (2, 2, LENGTH), generator=generator)
    return model, (drawn[0], drawn[1])


TORCH: dict[str, Callable[[torch.Generator], tuple[nn.Module, Any]]] = {
    "torch.LSTM": lambda generator: _pair(Recurrent(nn.LSTM), generator),
    "torch.GRU": lambda generator: _pair(Recurrent(nn.GRU), generator),
    "torch.Transformer": lambda generator: _pair(EncoderDecoder(), generator),
    "torch.TransformerEncoder": lambda generator: _pair(Encoder(), generator),
}
