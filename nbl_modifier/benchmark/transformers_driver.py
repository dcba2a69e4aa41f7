# SPDX-License-Identifier: Apache-2.0
"""Times a model in transformers, with the KV cache that it generates with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .machine import available_bytes, current_device, device_name
from .timing import Timing, now, random_prompts

if TYPE_CHECKING:
    from .serving import Job

__all__ = ["TransformersDriver"]


class TransformersDriver:
    """
    Generates greedily: one call of the model for the prompts, then one per token.

    :param job: what to load
    """

    def __init__(self, job: Job) -> None:
        import transformers

        import nbl_modifier.hf
        from nbl_modifier.architectures import architecture_of

        nbl_modifier.hf.register()
        config = transformers.AutoConfig.from_pretrained(job.model)
        auto_class = getattr(
            transformers, architecture_of(config.model_type).auto_class
        )
        self.device = current_device()
        self._vocab_size = job.vocab_size
        options = {
            "dtype": getattr(torch, job.dtype),
            "attn_implementation": job.attention,
        }
        with torch.device(self.device):
            if job.random_weights:
                model = auto_class.from_config(config, **options)
            else:
                model = auto_class.from_pretrained(job.model, **options)
        self._model: Any = model.eval().to(self.device)

    def describe(self) -> dict[str, Any]:
        """Return what the engine knows; transformers allots no cache in advance."""
        return {
            "architecture": type(self._model).__name__,
            "kv_cache_tokens": None,
            "block_size": None,
            "tokens_per_pass": None,
            "available_bytes": available_bytes(self.device),
            "device": device_name(self.device),
        }

    @torch.inference_mode()
    def measure(self, batch: int, context: int, generate: int, seed: int) -> Timing:
        """Time the prompts' forward pass, then ``generate`` greedy steps."""
        prompts = random_prompts(self._vocab_size, batch, context, seed)
        tokens = torch.tensor(prompts, device=self.device)
        started_at = now(self.device)
        output = self._model(tokens, use_cache=True, logits_to_keep=1)
        tokens = output.logits[:, -1:].argmax(dim=-1)
        prefill = now(self.device) - started_at
        cache = output.past_key_values
        kept = sum(_cache_bytes(layer) for layer in cache.layers)
        started_at = now(self.device)
        for _ in range(generate):
            output = self._model(tokens, past_key_values=cache, use_cache=True)
            tokens = output.logits[:, -1:].argmax(dim=-1)
        return Timing(
            prefill_seconds=prefill,
            decode_seconds=now(self.device) - started_at,
            decode_steps=generate,
            # Step i, from 1, reads context + i tokens: the mean over all steps.
            cache_tokens=context + (generate + 1) / 2,
            # What the prompts alone had put into the cache.
            cache_bytes=kept / (batch * context),
        )


def _cache_bytes(layer: Any) -> int:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    return sum(each.nbytes for each in (keys, values) if each is not None)
