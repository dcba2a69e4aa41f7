# SPDX-License-Identifier: Apache-2.0
"""One small random model per supported family, the same in every kind of test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCAB_SIZE = 128
MAX_LENGTH = 256
SLIDING_WINDOW = 32
IMAGE_TOKEN = 1
IMAGE_SIZE = 8

_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "norm_topk_prob": True}
_DEEPSEEK_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_SLIDING: dict[str, Any] = {"sliding_window": SLIDING_WINDOW}
# By turns.
_SLIDING_KINDS = ("sliding_attention", "full_attention")
_HYBRID_KINDS = ("linear_attention", "full_attention")
#: Configuration of each family beyond what all share, by ``model_type``.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llava": {"image_seq_length": 4},
    "mistral": _SLIDING,
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, **_EXPERTS},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": _SLIDING,
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.6,
    },
    "gemma2": _SLIDING,
    "gemma3_text": _SLIDING,
    "olmo2": {},
    "cohere": {"logit_scale": 1.0},
    # No shorter window: in vLLM it sees a token more than in transformers.
    "cohere2": {"logit_scale": 1.0, "sliding_window": MAX_LENGTH},
    "smollm3": {"no_rope_layers": [1, 0] * 20},
    "olmo3": _SLIDING,
    "seed_oss": {},
    "starcoder2": _SLIDING,
    "hunyuan_v1_dense": {},
    "ministral3": _SLIDING,
    "glm4": {},
    "glm4_moe": _DEEPSEEK_EXPERTS,
    "exaone4": _SLIDING,
    "nemotron": {},
    "gemma4_text": {**_SLIDING, "hidden_size_per_layer_input": 0},
    "ernie4_5": {},
    "qwen3_5_text": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        # vLLM's kernel for CPUs has 64 and 128 only
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **_SLIDING},
    "granitemoehybrid": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.6,
        "num_local_experts": 0,
        "mamba_n_heads": 8,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "mamba_chunk_size": 16,
    },
    "deepseek_v3": {
        "q_lora_rank": 24,
        # as published: vLLM's kernel for CPUs has no other size
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 64,
        "v_head_dim": 8,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        **_DEEPSEEK_EXPERTS,
    },
    "minimax_m2": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        # as published; vLLM reads them, transformers does not
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
    },
    "mistral3": {"spatial_merge_size": 1},
    "qwen2_5_vl": {"video_token_id": 0},
    "gemma3": {"mm_tokens_per_image": 4, "boi_token_index": 0, "eoi_token_index": 0},
}
#: Families that every test takes; the others go through ``test_more_families.py``.
THOROUGH = tuple(FAMILIES)[:13]
# What the language model of one that sees images is, and what its vision tower is.
_TEXT_MODELS = {
    "llava": "llama",
    "mistral3": "mistral",
    "qwen2_5_vl": "qwen2",
    "gemma3": "gemma3_text",
}
_VISION: dict[str, dict[str, Any]] = {
    "llava": {"model_type": "clip_vision_model", "projection_dim": 32},
    "mistral3": {"model_type": "pixtral"},
    "qwen2_5_vl": {"depth": 2, "num_heads": 2, "fullatt_block_indexes": [1]},
    "gemma3": {"model_type": "siglip_vision_model"},
}
_KINDS = {
    "gemma2": _SLIDING_KINDS,
    "gemma3_text": _SLIDING_KINDS,
    "gemma3": _SLIDING_KINDS,
    "gemma4_text": _SLIDING_KINDS,
    "olmo3": _SLIDING_KINDS,
    "cohere2": _SLIDING_KINDS,
    "exaone4": _SLIDING_KINDS,
    "gpt_oss": _SLIDING_KINDS,
    "qwen3_5_text": _HYBRID_KINDS,
    "granitemoehybrid": _HYBRID_KINDS,
}
# Their classes in vLLM have no head of their own.
_ALWAYS_TIED = {"cohere", "cohere2", "gemma2", "gemma3", "gemma3_text", "gemma4_text"}


def family_config(
    model_type: str,
    *,
    num_layers: int = 4,
    hidden_size: int = 32,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    vocab_size: int = VOCAB_SIZE,
    tied: bool = False,
    max_length: int = MAX_LENGTH,
    layer_types: Sequence[str] | None = None,
) -> Any:
    """
    Return the configuration of a small model.

    :param model_type: its family, a key of ``FAMILIES``
    :param num_layers: decoder layers; where the family has sliding layers, every other
        one, the first included
    :param hidden_size: width
    :param num_attention_heads: of ``hidden_size / num_attention_heads`` each
    :param num_key_value_heads: a divisor of ``num_attention_heads``
    :param vocab_size: token ids
    :param tied: whether embedding and head share their weight; some families always do
    :param max_length: tokens that positions are made for
    :param layer_types: the kind of each layer instead, where the family has two
    """
    from transformers import CONFIG_MAPPING

    head_dim = hidden_size // num_attention_heads
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_length,
        "initializer_range": 1.2 * hidden_size**-0.5,
        "tie_word_embeddings": tied or model_type in _ALWAYS_TIED,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if model_type in ("qwen3_moe", "glm4_moe", "deepseek_v3"):
        fields["moe_intermediate_size"] = 2 * hidden_size
    if model_type == "granitemoehybrid":
        fields["shared_intermediate_size"] = 2 * hidden_size
        fields["mamba_d_head"] = 2 * hidden_size // 8
    if model_type == "minimax_m2":
        fields["rotary_dim"] = head_dim
    if model_type == "deepseek_v3":  # heads are its own
        del fields["head_dim"]
        fields["num_key_value_heads"] = num_attention_heads
    if model_type in ("gemma2", "gemma3", "gemma3_text"):
        fields["query_pre_attn_scalar"] = head_dim
    if model_type in _KINDS:
        kinds = _KINDS[model_type]
        by_turns = [kinds[i % 2] for i in range(num_layers)]
        fields["layer_types"] = list(layer_types or by_turns)
    if model_type == "gemma4_text":  # as large again where they see everything
        fields["per_layer_config"] = {
            i: {"head_dim": 2 * head_dim}
            for i, kind in enumerate(fields["layer_types"])
            if kind == "full_attention"
        }
        fields["vocab_size_per_layer_input"] = vocab_size
    if model_type in _TEXT_MODELS:
        return _vision_language_config(model_type, fields)
    config_class: Any = CONFIG_MAPPING[model_type]
    return config_class(**fields, **FAMILIES[model_type])


def _vision_language_config(model_type: str, text: dict[str, Any]) -> Any:
    """Return that of a model that sees images of 8 x 8: four patches, a token each."""
    from transformers import CONFIG_MAPPING

    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": IMAGE_SIZE // 2,
        **_VISION[model_type],
    }
    family = _TEXT_MODELS[model_type]
    text = {"model_type": family, **text, **FAMILIES[family]}
    image_token = "image_token_index"
    if model_type == "qwen2_5_vl":
        image_token, vision["out_hidden_size"] = "image_token_id", text["hidden_size"]
        text["model_type"] = "qwen2_5_vl_text"
        quarter = text["head_dim"] // 4  # of its angles for time, the others for space
        sections = [2 * quarter - 2 * (quarter // 2), quarter // 2, quarter // 2]
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": sections,
        }
    config_class: Any = CONFIG_MAPPING[model_type]
    return config_class(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
        **{image_token: IMAGE_TOKEN},
        **FAMILIES[model_type],
    )


def with_attention(model_type: str, num_layers: int) -> list[int]:
    """Return the layers of a small model that are not recurrent."""
    step = 2 if _KINDS.get(model_type) == _HYBRID_KINDS else 1
    return list(range(step - 1, num_layers, step))


def save_tiny(
    folder: Path,
    model_type: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **sizes: Any,
) -> Path:
    """
    Save a random model, since oneshot() wants a model that comes from a directory.

    The weights are large enough for attention to look around and for logits to differ,
    norms and biases are random, so that folding one away or keeping it is visible.

    :param folder: where to; must not exist
    :param model_type: its family, a key of ``FAMILIES``
    :param dtype: of the weights
    :param seed: of the weights
    :param sizes: of :func:`family_config`
    :return: ``folder``
    """
    import transformers

    from nbl_modifier.architectures import ARCHITECTURES

    auto_class = getattr(transformers, ARCHITECTURES[model_type].auto_class)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = family_config(model_type, **sizes)
        model: Any = auto_class.from_config(config)
        for name, weight in model.named_parameters():
            if "norm" in name:  # around 1, or around 0 where 1 is added to it
                nn.init.normal_(weight, mean=float(weight.detach().mean()), std=0.3)
            elif name.endswith("bias"):
                nn.init.normal_(weight, std=0.3)
            elif name.endswith("embed_tokens.weight") and "gemma" in model_type:
                # tied, and scaled by sqrt(hidden_size): tokens would predict themselves
                weight.data.div_(4)
    model.to(dtype).save_pretrained(folder)
    if model_type == "llava":
        _name_vision_weights_as_published(folder / "model.safetensors")
        _save_processor(folder, config)
    return folder


def _name_vision_weights_as_published(path: Path) -> None:
    """
    Put back the level of names that transformers 5 drops from a model made by it.

    Published checkpoints have it, transformers keeps it in those that it has loaded,
    and vLLM 0.32 reads no others.
    """
    from safetensors.torch import load_file, save_file

    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def _save_processor(folder: Path, config: Any) -> None:
    """Save what makes inputs of words ``t2``, ``t3``, ... and of images."""
    import tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, TokenizersBackend

    words = {f"t{i}": i for i in range(config.text_config.vocab_size)}
    words["<image>"] = words.pop(f"t{IMAGE_TOKEN}")
    model = tokenizers.models.WordLevel(words, unk_token="t0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    LlavaProcessor(
        CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        ),
        TokenizersBackend(
            tokenizer_object=tokenizer,
            pad_token="t0",  # a word
            extra_special_tokens={"image_token": "<image>"},
        ),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's class embedding
    ).save_pretrained(folder)


def save_for_vllm(folder: Path, model_type: str, **kwargs: Any) -> Path:
    """
    Save a random model that vLLM serves, on two ranks and with 4-bit weights, too.

    Six layers, eight heads of 32 on two key-value heads: half of any input dimension is
    a multiple of 128, the group size of W4A16.

    :param folder: where to; must not exist
    :param model_type: its family, a key of ``FAMILIES``
    :param kwargs: of :func:`save_tiny`, over these sizes
    :return: ``folder``
    """
    sizes: dict[str, Any] = {
        "num_layers": 6,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "vocab_size": 512,
    }
    return save_tiny(folder, model_type, **sizes | kwargs)
