# SPDX-License-Identifier: Apache-2.0
"""
Quantize a checkpoint that was linearized and saved before, without NBL in the recipe.

The first half makes such a checkpoint; with one of your own, start at the second.
"""

from pathlib import Path

from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoTokenizer

# Importing it is what makes llm-compressor and transformers know linearized models.
from nbl_modifier import NBLModifier
from nbl_modifier.evaluation.texts import stdlib_texts
from nbl_modifier.evaluation.token_windows import pack

MODEL_ID = str(Path(__file__).parent / "models" / "pycode-4m")
LINEARIZED = "pycode-4m-NBL4"
OUTPUT = "pycode-4m-NBL4-then-W4A16"

tokenizer = AutoTokenizer.from_pretrained(MODEL_ID)
dataset = pack(stdlib_texts("calibration"), tokenizer, seq_length=256, num_sequences=32)
data = {
    "dataset": dataset,
    "processor": tokenizer,
    "num_calibration_samples": len(dataset),
    "max_seq_length": 256,
}

oneshot(model=MODEL_ID, recipe=NBLModifier(num_layers=4), output_dir=LINEARIZED, **data)

recipe = GPTQModifier(scheme="W4A16", targets="Linear", ignore=["lm_head"])
model = oneshot(model=LINEARIZED, recipe=recipe, output_dir=OUTPUT, **data)
layers = list(model.config.nbl_config["layers"])
print(f"{OUTPUT}: {type(model).__name__}, linear layers {layers}")
