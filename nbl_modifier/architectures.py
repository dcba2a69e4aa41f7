"""
Where layers, attention and norms sit, one row per model family.

Standard library only: read by the compressing side, by transformers and by vLLM alike,
and copied beside checkpoints that carry their own modelling code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of"]

_PREFIX = "nbl_"


@dataclass(frozen=True)
class Architecture:
    """
    One supported model family.

    What attention adds to the residual stream is its output, multiplied by
    ``output_scale`` and passed through ``post_norm`` where a family has these.

    :param model_type: ``config.model_type`` of the base model in transformers
    :param causal_lm: class name of the model with its head, the same in transformers
        and in vLLM's registry
    :param base_model: class name of the model without a head in transformers
    :param auto_class: transformers' Auto class that loads the model with its head
    :param layers: path of the decoder layer list inside the model
    :param vllm_layers: the same in vLLM, if it is another
    :param attention: name of the attention module inside a decoder layer
    :param input_norm: name of the norm in front of attention inside a decoder layer;
        None if attention reads the residual stream itself
    :param post_norm: name of the norm between attention's output and the residual
        stream, or None
    :param parallel: whether the MLP reads the output of ``input_norm``, too
    :param output_scale: name of a decoder layer's factor between attention's output and
        the residual stream, or None
    :param awq_mappings_of: class name under which llm-compressor knows what AWQ can
        smooth here, where it knows nothing of ``causal_lm`` itself
    :param expert_names: weights of an expert that checkpoints name otherwise than
        llm-compressor does: its name, theirs
    :param vllm_stream: how vLLM's decoder layers hand on the residual stream: as the
        ``sum`` of the two tensors they return, as the ``first`` of them, as the
        ``only`` one, or as the ``lone`` one beside None
    :param vllm_attention: name of the attention module in vLLM, if it is another
    """

    model_type: str
    causal_lm: str
    base_model: str
    auto_class: str = "AutoModelForCausalLM"
    layers: str = "model.layers"
    vllm_layers: str | None = None
    attention: str = "self_attn"
    input_norm: str | None = "input_layernorm"
    post_norm: str | None = None
    parallel: bool = False
    output_scale: str | None = None
    awq_mappings_of: str | None = None
    expert_names: tuple[tuple[str, str], ...] = ()
    vllm_stream: str = "sum"
    vllm_attention: str | None = None

    @property
    def nbl_model_type(self) -> str:
        """``model_type`` of a linearized checkpoint, which no stock loader knows."""
        return _PREFIX + self.model_type

    @property
    def nbl_causal_lm(self) -> str:
        """Class name of the linearized causal language model."""
        return "NBL" + self.causal_lm

    @property
    def nbl_base_model(self) -> str:
        """Class name of the linearized decoder without a head."""
        return "NBL" + self.base_model

    def layer_name(self, index: int) -> str:
        """Module name of decoder layer ``index``."""
        return f"{self.layers}.{index}"

    def attention_name(self, index: int) -> str:
        """Module name of the attention of decoder layer ``index``."""
        return f"{self.layer_name(index)}.{self.attention}"

    @property
    def inputs(self) -> tuple[Literal["residual", "normalized"], ...]:
        """
        What a linear layer of this family can read, ``residual``, ``normalized``.

        A norm that the MLP reads, too, cannot be folded into the linear layer.
        """
        if self.input_norm is None:
            return ("residual",)
        return ("normalized",) if self.parallel else ("residual", "normalized")

    def folded_norms(self, input: str) -> tuple[str, ...]:  # as the field
        """
        Return the norms of a decoder layer that its linear layer takes the place of.

        :param input: what the linear layer reads
        """
        folds_input = input == "residual" and not self.parallel
        norms = (self.input_norm if folds_input else None, self.post_norm)
        return tuple(name for name in norms if name is not None)


ARCHITECTURES: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture("llama", "LlamaForCausalLM", "LlamaModel"),
        # A vision tower, and a text model of the type Llama or Mistral.
        Architecture(
            "llava",
            "LlavaForConditionalGeneration",
            "LlavaModel",
            auto_class="AutoModelForImageTextToText",
            layers="model.language_model.layers",
            vllm_layers="language_model.model.layers",
        ),
        Architecture(
            "mistral3",
            "Mistral3ForConditionalGeneration",
            "Mistral3Model",
            auto_class="AutoModelForImageTextToText",
            layers="model.language_model.layers",
            vllm_layers="language_model.model.layers",
        ),
        Architecture(
            "qwen2_5_vl",
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5_VLModel",
            auto_class="AutoModelForImageTextToText",
            layers="model.language_model.layers",
            vllm_layers="language_model.model.layers",
        ),
        Architecture(
            "gemma3",
            "Gemma3ForConditionalGeneration",
            "Gemma3Model",
            auto_class="AutoModelForImageTextToText",
            layers="model.language_model.layers",
            vllm_layers="language_model.model.layers",
            post_norm="post_attention_layernorm",
        ),
        Architecture("mistral", "MistralForCausalLM", "MistralModel"),
        Architecture("qwen2", "Qwen2ForCausalLM", "Qwen2Model"),
        Architecture("qwen3", "Qwen3ForCausalLM", "Qwen3Model"),
        Architecture("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeModel"),
        Architecture(
            "mixtral",
            "MixtralForCausalLM",
            "MixtralModel",
            awq_mappings_of="Qwen3MoeForCausalLM",
            expert_names=(("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")),
        ),
        Architecture("phi3", "Phi3ForCausalLM", "Phi3Model"),
        Architecture(
            "granite",
            "GraniteForCausalLM",
            "GraniteModel",
            output_scale="residual_multiplier",
            vllm_stream="only",
        ),
        Architecture(
            "gemma2",
            "Gemma2ForCausalLM",
            "Gemma2Model",
            post_norm="post_attention_layernorm",
        ),
        Architecture(
            "gemma3_text",
            "Gemma3ForCausalLM",
            "Gemma3TextModel",
            post_norm="post_attention_layernorm",
        ),
        Architecture(
            "olmo2",
            "Olmo2ForCausalLM",
            "Olmo2Model",
            awq_mappings_of="Olmo3ForCausalLM",
            input_norm=None,
            post_norm="post_attention_layernorm",
            vllm_stream="only",
        ),
        Architecture(
            "cohere",
            "CohereForCausalLM",
            "CohereModel",
            parallel=True,
            vllm_stream="first",
        ),
        Architecture(
            "cohere2",
            "Cohere2ForCausalLM",
            "Cohere2Model",
            parallel=True,
            vllm_stream="first",
        ),
        Architecture("smollm3", "SmolLM3ForCausalLM", "SmolLM3Model"),
        Architecture(
            "olmo3",
            "Olmo3ForCausalLM",
            "Olmo3Model",
            input_norm=None,
            post_norm="post_attention_layernorm",
            vllm_stream="only",
        ),
        Architecture("seed_oss", "SeedOssForCausalLM", "SeedOssModel"),
        Architecture("starcoder2", "Starcoder2ForCausalLM", "Starcoder2Model"),
        Architecture(
            "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Model"
        ),
        Architecture("ministral3", "Ministral3ForCausalLM", "Ministral3Model"),
        Architecture(
            "glm4", "Glm4ForCausalLM", "Glm4Model", post_norm="post_self_attn_layernorm"
        ),
        Architecture("glm4_moe", "Glm4MoeForCausalLM", "Glm4MoeModel"),
        Architecture(
            "exaone4",
            "Exaone4ForCausalLM",
            "Exaone4Model",
            input_norm=None,
            post_norm="post_attention_layernorm",
            vllm_stream="first",
        ),
        Architecture("nemotron", "NemotronForCausalLM", "NemotronModel"),
        Architecture(
            "gemma4_text",
            "Gemma4ForCausalLM",
            "Gemma4TextModel",
            post_norm="post_attention_layernorm",
            vllm_stream="lone",
        ),
        Architecture("ernie4_5", "Ernie4_5ForCausalLM", "Ernie4_5Model"),
        # Every few layers attention, the others a gated delta net.
        Architecture("qwen3_5_text", "Qwen3_5ForCausalLM", "Qwen3_5TextModel"),
        Architecture(
            "gpt_oss", "GptOssForCausalLM", "GptOssModel", vllm_attention="attn"
        ),
        # Some layers attention, the others Mamba 2.
        Architecture(
            "granitemoehybrid",
            "GraniteMoeHybridForCausalLM",
            "GraniteMoeHybridModel",
            output_scale="residual_multiplier",
            vllm_stream="first",
        ),
        Architecture("deepseek_v3", "DeepseekV3ForCausalLM", "DeepseekV3Model"),
        Architecture(
            "minimax_m2",
            "MiniMaxM2ForCausalLM",
            "MiniMaxM2Model",
            expert_names=(("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")),
        ),
    )
}


def architecture_of(model_type: str) -> Architecture:
    """
    Return the row of a base or linearized model type.

    :param model_type: ``config.model_type``, e.g. ``llama`` or ``nbl_llama``
    :return: its row in :data:`ARCHITECTURES`
    :raises NotImplementedError: if the family has no row
    """
    row = ARCHITECTURES.get(model_type.removeprefix(_PREFIX))
    if row is None:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise NotImplementedError(
            f"model type {model_type!r} is not supported by nbl_modifier; supported: "
            f"{supported}. To add a family, add its row to "
            f"nbl_modifier/architectures.py (see CONTRIBUTING.md)."
        )
    return row
