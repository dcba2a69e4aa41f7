"""
transformers side: configuration and model classes of linearized checkpoints.

Importing this package does nothing; :func:`register` makes transformers' Auto classes
load linearized checkpoints.
"""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["register"]


def register() -> None:
    """
    Make ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` (or
    ``AutoModelForImageTextToText``) know every supported family's linearized models,
    and PEFT, where it is installed, adapt the same modules of them as of base models.
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
    if find_spec("peft") is not None:
        _register_adapters()


def _register_adapters() -> None:
    """
    Give linearized models the target modules that PEFT has for their base models.

    It looks them up by ``model_type`` where a configuration names none.
    """
    from peft.utils import constants

    from nbl_modifier.architectures import ARCHITECTURES

    for name, defaults in vars(constants).items():
        if name.endswith("_MODULES_MAPPING"):
            for architecture in ARCHITECTURES.values():
                if architecture.model_type in defaults:
                    defaults.setdefault(
                        architecture.nbl_model_type, defaults[architecture.model_type]
                    )
