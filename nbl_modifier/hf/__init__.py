"""
transformers side: configuration and model classes of linearized checkpoints.

Importing this package does nothing; :func:`register` makes transformers' Auto classes
load linearized checkpoints.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """
    Make ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` (or
    ``AutoModelForImageTextToText``) know every supported family's linearized models.
    Safe to call again.
    """
    import transformers
    from transformers import AutoConfig, AutoModel

    from nbl_modifier.architectures import ARCHITECTURES

    from .configuration_nbl import config_class
    from .modeling_nbl import model_class

    for architecture in ARCHITECTURES.values():
        config = config_class(architecture)
        AutoConfig.register(architecture.nbl_model_type, config, exist_ok=True)
        AutoModel.register(
            config, model_class(architecture.base_model, architecture), exist_ok=True
        )
        getattr(transformers, architecture.auto_class).register(
            config, model_class(architecture.causal_lm, architecture), exist_ok=True
        )
