"""
What depends on which vLLM it is.

The plugin has one code for every release of :data:`TESTED_VLLM`: what it calls is the
same in all of them. Here is which these are, and what it reads of vLLM by names that
vLLM promises nobody. ``make integration-versions`` runs each; ``docs/versions.md`` says
what was found, and what may move next.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbl_modifier.architectures import Architecture

__all__ = [
    "TESTED_VLLM",
    "adjust_as_base",
    "is_tested",
    "refuse_float16_as_base",
    "warn_if_untested",
]

#: (major, minor) of the oldest and the newest vLLM release this plugin is tested with.
TESTED_VLLM = ((0, 30), (0, 33))


def is_tested(version: Sequence[int | str]) -> bool:
    """
    Return whether a release is in :data:`TESTED_VLLM`, both ends included.

    :param version: ``vllm.__version_tuple__``: numbers, then maybe words
    """
    oldest, newest = TESTED_VLLM
    return oldest <= tuple(version[:2]) <= newest


@cache
def warn_if_untested() -> None:
    """Warn when vLLM is another release than :data:`TESTED_VLLM`, once per process."""
    from multiprocessing import parent_process

    import vllm
    from vllm.logger import init_logger

    # Engine and workers are children and load the same vLLM: one warning is enough.
    if is_tested(vllm.__version_tuple__) or parent_process() is not None:
        return
    oldest, newest = (".".join(map(str, end)) for end in TESTED_VLLM)
    init_logger(f"vllm.{__name__}").warning(
        "nbl_modifier is tested with vLLM %s to %s, this is vLLM %s. Linearized "
        "checkpoints may fail to load, or gain no KV-cache capacity. If so, install "
        "one of those, or a nbl_modifier tested with yours.",
        oldest,
        newest,
        vllm.__version__,
    )


def refuse_float16_as_base(architecture: Architecture) -> None:
    """
    Have vLLM refuse float16 where it refuses it for the base model (Gemma).

    It knows such models by ``model_type``, in a table of its own (vLLM 0.30 to 0.33,
    config/model.py). Without that table it accepts float16, as it then does for the
    base model.

    :param architecture: a family
    """
    from vllm.config import model

    reasons: dict[str, str] = getattr(model, "_FLOAT16_NOT_SUPPORTED_MODELS", {})
    if architecture.model_type in reasons:
        reasons[architecture.nbl_model_type] = reasons[architecture.model_type]


def adjust_as_base(architecture: Architecture) -> None:
    """
    Have vLLM adjust its configuration as it does for the base model.

    It knows what to adjust by the name of the model's class (vLLM 0.30 to 0.33,
    model_executor/models/config.py).

    :param architecture: a family
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    if architecture.causal_lm in MODELS_CONFIG_MAP:
        adjust = MODELS_CONFIG_MAP[architecture.causal_lm]
        MODELS_CONFIG_MAP[architecture.nbl_causal_lm] = adjust
