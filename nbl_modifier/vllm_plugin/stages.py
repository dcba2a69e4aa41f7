"""Which placements of layers vLLM can make a KV cache for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.distributed.utils import get_pp_indices

__all__ = ["check_stages"]


def check_stages(linearized: Iterable[int], vllm_config: VllmConfig) -> None:
    """
    Refuse a placement of layers that vLLM cannot make a KV cache for.

    :param linearized: indices of the layers without attention
    :param vllm_config: says how many layers there are, and whether prefixes are cached
    :raises ValueError: naming the pipeline stages left without attention
    """
    num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    linear = set(linearized)
    num_stages = get_pp_group().world_size
    stages = [
        range(*get_pp_indices(num_layers, rank, num_stages))
        for rank in range(num_stages)
    ]
    empty = [rank for rank, stage in enumerate(stages) if linear.issuperset(stage)]
    if not empty:
        return
    if num_stages == 1:
        # Without any KV cache vLLM works, but for its prefix cache.
        if vllm_config.cache_config.enable_prefix_caching:
            raise ValueError(
                f"nbl_config: none of the {num_layers} layers has attention, so there "
                "is no KV cache, and vLLM's prefix caching needs one. Start vLLM with "
                "--no-enable-prefix-caching."
            )
        return
    if linear.issuperset(range(num_layers)):
        remedy = (
            "No layer of this model has attention: start vLLM with "
            "--pipeline-parallel-size 1."
        )
    else:
        remedy = (
            f"Layers with attention are {sorted(set(range(num_layers)) - linear)}: "
            "give each stage one of them by setting VLLM_PP_LAYER_PARTITION, the "
            f"layers per stage, now {','.join(str(len(stage)) for stage in stages)}, "
            "or use fewer stages."
        )
    raise ValueError(
        f"pipeline parallel size {num_stages}: each stage needs an attention layer, "
        "since vLLM cannot serve a stage without KV cache, got none in "
        f"{'; '.join(f'stage {rank}: {_span(stages[rank])}' for rank in empty)}. "
        f"{remedy}"
    )


def _span(stage: Sequence[int]) -> str:
    return f"layers {stage[0]} to {stage[-1]}"
