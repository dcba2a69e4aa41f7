# SPDX-License-Identifier: Apache-2.0
"""
Does a quantizer cost more after NBL than it costs alone?

Prints the perplexity of the base model, after NBL, after AWQ to 4 bits, and after both
in one recipe. If composition costs nothing extra, the two degradations multiply::

    python benchmarks/composition.py
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

from nbl_modifier import NBLModifier
from nbl_modifier.cli.logs import show_ours_and_warnings
from nbl_modifier.evaluation import PerplexityResult, perplexity
from nbl_modifier.evaluation.texts import stdlib_texts
from nbl_modifier.evaluation.token_windows import pack

MODEL = Path(__file__).resolve().parents[1] / "examples" / "models" / "pycode-4m"


def measure(
    model: str,
    recipe: list[Modifier],
    tokenizer: Any,
    calibration: Dataset,
    heldout: Dataset,
) -> PerplexityResult:
    """
    Return the perplexity after ``recipe``.

    :param model: directory or Hugging Face name
    :param recipe: may be empty
    :param tokenizer: the model's
    :param calibration: tokenized windows
    :param heldout: other windows
    """
    torch.manual_seed(0)
    compressed: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    if recipe:
        compressed = oneshot(
            model=compressed,
            processor=tokenizer,
            dataset=calibration,
            recipe=recipe,
            num_calibration_samples=len(calibration),
            shuffle_calibration_samples=False,
            batch_size=8,
        )
    return perplexity(compressed, heldout)


def awq() -> list[Modifier]:
    """Return AWQ to 4 bits, as in recipes/nbl_awq_w4a16_asym.yaml."""
    return [
        AWQModifier(),
        QuantizationModifier(
            scheme="W4A16_ASYM", targets=["Linear"], ignore=["lm_head"]
        ),
    ]


def main() -> int:
    """Measure and print; fail if both together are 3% worse than the product."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--input", default="normalized")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--heldout-samples", type=int, default=128)
    parser.add_argument("--seq-length", type=int, default=256)
    args = parser.parse_args()
    show_ours_and_warnings()
    if not torch.accelerator.is_available():
        # AWQ pins its cache, which torch refuses there (llmcompressor 0.14.0.1,
        # modifiers/transform/awq/base.py, ``_setup_activation_cache_hooks``).
        IntermediatesCache.pin_memory = lambda *_, **__: None  # type: ignore[method-assign]

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration = pack(
        stdlib_texts("calibration"), tokenizer, args.seq_length, args.num_samples
    )
    heldout = pack(
        stdlib_texts("heldout"), tokenizer, args.seq_length, args.heldout_samples
    )

    def nbl() -> list[Modifier]:
        return [NBLModifier(num_layers=args.num_layers, input=args.input)]

    recipes = {"base": [], "NBL": nbl(), "AWQ": awq(), "NBL + AWQ": [*nbl(), *awq()]}
    results = {
        name: measure(args.model, recipe, tokenizer, calibration, heldout)
        for name, recipe in recipes.items()
    }
    base = results["base"]
    print(f"\n{'perplexity':<12} {base.num_tokens:,} tokens   times base")
    for name, result in results.items():
        ratio, error = result.relative_to(base)
        print(f"{name:<12} {result.perplexity:8.3f}   {ratio:.4f} +- {error:.4f}")
    product = results["NBL"].perplexity * results["AWQ"].perplexity / base.perplexity
    excess = results["NBL + AWQ"].perplexity / product
    print(f"NBL + AWQ over base x (NBL / base) x (AWQ / base): {excess:.4f}")
    return int(excess > 1.03)


if __name__ == "__main__":
    sys.exit(main())
