"""
Where layers, attention and norms sit, one row per model family.

Standard library only: read by the compressing side, by transformers and by vLLM alike,
and copied beside checkpoints that carry their own modelling code.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of"]

_PREFIX = "nbl_"


@dataclass(frozen=True)
class Architecture:
    """
    One supported model family.

    :param model_type: ``config.model_type`` of the base model in transformers
    :param causal_lm: class name of the causal language model, the same in
        transformers and in vLLM's registry
    :param layers: path of the decoder layer list inside the causal language model
    :param attention: name of the attention module inside a decoder layer
    :param input_norm: name of the norm in front of attention inside a decoder layer
    :param vllm_stream: how vLLM's decoder layers hand on the residual stream: as the
        ``sum`` of the two tensors they return, as the ``first`` of them, or as the
        ``only`` one
    """

    model_type: str
    causal_lm: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    input_norm: str = "input_layernorm"
    vllm_stream: str = "sum"

    @property
    def nbl_model_type(self) -> str:
        """``model_type`` of a linearized checkpoint, which no stock loader knows."""
        return _PREFIX + self.model_type

    @property
    def nbl_causal_lm(self) -> str:
        """Class name of the linearized causal language model."""
        return "NBL" + self.causal_lm

    @property
    def base_model(self) -> str:
        """Class name of the decoder without a head in transformers."""
        return self.causal_lm.removesuffix("ForCausalLM") + "Model"

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


ARCHITECTURES: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture(model_type="llama", causal_lm="LlamaForCausalLM"),
        Architecture(model_type="mistral", causal_lm="MistralForCausalLM"),
        Architecture(model_type="qwen3", causal_lm="Qwen3ForCausalLM"),
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
