# SPDX-License-Identifier: Apache-2.0
"""
NBL, then FP8 weights, activations and KV cache: `--kv-cache-dtype fp8` in vLLM.

Made for copying: set MODEL_ID to a Llama, Mistral or Qwen3 model, the data to yours.
Serve the result where nbl-modifier is installed: `vllm serve pycode-4m-NBL4-FP8-KV`.
"""

from pathlib import Path

from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from nbl_modifier import NBLModifier
from nbl_modifier.evaluation.texts import stdlib_texts
from nbl_modifier.evaluation.token_windows import pack

# Small, and trained on Python source, so that the example runs anywhere in seconds.
MODEL_ID = str(Path(__file__).parent / "models" / "pycode-4m")
OUTPUT = "pycode-4m-NBL4-FP8-KV"
KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}

model = AutoModelForCausalLM.from_pretrained(MODEL_ID, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(MODEL_ID)

# For a chat model: 256 or more conversations, as in llm-compressor's own examples. Ten
# times as many tokens as the hidden size is the least.
dataset = pack(stdlib_texts("calibration"), tokenizer, seq_length=256, num_sequences=32)

recipe = [
    NBLModifier(num_layers=4),
    QuantizationModifier(
        scheme="FP8_DYNAMIC",
        targets="Linear",
        ignore=["lm_head"],
        kv_cache_scheme=KV_CACHE,
    ),
]

oneshot(
    model=model,
    processor=tokenizer,
    dataset=dataset,
    recipe=recipe,
    num_calibration_samples=len(dataset),
    max_seq_length=256,
    output_dir=OUTPUT,
)

prompt = tokenizer(
    "<s>def main():\n    ", return_tensors="pt", add_special_tokens=False
)
tokens = model.generate(
    prompt.input_ids.to(model.device), max_new_tokens=32, do_sample=False
)
print(tokenizer.decode(tokens[0]))
