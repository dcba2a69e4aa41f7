"""
vLLM side: linearized checkpoints served by an unmodified vLLM.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` and calls it in
every process it starts. Importing this package needs neither vllm nor torch.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from nbl_modifier.architectures import Architecture

__all__ = ["TESTED_VLLM", "register"]

#: (major, minor) of the vLLM releases this plugin is tested with.
TESTED_VLLM = (0, 32)


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

    _warn_if_untested()
    # hf.register() would import each family's transformers model, which vLLM never uses
    for architecture in ARCHITECTURES.values():
        _adjust_as_base(architecture)
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


def _adjust_as_base(architecture: Architecture) -> None:
    """
    Have vLLM adjust its configuration as it does for the base model.

    It knows what to adjust by the name of the model's class (vLLM 0.30 to 0.33,
    model_executor/models/config.py).
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    if architecture.causal_lm in MODELS_CONFIG_MAP:
        adjust = MODELS_CONFIG_MAP[architecture.causal_lm]
        MODELS_CONFIG_MAP[architecture.nbl_causal_lm] = adjust


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


@cache
def _warn_if_untested() -> None:
    """Warn when vLLM is another release than :data:`TESTED_VLLM`, once per process."""
    from multiprocessing import parent_process

    import vllm
    from vllm.logger import init_logger

    # Engine and workers are children and load the same vLLM: one warning is enough.
    if vllm.__version_tuple__[:2] != TESTED_VLLM and parent_process() is None:
        tested = ".".join(map(str, TESTED_VLLM))
        init_logger(f"vllm.{__name__}").warning(
            "nbl_modifier is tested with vLLM %s.x, this is vLLM %s. Linearized "
            "checkpoints may fail to load, or gain no KV-cache capacity. If so, "
            "install vLLM %s.x, or a nbl_modifier tested with yours.",
            tested,
            vllm.__version__,
            tested,
        )
