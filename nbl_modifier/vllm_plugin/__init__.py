"""
vLLM side: linearized checkpoints served by an unmodified vLLM.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` and calls it in
every process it starts. Importing this package needs neither vllm nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from nbl_modifier.architectures import Architecture

__all__ = ["register"]


def register() -> None:
    """
    Make vLLM know the linearized models of every family that it serves itself.

    Models are registered by name, so this loads no model code. Safe to call again; a
    vLLM that was not tested is warned about once, not refused.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from nbl_modifier.architectures import ARCHITECTURES
    from nbl_modifier.hf.configuration_nbl import config_class

    from .versions import adjust_as_base, refuse_float16_as_base, warn_if_untested

    warn_if_untested()
    # hf.register() would import each family's transformers model, which vLLM never uses
    for architecture in ARCHITECTURES.values():
        refuse_float16_as_base(architecture)
        adjust_as_base(architecture)
        if architecture.causal_lm in ModelRegistry.get_supported_archs():
            AutoConfig.register(
                architecture.nbl_model_type,
                _as_base(architecture, config_class(architecture)),
                exist_ok=True,
            )
            ModelRegistry.register_model(
                architecture.nbl_causal_lm,
                f"{__name__}.model:{architecture.nbl_causal_lm}",
            )


def _as_base(
    architecture: Architecture, linearized: type[PreTrainedConfig]
) -> type[PreTrainedConfig]:
    """
    Return what reads a linearized configuration as one of the base model's type.

    By ``model_type`` vLLM decides what dtypes it refuses (Gemma), how a chat is parsed
    (gpt-oss), which of its layers are built (Qwen3.5), and more. What is read is of the
    class of linearized configurations, so that workers find it again.
    """

    class Reader(linearized):  # type: ignore[misc,valid-type]
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """As in transformers."""
            read = linearized.from_dict(config_dict, **kwargs)
            config = read[0] if isinstance(read, tuple) else read
            vars(config)["model_type"] = architecture.model_type
            return read

    return Reader
