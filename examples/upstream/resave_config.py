# SPDX-License-Identifier: Apache-2.0
"""
llm-compressor saves the configuration that the model was loaded with.

Its ``save_pretrained`` puts the original's ``config.json`` back, with a few fields of
its own brought up to date (llmcompressor 0.14.0.1, ``resave_config`` in
transformers/compression/compressed_tensors_utils.py). What a modifier of another
package has changed in the configuration is lost without a word.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from llmcompressor.transformers.compression.compressed_tensors_utils import (
    modify_save_pretrained,
)
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> int:
    """Return 0 if it is as described."""
    with tempfile.TemporaryDirectory() as folder:
        original, saved = Path(folder) / "original", Path(folder) / "saved"
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            dtype=torch.float32,
        )
        LlamaForCausalLM(config).save_pretrained(original)
        model = LlamaForCausalLM.from_pretrained(original)
        model.config.linear_layers = [1]
        modify_save_pretrained(model)
        model.save_pretrained(saved)
        found = json.loads((saved / "config.json").read_text("utf-8"))
    print(f"model.config.linear_layers: {model.config.linear_layers}")
    print(f"saved config.json:          {found.get('linear_layers', 'not there')}")
    return int("linear_layers" in found)


if __name__ == "__main__":
    sys.exit(main())
