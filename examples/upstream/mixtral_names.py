# SPDX-License-Identifier: Apache-2.0
"""
llm-compressor saves Mixtral under names that nothing reads.

It splits fused experts into linear layers with names of its own, and puts the published
ones back for the families of ``ARCH_TO_2D_MAPPINGS`` (llmcompressor 0.14.0.1,
modeling/moe/conversion_mappings.py). Mixtral is not among them. transformers then has
random experts, and vLLM refuses the checkpoint.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors import safe_open
from transformers import MixtralConfig, MixtralForCausalLM


def main() -> int:
    """Return 0 if it is as described."""
    with tempfile.TemporaryDirectory() as folder:
        original, saved = Path(folder) / "original", Path(folder) / "saved"
        config = MixtralConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
            dtype=torch.float32,
        )
        MixtralForCausalLM(config).save_pretrained(original)
        model = MixtralForCausalLM.from_pretrained(original)
        # Attention only: experts stay as they are.
        recipe = QuantizationModifier(targets=["re:.*q_proj"], scheme="FP8_DYNAMIC")
        oneshot(model=model, recipe=recipe)
        model.save_pretrained(saved)
        for directory in (original, saved):
            with safe_open(directory / "model.safetensors", "pt") as file:
                names = [name for name in file.keys() if ".experts.0." in name]  # noqa: SIM118  # no dictionary
            print(f"{directory.name}: {min(names)}")
        loaded: Any = MixtralForCausalLM.from_pretrained(
            saved, output_loading_info=True
        )
    missing = sorted(name for name in loaded[1]["missing_keys"] if "experts" in name)
    print(f"experts with random weights after loading: {missing}")
    return int(not missing)


if __name__ == "__main__":
    sys.exit(main())
