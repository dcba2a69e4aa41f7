# SPDX-License-Identifier: Apache-2.0
"""
llm-compressor calibrates Mistral, Mixtral, Phi-3 and Qwen3-MoE without a causal mask.

Where a model hands its configuration to the function that makes the mask, the
sequential pipeline makes a new one of ``config.to_dict()`` (llmcompressor 0.14.0.1,
pipelines/sequential/helpers.py, ``SequentialTracer.create_arg``). That has no
``_attn_implementation``, and without it transformers makes no mask. All that is
calibrated in that pipeline sees activations of a model that looks into the future.
"""

import sys
from collections.abc import Callable

import torch
from llmcompressor.pipelines.sequential.helpers import trace_subgraphs
from llmcompressor.utils.helpers import calibration_forward_context
from transformers import MistralConfig, MistralForCausalLM


def main() -> int:
    """Return 0 if it is as described."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model = MistralForCausalLM(config).eval()
    first, second = torch.randint(128, (2, 1, 16))
    second[0, :8] = first[0, :8]  # the same beginning, another end

    seen: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda *call: seen.append(call[2]))

    def pipeline(tokens: torch.Tensor) -> None:
        values = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        with calibration_forward_context(model):
            for subgraph in trace_subgraphs(model, values, ["MistralDecoderLayer"], []):
                inputs = {name: values[name] for name in subgraph.input_names}
                values |= subgraph.forward(model, **inputs)

    def change(run: Callable[[torch.Tensor], object]) -> float:
        beginnings = []
        for tokens in (first, second):
            run(tokens)
            beginnings.append(seen[-1][0, :8])
        return (beginnings[0] - beginnings[1]).abs().max().item()

    with torch.no_grad():
        in_model, in_pipeline = change(model), change(pipeline)
    print("how much the last layer's output changes when only later tokens do:")
    print(f"  model               {in_model:.2g}")
    print(f"  sequential pipeline {in_pipeline:.2g}")
    return int(not in_model < 1e-4 < in_pipeline)


if __name__ == "__main__":
    sys.exit(main())
